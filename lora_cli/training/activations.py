"""Choose whether a run keeps, recomputes or offloads its activations, by what fits in memory."""

from __future__ import annotations

from typing import Literal

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook

from lora_cli.data.batches import Batch, Schedule
from lora_cli.evaluation.head import Head
from lora_cli.evaluation.loss import summed_loss
from lora_cli.model.layers import check_checkpointing, is_8_bit
from lora_cli.model.memory import activation_bytes, format_bytes, free_bytes, is_out_of_memory
from lora_cli.training.estimate import largest_batch
from lora_cli.training.prepare import Prepared

MEMORY_FRACTION = 0.8
"""Fraction of the free memory that the estimated activations may take; the rest is for what the estimate leaves out."""
PROBE_TOKENS = 128
"""Maximum length, in tokens, of the longer of the two rows that measure the memory kept per token."""


def choose_checkpointing(
    job: Prepared,
    schedule: Schedule,
    dtype: torch.dtype,
    device: torch.device,
    whole_logits: bool,
    recomputes: bool,
    kept: float | None = None,
) -> tuple[bool | Literal["offload"], str]:
    """Return the value of ``gradient_checkpointing`` to use, and why. ``auto`` becomes False if all activations take at
    most SHARE of the free memory or the architecture does not support it (``recomputes``), else True if that is enough
    or the device is a CPU, else "offload". ``kept`` is the bytes kept per token, if measured."""
    wanted = job.recipe.training.gradient_checkpointing
    if wanted != "auto":
        return wanted, ""
    batch = largest_batch(schedule.lengths, schedule.supervised, schedule.batch_size, job.max_length, schedule.packing)
    free = MEMORY_FRACTION * free_bytes(device)
    plain, checkpointed = (
        activation_bytes(job.config, *batch, dtype.itemsize, checkpointing, whole_logits, kept)
        for checkpointing in (False, True)
    )
    if plain <= free:
        return False, ""
    why = (
        f"a batch's activations would take about {format_bytes(plain)}, more than {MEMORY_FRACTION:.0%} of what is free"
    )
    if not recomputes:
        return False, f"{why}, and this architecture cannot recompute them"
    return checkpointed <= free or device.type == "cpu" or "offload", why


def saved_bytes_per_token(
    model: PeftModel, head: Head | None, accelerator: Accelerator, packing: bool, max_length: int
) -> float | None:
    """Return the bytes per token that the model, without its head, keeps for the backward pass; None if memory does not
    suffice. Comparing two rows of up to ``max_length`` tokens leaves out what does not grow with them, such as weights.

    The random state is unchanged.
    """
    device, most = accelerator.device, min(PROBE_TOKENS, max_length)
    model.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), accelerator.autocast():
            short, long = (_saved_bytes(model, head, _row(tokens, packing).to(device)) for tokens in (most // 2, most))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    return (long - short) / (most - most // 2)


def recompute_activations(model: PeftModel) -> None:
    """Enable gradient checkpointing: the backward pass runs each layer's forward pass again. Raises UserError when the
    architecture does not support it."""
    check_checkpointing(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # Only reentrant checkpoints need this hook, which extends the backward pass down to the embeddings.
    model.get_base_model().disable_input_require_grads()  # type: ignore[operator]


def _saved_bytes(model: PeftModel, head: Head | None, batch: Batch) -> int:
    """Return the bytes of the storages that hold what a forward pass saves for the backward pass."""
    memory: dict[int, torch.UntypedStorage] = {}  # held, so that no address is reused

    def count(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        memory[storage.data_ptr()] = storage

    def count_input(layer: Module, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        if is_8_bit(layer) and inputs[0].requires_grad:  # bitsandbytes saves it out of reach of the hooks
            count(inputs[0])

    saved = torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing)  # no backward pass unpacks them
    with saved, register_module_forward_hook(count_input):
        summed_loss(model, batch, head)
    return sum(storage.nbytes() for storage in memory.values())


def _row(tokens: int, packing: bool) -> Batch:
    """Return one row of ``tokens`` tokens, of which only the second is supervised."""
    places = torch.arange(tokens)[None]
    one = torch.zeros(1, dtype=torch.long)
    mask = None if packing else torch.ones_like(places)
    starts = torch.tensor([0, tokens], dtype=torch.int32) if packing else None
    return Batch(torch.zeros_like(places), places, mask, starts, tokens, one, one, one)
