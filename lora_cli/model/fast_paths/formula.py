"""A formula and its gradient, which one autograd function computes, as written or compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Formula:
    """A function and its gradient, eager or compiled: ``forward`` returns a result and what to keep, ``backward`` the
    inputs' gradients from what was kept and the result's gradient.

    Both take plain tensors (n, width) that need no gradient: the compiler would compile another function for each other
    kind of tensor.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def flatten_detached(x: torch.Tensor) -> torch.Tensor:
    """x (…, width) as (n, width) without gradient; detached last, so that autograd sees no view of ``x``."""
    return x.reshape(-1, x.shape[-1]).detach()
