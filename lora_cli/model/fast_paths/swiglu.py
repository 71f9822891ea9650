"""The gate of a gated MLP and its gradients: on a GPU by Liger's kernels if installed, else by torch's operations."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from packaging.version import Version
from torch.nn.functional import silu

from lora_cli.model.fast_paths.formula import Formula, flatten_detached


def _has_liger() -> bool:
    try:
        return Version(version("liger-kernel")) >= Version("0.8.5")
    except PackageNotFoundError:  # also if only a nightly build is installed: its package has another name
        return False


HAS_LIGER = _has_liger()
"""Whether Liger is installed, in a version whose loss takes a chunk size."""


def swiglu(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * x (SwiGLU, arXiv:2002.05202, equation 6 with beta = 1) of two tensors of one shape."""
    if gate.is_cuda and HAS_LIGER:
        from liger_kernel.ops.swiglu import swiglu_forward

        return cast("torch.Tensor", swiglu_forward(gate, x)[2])
    own = silu(gate)
    return own * x if own.itemsize == 2 else own.mul_(x)  # in 16 bits, mul_ takes nearly twice as long on a CPU


def swiglu_backward(gate: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients w.r.t. ``gate`` and ``x``, given ``grad`` w.r.t. ``swiglu``'s result. May overwrite the inputs."""
    if gate.is_cuda and HAS_LIGER:
        from liger_kernel.ops.swiglu import swiglu_backward as liger_backward

        return cast("tuple[torch.Tensor, torch.Tensor]", liger_backward(gate, x, grad.contiguous()))
    return torch.ops.aten.silu_backward(grad * x, gate), silu(gate) * grad


def swiglu_and_saved(gate: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``swiglu``, and two tensors of its size for ``swiglu_backward_from_saved``: on a CPU the derivatives, which take
    as much memory as the inputs and leave less to compute; on a GPU, where memory traffic takes the time, the
    inputs."""
    if gate.is_cuda:
        return swiglu(gate, x), gate, x
    own = silu(gate)
    return own * x, torch.ops.aten.silu_backward(x, gate), own


def swiglu_backward_from_saved(
    first: torch.Tensor, second: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients w.r.t. ``gate`` and ``x``, given ``grad`` w.r.t. ``swiglu``'s result and the two tensors saved
    by ``swiglu_and_saved``. May overwrite these two."""
    return swiglu_backward(first, second, grad) if grad.is_cuda else (grad * first, grad * second)


SWIGLU = Formula(swiglu_and_saved, swiglu_backward_from_saved)


class SwiGLU(torch.autograd.Function):
    """``swiglu`` of two tensors (…, width), as (n, width): not a view, so it can be modified in place. Keeps as much as
    its inputs. The backward pass may overwrite what was kept and the inputs, which nothing else reads by then."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, x: torch.Tensor, formula: Formula = SWIGLU) -> torch.Tensor:
        if not any(ctx.needs_input_grad):
            return swiglu(flatten_detached(gate), flatten_detached(x))
        y, *kept = formula.forward(flatten_detached(gate), flatten_detached(x))
        ctx.save_for_backward(*kept)
        ctx.formula, ctx.shape = formula, x.shape
        return cast("torch.Tensor", y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        slopes = ctx.formula.backward(*ctx.saved_tensors, grad.detach())
        return *(each.reshape(ctx.shape) for each in slopes), None
