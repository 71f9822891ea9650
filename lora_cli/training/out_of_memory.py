"""A run that ran out of memory: what there was, what the recipe needs, and what would help most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lora_cli.errors import RunError
from lora_cli.model.base import best_device, has_units_for, resolve_dtype, skeleton
from lora_cli.model.files import is_stored_in_4_bits, stored_quantization
from lora_cli.model.layers import checkpointed_layers
from lora_cli.model.memory import describe_lack, size
from lora_cli.recipe.load import changed
from lora_cli.recipe.schema import Recipe
from lora_cli.training.checkpoint import kept
from lora_cli.training.estimate import estimate
from lora_cli.training.launched import process_count
from lora_cli.training.prepare import Prepared
from lora_cli.training.same_run import with_numbers

REMEDIES = 3


def out_of_memory(job: Prepared, error: BaseException, checkpointing: bool, streams: bool) -> RunError:
    """What to raise when ``error`` came of a lack of memory; to be called while what filled it still does.

    ``checkpointing`` is whether activations were recomputed, ``streams`` whether the base's layers came and went.
    """
    now = {"training.gradient_checkpointing": checkpointing or streams, "training.stream_base": streams}
    recipe = changed(with_numbers(job.recipe), now)
    need = estimate(job, recipe)
    lines = [
        f"this recipe needs about {size(need.total)}: {size(need.weights)} for the base, {size(need.optimizer)} for "
        f"the adapter and its optimizer, {size(need.activations)} for the activations of a batch",
        "what helps most:",
        *(f"  {words} (saves about {size(saved)})" for words, saved in remedies(job, recipe)),
        kept(job.folder.checkpoints),
    ]
    return RunError(describe_lack(error), str(job.folder.root), tuple(lines))


def remedies(job: Prepared, recipe: Recipe) -> list[tuple[str, int]]:
    """The changes to the recipe that would save most, as overrides, each with the bytes it would save."""
    now = estimate(job, recipe).total
    saved = [
        (" ".join(f"{key}={_word(value)}" for key, value in changes.items()), now - estimate(job, other).total)
        for changes in _changes(recipe, job)
        for other in [changed(recipe, changes)]
    ]
    return sorted((item for item in saved if item[1] > 0), key=lambda item: -item[1])[:REMEDIES]


def _changes(recipe: Recipe, job: Prepared) -> Iterator[dict[str, Any]]:
    training = recipe.training
    size, batches = training.batch_size, training.gradient_accumulation_steps
    if not training.gradient_checkpointing:
        yield {"training.gradient_checkpointing": True}
    elif not (training.stream_base or obstacle(job, recipe, process_count())):
        yield {"training.stream_base": True}
    if size > 1:
        kept = {"training.gradient_accumulation_steps": batches * 2} if size % 2 == 0 else {}
        yield {"training.per_device_train_batch_size": size // 2} | kept
    if job.max_length > 2:
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


def obstacle(job: Prepared, recipe: Recipe, processes: int) -> str:
    """What keeps this recipe's base from being streamed (``training.stream_base``); empty when nothing does."""
    if processes > 1 or recipe.training.fsdp or recipe.training.deepspeed is not None:
        return "it goes with one process; training.fsdp shards the base over several"
    in_8_bits = recipe.quantization is not None and recipe.quantization.method == "int8"
    if in_8_bits or (stored_quantization(job.base) and not is_stored_in_4_bits(job.base)):
        return "of quantized bases those in bitsandbytes' 4 bits alone are streamed"
    if recipe.adapter.use_dora:
        return "adapter.use_dora reads every weight's norm"
    if recipe.training.gradient_checkpointing is False:
        return "it needs gradient_checkpointing, which is false"
    if not checkpointed_layers(skeleton(job.config)):
        return f"{job.config.model_type} has no layers that can be checkpointed"
    return ""


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
