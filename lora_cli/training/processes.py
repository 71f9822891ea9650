"""One run on several processes: which process this is, what its share is, and how all come to one mind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import distributed

Item = TypeVar("Item")


def process_index() -> int:
    """Which process of the run this is, known from the launcher before the processes meet."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes the run has, known before they meet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_share(items: Sequence[Item], accelerator: Accelerator) -> list[tuple[Item, float]]:
    """Every n-th item, each with its weight 1.

    A process that would have fewer items than another takes one that is another's as well, with weight 0: in each
    forward and each backward pass every process must take part.
    """
    count, index = accelerator.num_processes, accelerator.process_index
    own = [(item, 1.0) for item in items[index::count]]
    rounds = -(-len(items) // count)
    return own + [(items[0], 0.0)] * (rounds - len(own))


def summed(tensor: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """The sum over all processes, on each."""
    if accelerator.num_processes > 1:
        distributed.all_reduce(tensor)
    return tensor


def highest(number: int, accelerator: Accelerator) -> int:
    """The largest of the numbers that the processes bring, on each."""
    if accelerator.num_processes == 1:
        return number
    agreed = torch.tensor(number, device=accelerator.device)
    distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
    return int(agreed)
