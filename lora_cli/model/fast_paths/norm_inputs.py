"""An RMS norm whose output refers to its inputs: layers recompute it, almost for free on a GPU, and keep no copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm

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
