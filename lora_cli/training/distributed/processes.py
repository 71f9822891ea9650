"""One run on several processes: how they share the work, and exchange tensors and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_cli.training.distributed.zero import fill_zero, gather, is_partitioned, is_zero_parameter

Item = TypeVar("Item")


def own_share(items: Sequence[Item], accelerator: Accelerator) -> list[tuple[Item, float]]:
    """Return every n-th item for this process, each with weight 1.

    A process with fewer items than others also takes the first item, with weight 0: every process must take part in
    each forward and each backward pass.
    """
    count, index = accelerator.num_processes, accelerator.process_index
    own = [(item, 1.0) for item in items[index::count]]
    rounds = -(-len(items) // count)
    return own + [(items[0], 0.0)] * (rounds - len(own))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the complete tensor, gathered from all processes if it is sharded; every process must call this."""
    if is_partitioned(tensor):
        return gather(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """Return the parameter's complete shape; one that DeepSpeed has partitioned is empty itself."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def broadcast_from_first(value: Item) -> Item:
    """Return the first process's value, on every process."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def sharded_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard a complete tensor over the processes as ``like`` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def fill_parameter(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Copy a complete tensor into a parameter, each process its shard; every process must call this."""
    if is_zero_parameter(parameter):
        fill_zero(parameter, value)
    else:
        parameter.copy_(sharded_like(value, parameter))


def all_reduce_max(number: int, accelerator: Accelerator) -> int:
    """Return the largest of all processes' numbers, on every process."""
    if accelerator.num_processes == 1:
        return number
    agreed = torch.tensor(number, device=accelerator.device)
    distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
    return int(agreed)


def is_broken_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone; gloo has no error class of its own."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()
