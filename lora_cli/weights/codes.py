"""Quantize one weight to 4 or 8 bits, one piece at a time, into the tensors that bitsandbytes stores for it.

The 4-bit codes are the same as bitsandbytes', in a tenth of the time that it takes on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from bitsandbytes import functional
from numpy.typing import NDArray

from lora_cli.model.linear4bit import BLOCK, dequantize
from lora_cli.recipe.schema import Quantization
from lora_cli.system.thread_pool import workers

TINY = 1e-38
"""The smallest divisor, used for a block of zeros, whose scale is 0."""
PIECE = 2**18
"""Values that a CPU thread quantizes at a time, in complete blocks: their temporaries stay in the cache."""
STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
PARTS = ("weight", "SCB", "weight_format", *(f"weight.{part}" for part in STATE))
"""Names of the tensors that a quantized weight may be stored as; of alternative names the longest."""


@dataclass(frozen=True)
class Encoded:
    """The tensors to store, by name within the layer, and the Frobenius norms |Q(W) - W| and |W|."""

    tensors: dict[str, torch.Tensor]
    error: float
    size: float


def encode(weight: torch.Tensor, quantization: Quantization) -> Encoded:
    """Quantize ``weight`` (out, in), of a floating-point dtype, as Linear4bit or Linear8bitLt would hold and save it.

    ``size`` is NaN or infinite when the weight holds NaN or infinity.
    """
    return _eight_bits(weight) if quantization.method == "int8" else _four_bits(weight, quantization)


def _each_on(weight: torch.Tensor) -> Callable[..., Iterable[Any]]:
    """Return ``map``, run by several threads for a weight on the CPU."""
    return workers().map if weight.device.type == "cpu" else map


def _four_bits(weight: torch.Tensor, quantization: Quantization) -> Encoded:
    codes, state = _coded(weight, quantization)
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset

    def norms_of(piece: torch.Tensor, code: torch.Tensor, scale: torch.Tensor) -> tuple[float, float]:
        part = functional.QuantState(scale, piece.shape, state.code, BLOCK, quantization.method, weight.dtype)
        return _norms(piece, dequantize(code, part))

    norms = _each_on(weight)(norms_of, _pieces(weight), _split(codes, PIECE // 2), _split(scales, PIECE // BLOCK))
    tensors = {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return Encoded(tensors, *_joined(norms))


def _coded(weight: torch.Tensor, quantization: Quantization) -> tuple[torch.Tensor, functional.QuantState]:
    method = quantization.method
    parts = _each_on(weight)(lambda piece: nearest_levels(piece, method), _pieces(weight))
    codes, scales = (torch.cat(found) for found in zip(*parts, strict=True))
    levels = functional.get_4bit_type(method, device=weight.device)
    state = functional.QuantState(scales, weight.shape, levels, BLOCK, method, weight.dtype)
    if quantization.double_quant:  # the scales in 8 bits, in blocks of 256, as in quantize_4bit
        state.offset = scales.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(scales - state.offset, blocksize=256)
        state.nested = True
    return codes, state


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _split(weight.reshape(-1), PIECE)


def _split(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Split a tensor on the CPU into pieces of ``size``. On a GPU it stays whole, which is fastest there."""
    return torch.split(tensor, size) if tensor.device.type == "cpu" else (tensor,)


def _eight_bits(weight: torch.Tensor) -> Encoded:
    each = _each_on(weight)
    pieces = _split(weight, max(1, PIECE // weight.shape[1]))
    parts = list(each(lambda piece: functional.int8_vectorwise_quant(piece.to(torch.float16))[:2], pieces))
    codes, scales = (torch.cat(found) for found in zip(*parts, strict=True))
    tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    norms = each(lambda piece, part: _norms(piece, functional.int8_vectorwise_dequant(*part)), pieces, parts)
    return Encoded(tensors, *_joined(norms))


def _norms(original: torch.Tensor, expanded: torch.Tensor) -> tuple[float, float]:
    original = original.float().reshape(-1)
    return _norm(expanded.float().reshape(-1) - original), _norm(original)


def _norm(vector: torch.Tensor) -> float:
    # Over more values a CPU's float32 sum drifts, by up to 2e-5 relative; a float64 sum takes ten times as long.
    return math.hypot(*(float(part.norm()) for part in _split(vector, 1 << 14)))


def _joined(norms: Iterable[tuple[float, float]]) -> tuple[float, float]:
    errors, sizes = zip(*norms, strict=True)
    return math.hypot(*errors), math.hypot(*sizes)


def quantize_dequantize(weight: torch.Tensor, quantization: Quantization, transposed: bool = False) -> torch.Tensor:
    """Quantize and dequantize a weight as a bitsandbytes layer does. ``transposed``: it is stored as (in, out)."""
    if transposed:
        return quantize_dequantize(weight.T, quantization).T
    weight = weight.contiguous()
    if quantization.method == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return cast("torch.Tensor", functional.int8_vectorwise_dequant(codes, scales))
    return dequantize(*_coded(weight, quantization))


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
    parts = [(blocks * (1.0 / scales.clamp(min=TINY))[:, None]).view(-1)]
    if len(rest):
        last = rest.abs().max().clamp(min=TINY)
        scales = torch.cat([scales, last[None]])
        parts += [rest / last, torch.zeros(len(rest) % 2)]
    return torch.cat(parts) if len(rest) else parts[0], scales


@functools.cache
def _middles(method: str) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
    """Return the midpoints between neighbouring levels, and the codes sorted by level, or None if already sorted."""
    levels = functional.get_4bit_type(method, device="cpu")
    order = torch.argsort(levels)
    middles = (levels[order[:-1]] + levels[order[1:]]) / 2
    in_order = torch.equal(order, torch.arange(len(order)))
    return middles.numpy(), None if in_order else order.to(torch.uint8).numpy()
