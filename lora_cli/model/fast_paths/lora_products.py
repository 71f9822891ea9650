"""Frozen layers with LoRA adapters, one or several of the same input, as one autograd function.

PEFT computes a layer as base(x) + B(A(x)) * scaling, where each operation has its own temporaries and saved tensors.
Here the products are accumulated in place. For the backward pass, nothing of the output's size is kept, and only a
reference to the frozen weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from lora_cli.model.fast_paths.rms_norm import NormInputs
from lora_cli.model.fast_paths.swiglu import swiglu, swiglu_backward
from lora_cli.model.linear4bit import dequantize


@dataclass(frozen=True)
class LayerSpec:
    """How to compute a layer: ``scaling`` is its adapter's s. The frozen weight is (out, in), or (in, out) if
    ``transposed``. A 4-bit weight is dequantized by bitsandbytes' ``state``, which is None for others."""

    scaling: float
    transposed: bool
    state: Any


class LoraProducts(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T (LoRA, arXiv:2106.09685, equation 3) for one or several frozen W.

    x (n, in); for each layer W, bias (out) or None, A (r, in) and B (out, r), with r = 0 if it has no adapter. Returns
    each layer's y (n, out). Products have x's dtype; the gradients of A and B have the dtypes of A and B. 4-bit weights
    are dequantized in each pass and not kept. Nor is x kept if no layer has an adapter or ``source`` can recompute it.
    With a ``gate`` (n, in), the input is silu(gate) * x. Each pass computes this product from gate and x, which are
    kept and which the backward pass may overwrite.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gate: torch.Tensor | None,
        source: NormInputs | None,
        specs: tuple[LayerSpec, ...],
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        weights, biases, a, b = (tensors[number::4] for number in range(4))
        rows = x if gate is None else swiglu(gate, x)
        a_low, b_low = _joined([each.to(x.dtype) for each in a]), [each.to(x.dtype) for each in b]
        down = rows @ a_low.T
        lows = torch.split(down, [len(each) for each in a], dim=1)
        ys = tuple(
            _both_products(rows, _dequantized(weight, spec, x.dtype).T, low, narrow.T, spec.scaling, bias)
            for weight, spec, low, narrow, bias in zip(weights, specs, lows, b_low, biases, strict=True)
        )
        scales = [None if spec.state is None else spec.state.absmax for spec in specs]
        keeps_input = gate is not None or (source is None and down.numel() > 0)
        origin = (None, None) if source is None else (source.x, source.weight)
        ctx.save_for_backward(x if keeps_input else None, gate, *origin, down, a_low, *b_low, *weights, *scales)
        ctx.eps = None if source is None else source.eps
        ctx.specs, ctx.dtypes = [_with(spec, None) for spec in specs], [each.dtype for each in (*a, *b)]
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, source, norm, down, a_low, *others = ctx.saved_tensors
        count = len(grads)
        b_low, weights, scales = others[:count], others[count : 2 * count], others[2 * count :]
        ranks = [b.shape[1] for b in b_low]
        specs = [_with(spec, each) for spec, each in zip(ctx.specs, scales, strict=True)]
        up = _joined([_product(g, b, spec.scaling) for g, b, spec in zip(grads, b_low, specs, strict=True)], dim=1)
        adapters: list[torch.Tensor | None] = [None] * (2 * count)
        if up.numel():
            if ctx.eps is not None:
                x = NormInputs(source, norm, ctx.eps).recompute().flatten(0, -2)
            rows = x if gate is None else swiglu(gate, x)
            grads_a = torch.split(up.T @ rows, ranks)
            del rows
            lows = zip(torch.split(down, ranks, dim=1), grads, specs, strict=True)
            grads_b = [_product(low.T, g, spec.scaling).T for low, g, spec in lows]  # three times as fast as g.T @ low
            adapters = [
                each.to(dtype, memory_format=torch.contiguous_format)
                for each, dtype in zip((*grads_a, *grads_b), ctx.dtypes, strict=True)
            ]
        grad_x = grad_gate = None
        if any(ctx.needs_input_grad[:2]):
            large = ((g, _dequantized(w, spec, g.dtype)) for g, w, spec in zip(grads, weights, specs, strict=True))
            grad_x = _sum_of_products(large, (up, a_low))
            if gate is not None:
                grad_gate, grad_x = swiglu_backward(gate, x, grad_x)
        of_layers = [(None, None, *both) for both in zip(adapters[:count], adapters[count:], strict=True)]
        return grad_x, grad_gate, None, None, *chain.from_iterable(of_layers)


def _joined(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _product(x: torch.Tensor, y: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * (x @ y), in one operation."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scaling)


def _both_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor,
    narrow: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x @ weight + scaling * (low @ narrow) + bias.

    x @ weight, the large product, comes last on a GPU, where accumulating costs it next to nothing. A CPU is faster
    when it comes first.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if x.is_cuda and len(narrow):
        small = _product(low, narrow, scaling) if bias is None else torch.addmm(bias, low, narrow, alpha=scaling)
        return small.addmm_(x, weight)
    large = x @ weight if bias is None else torch.addmm(bias, x, weight)
    return large.addmm_(low, narrow, alpha=scaling) if len(narrow) else large


def _sum_of_products(
    large: Iterator[tuple[torch.Tensor, torch.Tensor]], small: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """The sum of all pairs' products; the small pair comes first on a GPU and last on a CPU, as in ``_both_products``.
    Each large pair is made when it is needed and freed before the next."""
    total: torch.Tensor | None = None
    others = [small] if small[0].shape[1] else []
    for x, y in chain(others, large) if small[0].is_cuda else chain(large, others):
        total = x @ y if total is None else total.addmm_(x, y)
        del x, y
    assert total is not None
    return total


def _with(spec: LayerSpec, scales: torch.Tensor | None) -> LayerSpec:
    """``spec`` with these scales in its state; between the passes with None, so that checkpointing can free them."""
    if spec.state is None:
        return spec
    state = copy.copy(spec.state)
    state.absmax = scales
    return replace(spec, state=state)


def _dequantized(weight: torch.Tensor, spec: LayerSpec, dtype: torch.dtype) -> torch.Tensor:
    """The weight, dequantized if it is 4-bit, as (out, in) in ``dtype``."""
    if spec.state is not None:
        weight = dequantize(weight, spec.state)
    return (weight.T if spec.transposed else weight).to(dtype)
