"""Keep what autograd saves for the backward pass in host memory, as torch's ``save_on_cpu`` does, but in pieces."""

from __future__ import annotations

import torch

PIECE = 2**26
"""Maximum bytes of a block of host memory. torch makes the size of a pinned block a power of two: a single one for each
activation would take up to twice the memory."""
Pieces = tuple[torch.device, torch.Size, tuple[torch.Tensor, ...]]
"""A tensor's device and shape, and flat pieces of it in host memory."""


def to_host(tensor: torch.Tensor) -> torch.Tensor | Pieces:
    """Return a copy of a GPU's tensor ``in_pieces``, and any other tensor itself."""
    return in_pieces(tensor) if tensor.is_cuda else tensor


def to_device(saved: torch.Tensor | Pieces) -> torch.Tensor:
    """Return the tensor that ``to_host`` or ``in_pieces`` was given, on its device."""
    if isinstance(saved, torch.Tensor):
        return saved
    device, shape, pieces = saved
    tensor = torch.empty(shape, dtype=pieces[0].dtype, device=device)
    for part, piece in zip(_split(tensor), pieces, strict=True):
        part.copy_(piece, non_blocking=True)
    return tensor


def in_pieces(tensor: torch.Tensor) -> Pieces:
    """Copy a tensor to host memory. From a GPU the copies go to pinned memory and are queued on its stream."""
    pieces = tuple(
        torch.empty_like(part, device="cpu", pin_memory=part.is_cuda).copy_(part, non_blocking=True)
        for part in _split(tensor.contiguous())
    )
    return tensor.device, tensor.shape, pieces


def _split(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(tensor.view(-1), PIECE // tensor.itemsize)
