"""Gated MLPs whose gate is one autograd function that keeps as much as its inputs for the backward pass."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_cli.model.fast_paths.fused_lora import Fused, apply_layers
from lora_cli.model.fast_paths.swiglu import SWIGLU, SwiGLU

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with the layers of the module that it replaces.

    More than ``chunk_tokens`` tokens, if set, are computed in parts; the backward pass recomputes each part.
    """

    chunk_tokens: int | None = None

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.formula = SWIGLU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        if self.chunk_tokens is not None and len(rows) > self.chunk_tokens:
            # Call the module itself, so that its hooks, which may load and free weights, run for each part.
            parts = (checkpoint(self, part, use_reentrant=False) for part in torch.split(rows, self.chunk_tokens))
            return torch.cat(list(parts)).view(x.shape)
        gate, up = apply_layers((self.gate_proj, self.up_proj), x)
        if gate.is_cuda and isinstance(self.down_proj, Fused):  # a CPU takes too long to compute the product twice
            return cast("torch.Tensor", self.down_proj(up, gate=gate))
        with torch.autocast(gate.device.type, enabled=False):  # only the compiler would act on it here
            product = SwiGLU.apply(gate, up, self.formula).view(up.shape)  # type: ignore[no-untyped-call]
        del gate, up
        return cast("torch.Tensor", self.down_proj(product))


def chunk_mlps(model: nn.Module, chunk_tokens: int) -> None:
    """Make the gated MLPs that ``fuse`` has inserted compute ``chunk_tokens`` tokens at a time. On long rows, an MLP's
    activations take several times the memory of the rest of its layer."""
    for module in model.modules():
        if isinstance(module, GatedMLP):
            module.chunk_tokens = chunk_tokens
