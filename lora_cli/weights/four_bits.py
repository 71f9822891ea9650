"""Numbers in 4 bits, as bitsandbytes chooses them, in a tenth of the time that it takes on a CPU."""

from __future__ import annotations

import functools

import numpy as np
import torch
from bitsandbytes import functional
from numpy.typing import NDArray

from lora_cli.model.linear4bit import BLOCK

TINY = 1e-38
"""Its least divisor: a block of zeros has the scale 0, which cannot divide."""


def nearest_levels(numbers: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-wise 4-bit quantization (arXiv:2305.14314, eq. 1, with NF4's or FP4's levels).

    ``numbers`` (n,), of a floating-point type. Returns the codes (ceil(n / 2), 1) uint8, the first of a pair in the
    upper four bits, and the blocks' scales (ceil(n / 64),) float32: bit for bit those of ``functional.quantize_4bit``.
    """
    if numbers.device.type != "cpu":
        codes, state = functional.quantize_4bit(numbers, blocksize=BLOCK, quant_type=method)
        return codes, state.absmax
    scaled, scales = _scaled(numbers.float())
    middles, order = _middles(method)
    values = scaled.numpy()
    codes, above = np.zeros(len(values), np.uint8), np.empty(len(values), np.bool_)
    for middle in middles:  # fifteen comparisons of all numbers: a search of each takes ten times as long
        np.greater(values, middle, out=above)
        codes += above.view(np.uint8)
    pairs = (codes if order is None else order[codes]).view("<u2")
    return torch.from_numpy(((pairs << 4) | (pairs >> 8)).astype(np.uint8))[:, None], scales


def _scaled(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers over their block's largest, an even count of them, and the largest; a short last block is divided,
    where the others are multiplied by the inverse, which is not the same in the last bit."""
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
    """The middles between neighbouring levels, and the levels' codes by size where these are not in order."""
    levels = functional.get_4bit_type(method, device="cpu")
    order = torch.argsort(levels)
    middles = (levels[order[:-1]] + levels[order[1:]]) / 2
    in_order = torch.equal(order, torch.arange(len(order)))
    return middles.numpy(), None if in_order else order.to(torch.uint8).numpy()
