"""How Accelerate lays the model over processes: a copy on each, or shards (FSDP2)."""

from __future__ import annotations

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy

from lora_cli.errors import UserError
from lora_cli.recipe.schema import Training


def make_accelerator(training: Training, dtype: torch.dtype) -> Accelerator:
    """Accelerate as the recipe, or else a launcher's own configuration, asks for it.

    Raises UserError for FSDP's first version, whose flat parameters hide which tensors are the adapter's.
    """
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no"),
        log_with=list(training.report_to) or None,
        project_dir=training.output_dir,
        fsdp_plugin=_fsdp_plugin(training),
    )
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        _shard_on_cpu(accelerator, training)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP 1 is not supported", "Accelerate's configuration", "set fsdp_version: 2")
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of every weight."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def _fsdp_plugin(training: Training) -> FullyShardedDataParallelPlugin | None:
    if not training.fsdp:
        return None
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        # Adapters stay float32, gradients are summed in float32; autocast alone says what is computed in 16 bits.
        mixed_precision_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        cpu_ram_efficient_loading=False,
    )


def _shard_on_cpu(accelerator: Accelerator, training: Training) -> None:
    """Accelerate (1.15) leaves its FSDP plugin unused on processors, where torch shards as well."""
    plugin = _fsdp_plugin(training)
    if plugin is not None:
        accelerator.state.fsdp_plugin = plugin
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
