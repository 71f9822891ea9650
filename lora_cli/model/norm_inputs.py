"""An RMS norm whose output refers to its inputs: layers recompute it, almost for free on a GPU, and keep no copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm

MADE_OF = "lora_made_of"
"""The attribute of a norm's output that holds its ``Normed``."""


@dataclass(frozen=True)
class Normed:
    """The inputs of rms_norm(x) * weight for x (…, width), all of one dtype, from which to recompute it."""

    x: torch.Tensor
    weight: torch.Tensor
    eps: float

    def make(self) -> torch.Tensor:
        with torch.autocast(self.x.device.type, enabled=False):
            return rms_norm(self.x, self.weight.shape, self.weight, self.eps)


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm (arXiv:1910.07467, equation 4) of x (…, width) by torch's own kernel."""
    y = Normed(x, weight, eps).make()
    if torch.is_grad_enabled():
        setattr(y, MADE_OF, Normed(x.detach(), weight.detach(), eps))
    return y


def made_of(y: torch.Tensor) -> Normed | None:
    """The inputs of ``y``, if ``normed`` has computed it and it was not modified since; else None."""
    found: Normed | None = getattr(y, MADE_OF, None)
    return found if y._version == 0 else None
