"""Choose whether a run keeps, recomputes or offloads its activations, by what fits in memory."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_hook

from lora_cli.data.batches import Batch, Schedule, collate
from lora_cli.data.examples import join_pieces
from lora_cli.display import Display
from lora_cli.evaluation.head import Head
from lora_cli.evaluation.loss import summed_loss
from lora_cli.model.fast_paths.gated_mlp import chunk_mlps
from lora_cli.model.layers import is_8_bit
from lora_cli.system.memory import format_bytes, is_out_of_memory
from lora_cli.training.distributed.sharding import free_for_activations, is_sharded
from lora_cli.training.memory.estimate import activation_bytes, largest_batch
from lora_cli.training.prepare import Prepared

MEMORY_FRACTION = 0.8
"""Fraction of the free memory that the estimated activations may take; the rest is for what the estimate leaves out."""
PROBE_TOKENS = 128
"""Maximum length, in tokens, of the longer of the two rows that measure the memory kept per token."""
MLP_TOKENS = 2**14
"""Tokens that an MLP takes at a time with ``offload``: so many that dequantizing its weights for each part of a row
takes little of the time."""


def set_checkpointing(
    job: Prepared,
    schedule: Schedule,
    accelerator: Accelerator,
    model: PeftModel,
    head: Head | None,
    dtype: torch.dtype,
    streams: bool,
    display: Display,
) -> bool | Literal["offload"]:
    """Make the model keep or recompute its activations; report what ``auto`` becomes, and why, unless all fit."""
    is_whole_on_gpu = accelerator.device.type == "cuda" and not (streams or is_sharded(accelerator))
    finds_out = is_whole_on_gpu and job.recipe.training.gradient_checkpointing == "auto"
    kept = saved_bytes_per_token(model, head, accelerator, schedule.packing, job.max_length) if finds_out else None
    recomputes = model.supports_gradient_checkpointing
    device, free = accelerator.device, free_for_activations(accelerator, model)
    checkpointing, why = choose_checkpointing(job, schedule, dtype, device, free, head is None, recomputes, kept)
    if why and not streams:
        display.note(f"training.gradient_checkpointing: auto -> {str(checkpointing).lower()}: {why}")
    if checkpointing or streams:
        recompute_activations(model)
    if checkpointing == "offload":
        chunk_mlps(model, MLP_TOKENS)
    return checkpointing


def choose_checkpointing(
    job: Prepared,
    schedule: Schedule,
    dtype: torch.dtype,
    device: torch.device,
    free: int,
    whole_logits: bool,
    recomputes: bool,
    kept: float | None = None,
) -> tuple[bool | Literal["offload"], str]:
    """Return the value of ``gradient_checkpointing`` to use, and why. ``auto`` becomes False if all activations take at
    most MEMORY_FRACTION of the ``free`` bytes or the architecture does not support it (``recomputes``), else True if
    that is enough or the device is a CPU, else "offload". ``kept`` is the bytes kept per token, if measured."""
    wanted = job.recipe.training.gradient_checkpointing
    if wanted != "auto":
        return wanted, ""
    batch = largest_batch(schedule.lengths, schedule.supervised, schedule.batch_size, job.max_length, schedule.packing)
    plain, checkpointed = (
        activation_bytes(job.config, *batch, dtype.itemsize, checkpointing, whole_logits, kept)
        for checkpointing in (False, True)
    )
    room = MEMORY_FRACTION * free
    if plain <= room:
        return False, ""
    why = (
        f"a batch's activations would take about {format_bytes(plain)}, more than {MEMORY_FRACTION:.0%} of what is free"
    )
    if not recomputes:
        return False, f"{why}, and this architecture cannot recompute them"
    if checkpointed <= room or device.type == "cpu":
        return True, why
    return "offload", why


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
    """Enable the model's gradient checkpointing: the backward pass runs each layer's forward pass again."""
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
    row = np.zeros(tokens, np.int32), np.arange(tokens) == 1, 0
    return collate(join_pieces([row], ("text",)), [0], packing, pad_token_id=0)
