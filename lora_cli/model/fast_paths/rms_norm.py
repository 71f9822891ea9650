"""RMS norms with a frozen weight: on a GPU by torch's kernel, else as one autograd function that keeps only its inputs.

On a GPU, the output refers to the inputs: layers recompute it, almost for free, and keep no copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import rms_norm

from lora_cli.model.fast_paths.formula import Formula, flatten_detached

NORM_INPUTS = "lora_norm_inputs"
"""The attribute of a norm's output that holds its ``NormInputs``."""


@dataclass(frozen=True)
class NormInputs:
    """The inputs of rms_norm(x) * weight for x (…, width), all of one dtype, from which to recompute it."""

    x: torch.Tensor
    weight: torch.Tensor
    eps: float

    def recompute(self) -> torch.Tensor:
        with torch.autocast(self.x.device.type, enabled=False):
            return rms_norm(self.x, self.weight.shape, self.weight, self.eps)


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm (arXiv:1910.07467, equation 4) of x (…, width) by torch's own kernel."""
    y = NormInputs(x, weight, eps).recompute()
    if torch.is_grad_enabled():
        setattr(y, NORM_INPUTS, NormInputs(x.detach(), weight.detach(), eps))
    return y


def norm_inputs_of(y: torch.Tensor) -> NormInputs | None:
    """The inputs of ``y``, if ``normed`` has computed it and it was not modified since; else None."""
    found: NormInputs | None = getattr(y, NORM_INPUTS, None)
    return found if y._version == 0 else None


def rms_norm_and_inverse(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y = w x / sqrt(mean(x^2) + eps) (RMSNorm, arXiv:1910.07467, equation 4) and the inverse root, (n, 1).

    x (n, width), w (width). Computed in float32 and rounded to x's dtype before the product with w, as in Llama.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    own = None if wide is x else wide  # may be overwritten
    return torch.mul(wide, inverse, out=own).to(x.dtype) * weight, inverse


def rms_norm_backward(x: torch.Tensor, weight: torch.Tensor, inverse: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the loss w.r.t. ``rms_norm_and_inverse``'s x, from ``grad`` w.r.t. its y.

    Uses layer norm's kernel with a mean of 0. The kernel subtracts inverse * mean(w grad), the gradient through layer
    norm's mean; this term is added back.
    """
    dtype = torch.promote_types(x.dtype, grad.dtype)
    g, w = grad.to(dtype), weight.to(inverse.dtype)
    centred: torch.Tensor = torch.ops.aten.native_layer_norm_backward(
        g, x.to(dtype), w.shape, torch.zeros_like(inverse), inverse, w, None, (True, False, False)
    )[0]
    means = (g @ weight.to(dtype)).unsqueeze(-1).mul(inverse).div_(len(weight))
    return (centred + means.to(dtype)).to(x.dtype)


RMS_NORM = Formula(rms_norm_and_inverse, rms_norm_backward)


class RMSNormFunction(torch.autograd.Function):
    """y of ``rms_norm_and_inverse`` for x (…, width) and a frozen w: (n, width), no view, which can be modified in
    place."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, formula: Formula = RMS_NORM
    ) -> torch.Tensor:
        y, inverse = formula.forward(flatten_detached(x), weight.detach(), eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.formula = formula
        return cast("torch.Tensor", y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad_x = ctx.formula.backward(flatten_detached(x), weight.detach(), inverse, grad.detach())
        return grad_x.reshape(x.shape), None, None, None


class FrozenRMSNorm(nn.Module):
    """An RMS norm with a frozen weight."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.formula = RMS_NORM

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if x.is_cuda and x.dtype == self.weight.dtype:
                return normed(x, self.weight, self.eps)  # one kernel each way
            y = RMSNormFunction.apply(x, self.weight, self.eps, self.formula)  # type: ignore[no-untyped-call]
            return cast("torch.Tensor", y).view(x.shape)
