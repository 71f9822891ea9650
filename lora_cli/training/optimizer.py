"""Optimizers and learning-rate schedules: one table each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch.optim import AdamW, Optimizer
from transformers import get_scheduler

from lora_cli.errors import UserError
from lora_cli.recipe.schema import Training

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw_torch": AdamW,
    "adamw_torch_fused": partial(AdamW, fused=True),
    "adamw_8bit": AdamW8bit,
    "paged_adamw_8bit": PagedAdamW8bit,
}

MIN_8BIT_SIZE, BLOCK_SIZE = 4096, 256
"""From how many values on bitsandbytes keeps a parameter's moments in 8 bits, and how many of them share a scale."""

SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse_sqrt",
    "constant": "constant_with_warmup",
}
"""The recipe's name -> Transformers' schedule, of which plain 'constant' would silently leave out the warm-up."""


def make_optimizer(training: Training, parameters: Sequence[torch.nn.Parameter]) -> Optimizer:
    """Create AdamW (arXiv:1711.05101) over the adapter's parameters."""
    make = OPTIMIZERS[training.optim]
    return make(list(parameters), lr=training.learning_rate, weight_decay=training.weight_decay)


def state_shapes(optimizer: Optimizer, shape: torch.Size) -> dict[str, torch.Size]:
    """Return the shapes of what an optimizer keeps, once it has taken a step, for a parameter of this ``shape``."""
    if not isinstance(getattr(optimizer, "optimizer", optimizer), Optimizer8bit):  # Accelerate's own has it inside
        return {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
    shapes = {"step": torch.Size(), "state1": shape, "state2": shape}
    if shape.numel() >= MIN_8BIT_SIZE:
        shapes |= dict.fromkeys(("absmax1", "absmax2"), torch.Size([-(-shape.numel() // BLOCK_SIZE)]))
        shapes |= dict.fromkeys(("qmap1", "qmap2"), torch.Size([256]))
    return shapes


def warmup_steps(training: Training, total_steps: int) -> int:
    """Return the number of warm-up steps: as given, or the ratio of all steps, rounded up but never all of them.

    The first warm-up step has learning rate 0: with the default ratio, a run of one step would otherwise learn nothing.
    """
    if training.warmup_steps is not None:
        return training.warmup_steps
    wanted = math.ceil(round(training.warmup_ratio * total_steps, 6))  # 0.07 * 100 is 7.000000000000001
    return min(wanted, total_steps - 1)


def check_warmup(training: Training, total_steps: int) -> None:
    """Raises UserError when the run's only step is a warm-up step, which has learning rate 0."""
    if total_steps == 1 and training.warmup_steps:
        what = "training.warmup_steps: the run has one step, and its learning rate would be 0"
        raise UserError(what, hint="set it to 0, or train for more steps")


def learning_rate_at(training: Training, optimizer: Optimizer, total_steps: int) -> Callable[[int], float]:
    """Return the learning rate as a function of step n (1, 2, …) alone: Transformers' schedule at n - 1.

    There is no state to save or restore, and no counter on which processes could disagree.
    """
    scheduler = get_scheduler(
        SCHEDULES[training.lr_scheduler_type],
        optimizer,
        num_warmup_steps=warmup_steps(training, total_steps),
        num_training_steps=total_steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: training.learning_rate * factor(step - 1)
