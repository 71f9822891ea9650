"""``per_device_train_batch_size: auto``: find the largest batch that fits, and how many of them make a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel

from lora_cli.data.batches import Batch, collate
from lora_cli.data.examples import Ints
from lora_cli.data.grouping import pack_first_fit
from lora_cli.display import Display
from lora_cli.evaluation.head import Head
from lora_cli.evaluation.loss import summed_loss
from lora_cli.model.adapters import trainable_parameters
from lora_cli.model.base import pad_token_id
from lora_cli.recipe.load import with_changes
from lora_cli.recipe.schema import Recipe
from lora_cli.system.memory import format_bytes, is_out_of_memory
from lora_cli.training.distributed.launch_environment import local_process_count
from lora_cli.training.distributed.processes import all_reduce_max
from lora_cli.training.distributed.sharding import free_for_activations, is_sharded
from lora_cli.training.memory.activations import MEMORY_FRACTION, recompute_activations
from lora_cli.training.memory.estimate import activation_bytes, largest_batch
from lora_cli.training.prepare import Prepared
from lora_cli.training.run.same_run import with_batch_size

Fits = Callable[[int, bool], bool]
"""Whether a batch of this many rows fits, with recomputed activations (True) or without."""

KEPT_BYTES = 12
"""Upper bound of what a trained parameter keeps between two batches of a step: gradient and two moments in float32."""


def resolve_batch_size(
    job: Prepared,
    accelerator: Accelerator,
    model: PeftModel,
    head: Head | None,
    packing: bool,
    element_size: int,
    streams: bool,
    display: Display,
) -> Recipe:
    """Return the recipe with numbers in place of ``auto``, the same on all processes; report them and the reason.

    With ``gradient_checkpointing: auto``, activations are recomputed only if the base ``streams`` or nothing else fits.
    On a GPU that holds the whole model, a size is tried with a forward and a backward pass of the longest batch;
    elsewhere it is estimated. Weights, gradients and random states are unchanged.
    """
    recipe = job.recipe
    if recipe.training.per_device_train_batch_size != "auto":
        return recipe
    rows, wanted = recipe.training.gradient_accumulation_steps, recipe.training.gradient_checkpointing
    ways = _ways(wanted, streams, model.supports_gradient_checkpointing)
    device = accelerator.device
    if device.type == "cuda" and not is_sharded(accelerator):
        fits, why = _by_trial(job, accelerator, model, head, packing), "the largest that ran"
    else:
        sharing = local_process_count() if device.type == "cpu" else 1
        free = free_for_activations(accelerator, model) // sharing
        fits = _by_estimate(job, head, packing, element_size, int(MEMORY_FRACTION * free))
        why = f"the largest whose activations are estimated to fit {MEMORY_FRACTION:.0%} of {format_bytes(free)} free"
    found = next(((count, way) for way in ways for count in divisors(rows) if fits(count, way)), None)
    if found is None:
        why = "continuing with 1, although even that may not fit"
    count, checkpointing = (1, ways[-1]) if found is None else found
    count = -all_reduce_max(-count, accelerator)
    checkpointing = bool(all_reduce_max(int(checkpointing), accelerator))
    decision = f"training.per_device_train_batch_size: auto -> {count}, gradient_accumulation_steps: {rows // count}"
    recomputing = ", activations recomputed" if checkpointing else ""
    display.note(f"{decision}{recomputing}, a step of {rows} rows a process ({why})", warning=found is None)
    recipe = with_batch_size(recipe, count)
    if wanted == "auto" and not streams:
        return with_changes(recipe, {"training.gradient_checkpointing": checkpointing})
    return recipe


def _ways(wanted: bool | str, streams: bool, can_recompute: bool) -> tuple[bool, ...]:
    """Return whether to recompute activations, True and False in the order in which to try them."""
    if streams or wanted == "offload":
        return (True,)
    if wanted != "auto":
        return (bool(wanted),)
    return (False, True) if can_recompute else (False,)


def divisors(number: int) -> list[int]:
    """Return the divisors of ``number``, largest first."""
    return [each for each in range(number, 0, -1) if number % each == 0]


def _by_estimate(job: Prepared, head: Head | None, packing: bool, element_size: int, room: int) -> Fits:
    examples = job.train.examples

    def fits(count: int, checkpointing: bool) -> bool:
        batch = largest_batch(examples.lengths, examples.supervised_per_row, count, job.max_length, packing)
        return activation_bytes(job.config, *batch, element_size, checkpointing, whole_logits=head is None) <= room

    return fits


def _by_trial(job: Prepared, accelerator: Accelerator, model: PeftModel, head: Head | None, packing: bool) -> Fits:
    def fits(count: int, checkpointing: bool) -> bool:
        if checkpointing:
            recompute_activations(model)
        examples = job.train.examples
        rows = longest_batch(examples.lengths, examples.supervised_per_row, count, job.max_length, packing)
        batch = collate(examples, rows, packing, pad_token_id(job.tokenizer))
        ran = _runs(accelerator, model, head, batch)
        model.zero_grad()
        clear_device_cache(garbage_collection=True)
        return ran

    return fits


def longest_batch(lengths: Ints, supervised: Ints, count: int, max_length: int, packing: bool) -> Ints:
    """Return the rows of the longest batch: ``count`` rows, or packed to ``count * max_length`` tokens. Of rows of one
    length, those with the most supervised tokens come first: the output layer runs on these."""
    order = np.lexsort((-supervised, -lengths))
    return pack_first_fit(order, lengths, count * max_length)[0] if packing else order[:count]


def _runs(accelerator: Accelerator, model: PeftModel, head: Head | None, batch: Batch) -> bool:
    device, trained = accelerator.device, sum(weight.numel() for _, weight in trainable_parameters(model))
    model.train()
    try:
        kept = torch.empty(KEPT_BYTES * trained, dtype=torch.uint8, device=device)
        with torch.random.fork_rng([device]):
            with accelerator.autocast():
                loss = summed_loss(model, batch.to(device), head)
            torch.autograd.backward(loss)
        del kept
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True
