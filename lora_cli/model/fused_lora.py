"""Plain LoRA in one autograd function: PEFT's own layers with another forward pass, the same numbers and names.

PEFT computes a layer as base(x) + B(A(x)) * scaling, each part an operation with temporaries and saved tensors of its
own. Here the products are accumulated in place, nothing of the output's size is kept for the backward pass, and of the
frozen weight nothing but a reference is.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.model.gate import Gate, gated, gated_slopes
from lora_cli.model.linear4bit import expand

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft import LoraConfig


class LoraProduct(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T (LoRA, arXiv:2106.09685, equation 3) for a frozen W.

    x (…, in), W (out, in) or, ``transposed``, (in, out), A (r, in), B (out, r), bias (out) or None; the product is
    computed in x's dtype and gradients of A and B are returned in their own. ``state`` is bitsandbytes' for a W of
    4 bits, which is expanded in each pass and not kept. With a ``gate`` (…, in), silu(gate) x stands for x, which is
    made in each pass and not kept either; the backward pass may write over both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        transposed: bool,
        state: Any,
        gate: torch.Tensor | None,
    ) -> torch.Tensor:
        rows = (x if gate is None else gated(gate, x)).reshape(-1, x.shape[-1])
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        down = rows @ a_low.T
        expanded = _expanded(weight, state, transposed, x.dtype).T
        y = _both_products(rows, expanded, down, b_low.T, scaling, None if bias is None else bias.to(x.dtype))
        scales = None if state is None else state.absmax
        ctx.save_for_backward(rows if gate is None else x, weight, down, a_low, b_low, gate, scales)
        ctx.scaling, ctx.transposed, ctx.state, ctx.dtypes = scaling, transposed, _with(state, None), (a.dtype, b.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, down, a_low, b_low, gate, scales = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        up = _product(g, b_low, ctx.scaling)
        grad_b = _product(down.T, g, ctx.scaling).T  # thrice as fast as g.T @ down
        grad_b = grad_b.to(ctx.dtypes[1], memory_format=torch.contiguous_format)
        rows = (x if gate is None else gated(gate, x)).reshape(-1, x.shape[-1])
        grad_a = (up.T @ rows).to(ctx.dtypes[0])
        del rows
        grad_x = grad_gate = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[-1]:
            expanded = _expanded(weight, _with(ctx.state, scales), ctx.transposed, g.dtype)
            grad_x = _both_products(g, expanded, up, a_low).view(*grad.shape[:-1], x.shape[-1])
            if gate is not None:
                grad_gate, grad_x = gated_slopes(gate, x, grad_x)
        return grad_x, None, None, grad_a, grad_b, None, None, None, grad_gate


def _product(x: torch.Tensor, y: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling x y, in one operation."""
    return torch.addmm(x.new_empty(()), x, y, beta=0, alpha=scaling)


def _both_products(
    x: torch.Tensor,
    weight: torch.Tensor,
    low: torch.Tensor,
    narrow: torch.Tensor,
    scaling: float = 1,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x weight + scaling low narrow + bias, the first of these the large product.

    On a GPU it comes last, where adding to what is there costs it next to nothing; a processor is faster otherwise.
    """
    if x.is_cuda:
        small = _product(low, narrow, scaling) if bias is None else torch.addmm(bias, low, narrow, alpha=scaling)
        return small.addmm_(x, weight)
    large = x @ weight if bias is None else torch.addmm(bias, x, weight)
    return large.addmm_(low, narrow, alpha=scaling)


def _with(state: Any, scales: torch.Tensor | None) -> Any:
    """bitsandbytes' state with these scales; between the passes without, which checkpointing is to free."""
    if state is not None:
        state = copy.copy(state)
        state.absmax = scales
    return state


def _expanded(weight: torch.Tensor, state: Any, transposed: bool, dtype: torch.dtype) -> torch.Tensor:
    """The weight as (out, in) in ``dtype``."""
    if state is not None:
        weight = expand(weight, state)
    return (weight.T if transposed else weight).to(dtype)


def product(layer: Any, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor | None:
    """The layer's output when it is plain LoRA in training: one active adapter, no dropout, no variant; else None."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1 or not torch.is_grad_enabled():
        return None
    name, base = names[0], layer.base_layer
    dropout = layer.lora_dropout[name]
    random = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
    a, b = layer.lora_A[name], layer.lora_B[name]
    if random or name in layer.lora_variant or b.bias is not None or base.weight.requires_grad:
        return None
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if getattr(base, "compute_dtype", None) not in (None, dtype):
        return None
    with torch.autocast(x.device.type, enabled=False):
        result = LoraProduct.apply(  # type: ignore[no-untyped-call]
            x.to(dtype),
            base.weight,
            base.bias,
            a.weight,
            b.weight,
            layer.scaling[name],
            isinstance(base, Conv1D),
            getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None),
            None if gate is None else gate.to(dtype),
        )
    assert isinstance(result, torch.Tensor)
    return result


class Fused:
    """What makes a LoRA layer of PEFT's a fused one; with a ``gate`` it takes silu(gate) x for x."""

    def forward(self, x: torch.Tensor, *args: Any, gate: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if gate is not None and not (x.requires_grad or gate.requires_grad):
            x, gate = gated(gate, x), None  # one to keep instead of two
        result = None if args or kwargs else product(self, x, gate)
        if result is not None:
            return result
        whole = x if gate is None else Gate.apply(gate, x)  # type: ignore[no-untyped-call]
        return cast("torch.Tensor", super().forward(whole, *args, **kwargs))  # type: ignore[misc]


class FusedLinear(Fused, lora.Linear):
    """PEFT's LoRA layer over torch's Linear or Transformers' Conv1D."""


def register(config: LoraConfig, layers: Iterable[nn.Module]) -> None:
    """Have PEFT make these layers fused ones, as far as their kind is known here."""
    kinds = {type(layer) for layer in layers}
    known: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FusedLinear, Conv1D: FusedLinear}
    if any(kind.__module__.startswith("bitsandbytes") for kind in kinds):
        from bitsandbytes.nn import Linear4bit

        known = {Linear4bit: _fused_4bit(), **known}  # PEFT takes the first that fits, and this one is a Linear
    if kinds <= known.keys():
        config._register_custom_module(known)


def _fused_4bit() -> type[nn.Module]:
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(Fused, Linear4bit):
        """PEFT's LoRA layer over bitsandbytes' 4-bit Linear."""

    return FusedLinear4bit
