"""bitsandbytes' 8-bit layers, two of whose ways to fail (release 0.50.2, on a processor) are kept away from them."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch

from lora_cli.model.layers import is_8_bit


def compute_8_bits_right(model: torch.nn.Module) -> None:
    """Keep both from the model's 8-bit layers, before their first pass."""
    for layer in filter(is_8_bit, model.modules()):
        cast("Any", layer).forward = partial(_as_vectors, layer)


def _as_vectors(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's product: of more than three dimensions, which DeepSeek-V3's attention gives it, bitsandbytes takes
    the wrong for columns."""
    if layer.weight.SCB is None:  # PEFT's DoRA has made the parameter anew on a processor; the state has its scales
        layer.weight.CB = None
    product: torch.Tensor = type(layer).forward(layer, x.flatten(0, -2))
    return product.view(*x.shape[:-1], -1)
