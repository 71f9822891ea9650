"""A root-mean-square norm whose output knows what it was made of, so that layers need not keep it: on a GPU, where to
make it again costs next to nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm

MADE_OF = "lora_made_of"
"""The attribute of a norm's output that holds its ``Normed``."""


@dataclass(frozen=True)
class Normed:
    """rms_norm(x) weight of x (…, width), all in one dtype, to be made once more."""

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
    """What ``y`` was made of, where ``normed`` has made it and nothing was written to it since."""
    found: Normed | None = getattr(y, MADE_OF, None)
    return found if y._version == 0 else None
