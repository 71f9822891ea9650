"""How Accelerate distributes the model over processes: a copy on each, or shards (FSDP2, DeepSpeed ZeRO)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.optim import Optimizer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lora_cli.errors import UserError, first_few
from lora_cli.model.adapters import trainable_parameters
from lora_cli.model.device import is_usable
from lora_cli.recipe.schema import Training
from lora_cli.system.memory import free_bytes
from lora_cli.training.distributed.processes import full_tensor
from lora_cli.training.distributed.zero import ZeroOptimizer, configure, is_zero, zero_plugin

WAIT = timedelta(hours=3)
"""How long processes wait for one another, also while one quantizes a base. NCCL's own 10 minutes are too short."""

CONFIGURATION = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "FP8_")
"""The beginnings of the names of variables through which a launcher configures Accelerate."""


def make_accelerator(training: Training, dtype: torch.dtype) -> Accelerator:
    """Create the Accelerator that the recipe, or else a launcher's own configuration, asks for.

    Raises UserError for a launcher's configuration that Accelerate refuses, for a device that is not there, and for
    FSDP 1, whose flat parameters hide which tensors are the adapter's.
    """
    with _launcher_configuration():
        plugins = {"fsdp_plugin": _fsdp_plugin(training), "deepspeed_plugin": zero_plugin(training)}
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no"),
            log_with=list(training.report_to) or None,
            project_dir=training.output_dir,
            # Given as a number, Accelerate would let a launcher's number win, and divide every gradient by it.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
            **plugins,
        )
    if not is_usable(accelerator.device):  # only a variable can choose such a one
        where, hint = f"ACCELERATE_TORCH_DEVICE={accelerator.device} (environment)", "unset it"
        raise UserError("there is no such device here on which lora can train", where, hint)
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        _shard_on_cpu(accelerator, plugins["fsdp_plugin"], plugins["deepspeed_plugin"])
    if is_zero(accelerator):
        configure(accelerator.state.deepspeed_plugin, training, accelerator.num_processes)
        unset_hf_deepspeed_config()  # else from_pretrained would keep only a part of the base, before it is checked
    return accelerator


@contextmanager
def _launcher_configuration() -> Iterator[None]:
    """Raise UserError when the block fails and the environment configures Accelerate, as its launcher does."""
    try:
        yield
    except (AssertionError, ImportError, LookupError, ValueError) as error:
        names = sorted(name for name in os.environ if name.startswith(CONFIGURATION))
        if not names:
            raise
        what = f"Accelerate refuses its configuration: {' '.join(str(error).split())}"
        hint = "unset what is wrong, or correct the configuration that accelerate launch reads"
        raise UserError(what, f"{first_few(names, 5)} (environment)", hint) from error


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of every weight."""
    if is_zero(accelerator):
        return int(accelerator.state.deepspeed_plugin.zero_stage) == 3
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def free_for_activations(accelerator: Accelerator, model: torch.nn.Module) -> int:
    """Return the bytes that are free on the device once it has its part of the model, before ``prepare_model`` too:
    until then, weights that will be sharded over GPUs are in host memory."""
    free = free_bytes(accelerator.device)
    if accelerator.device.type == "cuda" and is_sharded(accelerator):
        free -= sum(weight.nbytes for weight in model.parameters()) // accelerator.num_processes
    return max(0, free)


def prepare_model(
    accelerator: Accelerator, model: PeftModel, optimizer: Optimizer, dtype: torch.dtype
) -> tuple[torch.nn.Module, Optimizer]:
    """Return model and optimizer as Accelerate distributes them over the processes."""
    if dtype != torch.float32 and (is_zero(accelerator) or is_sharded(accelerator)):  # else Accelerate does this itself
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)  # type: ignore[method-assign]
    if is_zero(accelerator):
        engine, _ = accelerator.prepare(model, optimizer)
        return engine, ZeroOptimizer(engine, [parameter for _, parameter in trainable_parameters(model)])
    if is_sharded(accelerator):
        _name_layers_to_wrap(accelerator.state.fsdp_plugin, model)
    prepared: tuple[torch.nn.Module, Optimizer] = accelerator.prepare(model, optimizer)
    return prepared


def backward(accelerator: Accelerator, optimizer: Optimizer, loss: torch.Tensor, last: bool) -> None:
    """Accumulate the gradient of the loss; it is summed over the processes only after the step's ``last`` loss."""
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.backward(loss, last)
    else:
        accelerator.backward(loss)


def clip_gradient(
    accelerator: Accelerator, optimizer: Optimizer, weights: list[torch.nn.Parameter], norm: float
) -> torch.Tensor:
    """Clip the gradient's norm. Returns the norm before clipping, a scalar on the accelerator's device wherever the
    gradient is. DeepSpeed clips when it takes the step."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.gradient_norm().to(accelerator.device)
    accelerator.unscale_gradients()  # Accelerate's clipping does it twice for shards; float16's scaler refuses that
    return full_tensor(torch.nn.utils.clip_grad_norm_(weights, norm)).to(accelerator.device)


def reshard(model: torch.nn.Module) -> None:
    """Shard again what FSDP leaves gathered after a forward pass, by default the weights outside the repeated layers.

    What changes sharded weights does not change the gathered copies that the next forward pass would use, and PEFT
    changes ``requires_grad`` on those tensors that a layer has at the moment.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _fsdp_plugin(training: Training) -> FullyShardedDataParallelPlugin | None:
    if training.fsdp:
        options: dict[str, Any] = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"}
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":  # set by a launcher's own configuration
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError("FSDP 1 is not supported", "Accelerate's configuration", "set fsdp_version: 2")
        options = {}
    else:
        return None
    return FullyShardedDataParallelPlugin(
        # Adapters stay float32, gradients are summed in float32; only autocast decides what is computed in 16 bits.
        mixed_precision_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        # Each process loads the complete base, so that it can be checked, and then keeps its part.
        cpu_ram_efficient_loading=False,
        **options,
    )


def _name_layers_to_wrap(plugin: FullyShardedDataParallelPlugin, model: PeftModel) -> None:
    """Let the plugin wrap the layer classes that Transformers names for this architecture, unless it has names already.

    Of these, a text model may lack some, such as Qwen3.5 the vision tower's, for which Accelerate raises ValueError.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        present = {type(module).__name__ for module in model.modules()}
        plugin.transformer_cls_names_to_wrap = sorted(present.intersection(model._no_split_modules or ()))


def _shard_on_cpu(
    accelerator: Accelerator, fsdp: FullyShardedDataParallelPlugin | None, zero: DeepSpeedPlugin | None
) -> None:
    """Enable sharding on CPUs: Accelerate (1.15) ignores its plugins there, but torch and DeepSpeed can shard."""
    state = accelerator.state
    if fsdp is not None:
        state.fsdp_plugin = fsdp
    if zero is not None:
        zero.select(_from_accelerator_state=True)
        state.deepspeed_plugins = {"default": zero}
    if fsdp is not None or zero is not None:
        for each in (state, PartialState()):
            each.distributed_type = DistributedType.DEEPSPEED if fsdp is None else DistributedType.FSDP
