"""Quantize to the same 4-bit codes as bitsandbytes, in a tenth of the time that it takes on a CPU."""

from __future__ import annotations

import functools

import numpy as np
import torch
from bitsandbytes import functional
from numpy.typing import NDArray

from lora_cli.model.linear4bit import BLOCK

TINY = 1e-38
"""The smallest divisor, used for a block of zeros, whose scale is 0."""


def nearest_levels(numbers: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize block-wise to 4 bits (arXiv:2305.14314, eq. 1, with NF4's or FP4's levels).

    ``numbers`` (n,) has a floating-point dtype. Returns the codes (ceil(n / 2), 1) in uint8, the first of a pair in the
    upper four bits, and the block scales (ceil(n / 64),) in float32. Bit-identical to ``functional.quantize_4bit``.
    """
    if numbers.device.type != "cpu":
        codes, state = functional.quantize_4bit(numbers, blocksize=BLOCK, quant_type=method)
        return codes, state.absmax
    scaled, scales = _scaled(numbers.float())
    middles, order = _middles(method)
    values = scaled.numpy()
    codes, above = np.zeros(len(values), np.uint8), np.empty(len(values), np.bool_)
    for middle in middles:  # 15 comparisons of the whole array: a search for each value takes ten times as long
        np.greater(values, middle, out=above)
        codes += above.view(np.uint8)
    pairs = (codes if order is None else order[codes]).view("<u2")
    return torch.from_numpy(((pairs << 4) | (pairs >> 8)).astype(np.uint8))[:, None], scales


def _scaled(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the numbers divided by their block's largest magnitude, padded to an even count, and those magnitudes. The
    last bit matters: full blocks are multiplied by the inverse, a short last block is divided."""
    full = len(numbers) // BLOCK * BLOCK
    blocks, rest = numbers[:full].view(-1, BLOCK), numbers[full:]
    scales = blocks.abs().amax(dim=1)
    parts = [(blocks * (1.0 / scales.clamp(min=TINY))[:, None]).clamp_(-1, 1).view(-1)]
    if len(rest):
        last = rest.abs().max().clamp(min=TINY)
        scales = torch.cat([scales, last[None]])
        parts += [(rest / last).clamp_(-1, 1), torch.zeros(len(rest) % 2)]
    return torch.cat(parts) if len(rest) else parts[0], scales


@functools.cache
def _middles(method: str) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """Return the midpoints between neighbouring levels, and the codes sorted by level, or None if already sorted."""
    levels = functional.get_4bit_type(method, device="cpu")
    order = torch.argsort(levels)
    middles = (levels[order[:-1]] + levels[order[1:]]) / 2
    in_order = torch.equal(order, torch.arange(len(order)))
    return middles.numpy(), None if in_order else order.to(torch.uint8).numpy()
