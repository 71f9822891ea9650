"""The gate of a gated MLP and its slopes: Liger's kernels where they are there, else torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, cast

import torch
from packaging.version import Version
from torch.nn.functional import silu

HAS_LIGER = find_spec("liger_kernel") is not None and Version(version("liger-kernel")) >= Version("0.8.5")
"""Whether Liger is there, and its loss takes the size of its chunks."""


def gated(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """silu(gate) x (SwiGLU, arXiv:2002.05202, equation 6 with beta = 1), both of one shape."""
    if gate.is_cuda and HAS_LIGER:
        from liger_kernel.ops.swiglu import swiglu_forward

        return cast("torch.Tensor", swiglu_forward(gate, x)[2])
    own = silu(gate)
    return own * x if own.itemsize == 2 else own.mul_(x)  # in 16 bits that takes nearly twice as long on a processor


def gated_slopes(gate: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``gate`` and ``x`` for that of ``gated``; they may lie where these two lay."""
    if gate.is_cuda and HAS_LIGER:
        from liger_kernel.ops.swiglu import swiglu_backward

        return cast("tuple[torch.Tensor, torch.Tensor]", swiglu_backward(gate, x, grad.contiguous()))
    return torch.ops.aten.silu_backward(grad * x, gate), silu(gate) * grad


def gated_and_kept(gate: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``gated``, and the two of its size that ``kept_slopes`` takes: on a processor its slopes, which take as much
    memory as what they are made of and leave less to do; on a GPU, where the time goes into memory, its inputs."""
    if gate.is_cuda:
        return gated(gate, x), gate, x
    own = silu(gate)
    return own * x, torch.ops.aten.silu_backward(x, gate), own


def kept_slopes(first: torch.Tensor, second: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of ``gate`` and ``x`` for that of ``gated``, from what ``gated_and_kept`` has kept; they may lie
    where these two lay."""
    return gated_slopes(first, second, grad) if grad.is_cuda else (grad * first, grad * second)


@dataclass(frozen=True)
class Formula:
    """What gives a value, and from what was kept and the value's gradient those of its inputs: as they stand, or as
    torch's compiler has made them.

    Both take vectors as (n, width), and plain tensors that need no gradient: for each other kind the compiler would
    make another function.
    """

    value: Callable[..., Any]
    slopes: Callable[..., Any]


GATED = Formula(gated_and_kept, kept_slopes)


class Gate(torch.autograd.Function):
    """``gated`` of two (…, width), as (n, width): no view, so that it may be written to. As much as its two inputs is
    kept; the backward pass may write over it, and over them, which nothing else reads by then."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, x: torch.Tensor, formula: Formula = GATED) -> torch.Tensor:
        if not any(ctx.needs_input_grad):
            return gated(vectors(gate), vectors(x))
        y, *kept = formula.value(vectors(gate), vectors(x))
        ctx.save_for_backward(*kept)
        ctx.formula, ctx.shape = formula, x.shape
        return cast("torch.Tensor", y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slopes = ctx.formula.slopes(*ctx.saved_tensors, grad.detach())
        return *(each.reshape(ctx.shape) for each in slopes), None


def vectors(x: torch.Tensor) -> torch.Tensor:
    """(…, width) as (n, width), which neither needs a gradient nor, detached last, is known as a view of ``x``."""
    return x.reshape(-1, x.shape[-1]).detach()
