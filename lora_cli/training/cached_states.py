"""Hidden states of rows, kept for later steps and evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from lora_cli.data.examples import Ints
from lora_cli.model.fast_paths.frozen_layers import FrozenLayers


@dataclass(frozen=True)
class CachedStates:
    """Hidden states of some rows' tokens: ``states`` (tokens, width), in which row i begins at ``offsets[i]``."""

    states: torch.Tensor
    offsets: Ints

    def of(self, rows: Ints, packing: bool) -> torch.Tensor:
        """Return a batch's states, laid out as by ``collate`` (rows, tokens, width), padded with each row's last."""
        if packing:
            return self.states[token_places(self.offsets, rows)][None]
        starts, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
        places = starts[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        return self.states[torch.from_numpy(places)]


def token_places(offsets: Ints, rows: Ints) -> torch.Tensor:
    """Return the indices of the rows' tokens among those of all rows, row after row: (tokens,) int64."""
    return torch.from_numpy(np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows]))


@dataclass(frozen=True)
class HiddenStates:
    """Where each part of the rows ("train", "validation") keeps its hidden states, and these once computed.

    Each token has ``width`` values of type ``dtype``.
    """

    layers: FrozenLayers
    width: int
    dtype: torch.dtype
    places: Mapping[str, str]
    kept: dict[str, CachedStates] = field(default_factory=dict)
