"""One run on several processes: what each one's share is, and how all come to hold or to know the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_cli.training.zero import fill_zero, gather, is_partitioned, is_zero_parameter

Item = TypeVar("Item")


def own_share(items: Sequence[Item], accelerator: Accelerator) -> list[tuple[Item, float]]:
    """Every n-th item, each with its weight 1.

    A process that would have fewer items than another takes one that is another's as well, with weight 0: in each
    forward and each backward pass every process must take part.
    """
    count, index = accelerator.num_processes, accelerator.process_index
    own = [(item, 1.0) for item in items[index::count]]
    rounds = -(-len(items) // count)
    return own + [(items[0], 0.0)] * (rounds - len(own))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all processes' shards of it together; every process must call this."""
    if is_partitioned(tensor):
        return gather(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The parameter's whole shape: partitioned by DeepSpeed, it has none of its own."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def firsts(value: Item) -> Item:
    """The first process's value, on each."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


def laid_out_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sharded over processes as ``like`` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def fill(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Put a whole tensor into a parameter, each process its shard; every process must call this."""
    if is_zero_parameter(parameter):
        fill_zero(parameter, value)
    else:
        parameter.copy_(laid_out_as(value, parameter))


def highest(number: int, accelerator: Accelerator) -> int:
    """The largest of the numbers that the processes bring, on each."""
    if accelerator.num_processes == 1:
        return number
    agreed = torch.tensor(number, device=accelerator.device)
    distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
    return int(agreed)


def is_broken_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone; gloo has no error class of its own."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()
