"""Keep what autograd saves for the backward pass in host memory, as torch's ``save_on_cpu`` does, but in pieces."""

from __future__ import annotations

import torch

PIECE = 2**26
"""Maximum bytes of a block of host memory. torch makes the size of a pinned block a power of two: a single one for each
activation would take up to twice the memory."""


def to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Size, tuple[torch.Tensor, ...]]:
    """Return the tensor's device and shape, and flat pieces of it in host memory: copies in pinned memory, queued on
    the GPU's stream, or views of a tensor that is there already."""
    pieces = tuple(
        torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True) if part.is_cuda else part
        for part in _split(tensor.contiguous())
    )
    return tensor.device, tensor.shape, pieces


def to_device(saved: tuple[torch.device, torch.Size, tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Return the tensor that ``to_host`` was given, on its device."""
    device, shape, pieces = saved
    tensor = torch.empty(shape, dtype=pieces[0].dtype, device=device)
    for part, piece in zip(_split(tensor), pieces, strict=True):
        part.copy_(piece, non_blocking=True)
    return tensor


def _split(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(tensor.view(-1), PIECE // tensor.itemsize)
