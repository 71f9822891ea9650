"""The error of a run that ran out of memory: what there was, what the recipe needs, and what would help most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lora_cli.errors import RunError
from lora_cli.model.device import best_device, has_units_for, resolve_dtype
from lora_cli.model.files import stored_quantization
from lora_cli.recipe.load import with_changes
from lora_cli.recipe.schema import Recipe
from lora_cli.system.memory import describe_out_of_memory, format_bytes
from lora_cli.training.distributed.launch_environment import process_count
from lora_cli.training.memory.estimate import estimate
from lora_cli.training.memory.streaming import why_not_streamable
from lora_cli.training.prepare import Prepared
from lora_cli.training.run.checkpoint import checkpoint_hint
from lora_cli.training.run.same_run import format_value, with_resolved_batch

REMEDIES = 3


def out_of_memory(job: Prepared, error: BaseException, checkpointing: bool, streams: bool) -> RunError:
    """Return the error to raise for a lack of memory (``error``). Call this while the memory is still in use.

    ``checkpointing`` is whether activations were recomputed, ``streams`` whether the base's layers were streamed.
    """
    now = {"training.gradient_checkpointing": checkpointing or streams, "training.stream_base": streams}
    recipe = with_changes(with_resolved_batch(job.recipe), now)
    need = estimate(job, recipe)
    saved = [
        (need.total - estimate(job, with_changes(recipe, changes)).total, changes) for changes in _remedies(job, recipe)
    ]
    best = sorted((each for each in saved if each[0] > 0), key=lambda each: -each[0])[:REMEDIES]
    lines = [
        f"this recipe needs about {format_bytes(need.total)}: {format_bytes(need.weights)} for the base, "
        f"{format_bytes(need.optimizer)} for the adapter and its optimizer, {format_bytes(need.activations)} for the "
        "activations of a batch",
        "what helps most:",
        *(f"  {_overrides(changes)} (saves about {format_bytes(count)})" for count, changes in best),
        checkpoint_hint(job.folder.checkpoints),
    ]
    return RunError(describe_out_of_memory(error), str(job.folder.root), tuple(lines))


def _overrides(changes: Mapping[str, Any]) -> str:
    """Format the changes as they are written on the command line."""
    return " ".join(
        f"{key}={value if isinstance(value, str) else format_value(value)}" for key, value in changes.items()
    )


def _remedies(job: Prepared, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Yield changes to the recipe, by key, that may save memory."""
    training = recipe.training
    rows, batches = training.batch_size, training.gradient_accumulation_steps
    if not training.gradient_checkpointing:
        if job.bare.supports_gradient_checkpointing:
            yield {"training.gradient_checkpointing": True}
    elif not (training.stream_base or why_not_streamable(job, recipe, process_count())):
        yield {"training.stream_base": True}
    if rows > 1:
        same_step = {"training.gradient_accumulation_steps": batches * 2} if rows % 2 == 0 else {}
        yield {"training.per_device_train_batch_size": rows // 2} | same_step
    if job.max_length >= 6:  # data.max_length is at least 3
        yield {"data.max_length": job.max_length // 2}
    if recipe.quantization is None and not stored_quantization(job.base):
        yield {"quantization.method": "nf4"}
        device = best_device()
        if resolve_dtype(recipe.model.dtype, device) == torch.float32 and has_units_for(torch.bfloat16, device):
            yield {"model.dtype": "bfloat16"}
    if not training.optim.endswith("8bit") and not training.fsdp and training.deepspeed is None:
        yield {"training.optim": "adamw_8bit"}
    if recipe.adapter.r > 1:
        yield {"adapter.r": recipe.adapter.r // 2}
