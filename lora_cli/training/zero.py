"""DeepSpeed ZeRO (arXiv:1910.02054) behind the interface of torch's own optimizers.

DeepSpeed keeps optimizer state, and from stage 3 on weights, as flat parts of its own on each process; here they are
gathered and filled by parameter, so that checkpoints and adapters are the same as everywhere else.
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
    """The configuration that ``training.deepspeed`` names, or that a launcher was given."""
    if training.deepspeed is None and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return None
    named = None if training.deepspeed is None else json.loads(Path(training.deepspeed).read_text(encoding="utf-8"))
    plugin = DeepSpeedPlugin(hf_ds_config=named)
    configure(plugin, training, processes=1)
    return plugin


def configure(plugin: DeepSpeedPlugin, training: Training, processes: int) -> None:
    """Leave all but the sharding to the recipe: to DeepSpeed, a step is one backward pass in the weights' own types."""
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
    """DeepSpeed's optimizer with the state of torch's: whole tensors by the parameter's place in ``parameters``.

    Every process must call each method.
    """

    def __init__(self, engine: Any, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.engine = engine
        self.parameters = list(parameters)
        self.param_groups = engine.optimizer.param_groups  # the step takes the learning rate that stands here
        self.defaults = {"lr": self.param_groups[0]["lr"]}  # which Transformers' schedules read

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the loss's gradient; after the ``last`` of a step it is summed over the processes."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def gradient_norm(self) -> torch.Tensor:
        """The norm of the step's whole gradient, before it is clipped."""
        from deepspeed.utils import safe_get_full_grad

        return torch.nn.utils.get_total_norm([safe_get_full_grad(parameter) for parameter in self.parameters])

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip and take the step."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of gradients."""
        self.engine.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state as torch lays it out."""
        from deepspeed.utils import safe_get_full_optimizer_state

        steps = self._flat_states()[0]["step"]
        state = {
            index: {"step": torch.as_tensor(steps, dtype=torch.float32)}
            | {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            for index, parameter in enumerate(self.parameters)
        }
        group = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        return {"state": state, "param_groups": [group | {"params": list(range(len(self.parameters)))}]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Fill the parts from what ``state_dict`` gave, here or from torch's optimizer."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self._make_state()
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                value = state_dict["state"][index][name].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, name)
        for flat in self._flat_states():
            flat["step"] = torch.as_tensor(state_dict["state"][0]["step"], dtype=torch.float32)

    def _make_state(self) -> None:
        """Take a step of length 0: DeepSpeed makes the optimizer's state in its first."""
        for group in self.param_groups:
            group["lr"] = 0.0
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.engine.device)
        self.backward(0 * self.engine(input_ids=ids, use_cache=False).logits.float().sum(), last=True)
        self.step()

    def _flat_states(self) -> list[dict[str, Any]]:
        states: list[dict[str, Any]] = list(self.engine.optimizer.optimizer.state.values())
        return states


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether this is a parameter of stage 3, empty but while it is in use."""
    return hasattr(tensor, "ds_id")


def is_zero_parameter(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed's optimizer holds a copy of this parameter."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """A copy of a partitioned parameter, whole; every process must call this."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def fill_zero(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Put a whole tensor into a parameter and into the optimizer's copy of it; every process must call this."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_full_fp32_param

    value = value.to(parameter.device)
    if is_partitioned(parameter):
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)
    safe_set_full_fp32_param(parameter, value)
