"""DeepSpeed ZeRO (arXiv:1910.02054) behind the interface of torch's own optimizers.

DeepSpeed keeps optimizer state, and in stage 3 weights, as flat partitions on each process. Here they are gathered and
filled by parameter, so that checkpoints and adapters are the same as without DeepSpeed. It is imported in functions,
since it need not be installed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType

from lora_cli.recipe.schema import Training

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_plugin(training: Training) -> DeepSpeedPlugin | None:
    """Return the plugin for the configuration that ``training.deepspeed`` names or a launcher was given, or None."""
    if training.deepspeed is None and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    named = None if training.deepspeed is None else json.loads(Path(training.deepspeed).read_text(encoding="utf-8"))
    plugin = DeepSpeedPlugin(hf_ds_config=named)
    configure(plugin, training, processes=1)
    return plugin


def configure(plugin: DeepSpeedPlugin, training: Training, processes: int) -> None:
    """Let the recipe decide all but sharding: DeepSpeed's step is one backward pass in the weights' own dtypes."""
    for key in ("bf16", "fp16", "optimizer", "scheduler"):
        plugin.deepspeed_config.pop(key, None)
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": processes,
        "gradient_clipping": training.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
    }


def is_zero(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed holds the optimizer."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


class ZeroOptimizer(torch.optim.Optimizer):
    """DeepSpeed's optimizer with a state like torch's: complete tensors by the parameter's index in ``parameters``.

    Every process must call each method.
    """

    def __init__(self, engine: Any, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.engine = engine
        self.parameters = list(parameters)
        self.param_groups = engine.optimizer.param_groups  # the step reads its learning rate here
        self.defaults = {"lr": self.param_groups[0]["lr"]}  # for Transformers' schedules

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Accumulate the gradient of the loss; after a step's ``last`` loss it is summed over the processes."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def gradient_norm(self) -> torch.Tensor:
        """Return the norm of the step's complete gradient, before clipping."""
        from deepspeed.utils import safe_get_full_grad

        return torch.nn.utils.get_total_norm([safe_get_full_grad(parameter) for parameter in self.parameters])

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip the gradient and take the step."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free the gradients."""
        self.engine.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state in torch's layout; empty before the first step, as torch's own."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states = self._flat_states()
        state = {
            index: {"step": torch.as_tensor(states[0]["step"], dtype=torch.float32)}
            | {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            for index, parameter in enumerate(self.parameters if states else ())
        }
        group = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        return {"state": state, "param_groups": [group | {"params": list(range(len(self.parameters)))}]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Fill the partitions from a ``state_dict`` of this class or of torch's optimizer."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._make_state()
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                value = state_dict["state"][index][name].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, name)
        for flat in self._flat_states():
            flat["step"] = torch.as_tensor(state_dict["state"][0]["step"], dtype=torch.float32)

    def _make_state(self) -> None:
        """Take a step with learning rate 0: DeepSpeed creates the optimizer's state in its first step."""
        for group in self.param_groups:
            group["lr"] = 0.0
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.engine.device)
        self.backward(0 * self.engine(input_ids=ids, use_cache=False).logits.float().sum(), last=True)
        self.step()

    def _flat_states(self) -> list[dict[str, Any]]:
        states: list[dict[str, Any]] = list(self.engine.optimizer.optimizer.state.values())
        return states


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether this is a parameter partitioned by stage 3, which is empty except while in use."""
    return hasattr(tensor, "ds_id")


def is_zero_parameter(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed's optimizer holds a copy of this parameter."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """Return a complete copy of a partitioned parameter; every process must call this."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def fill_zero(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a complete tensor into a parameter and the optimizer's copy of it; every process must call this."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    value = value.to(parameter.device)
    if is_partitioned(parameter):
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)
    safe_set_full_fp32_param(parameter, value)
