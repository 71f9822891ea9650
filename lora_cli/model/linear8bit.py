"""Workarounds for two faults of bitsandbytes' 8-bit layers (release 0.50.2, on a CPU)."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch

from lora_cli.model.layers import is_8_bit


def patch_8bit_layers(model: torch.nn.Module) -> None:
    """Work around both faults in the model's 8-bit layers. Call before their first forward pass."""
    for layer in filter(is_8_bit, model.modules()):
        cast("Any", layer).forward = partial(_as_vectors, layer)


def _as_vectors(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output, computed on a flattened x: when x has more than three dimensions, as in DeepSeek-V3's
    attention, bitsandbytes takes the wrong one for columns."""
    if layer.weight.SCB is None:  # PEFT's DoRA has recreated the parameter on a CPU; the state has its scales
        layer.weight.CB = None
    product: torch.Tensor = type(layer).forward(layer, x.flatten(0, -2))
    return product.view(*x.shape[:-1], -1)
