"""Hidden states of rows, as they are kept for the steps and evaluations that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from lora_cli.data.examples import Ints
from lora_cli.model.frozen_layers import FrozenLayers


@dataclass(frozen=True)
class Kept:
    """Hidden states of every token of some rows, ``states`` (tokens, width), each row's from its ``offsets`` on."""

    states: torch.Tensor
    offsets: Ints

    def of(self, rows: Ints, packing: bool) -> torch.Tensor:
        """Those of a batch's rows, laid out as ``collate`` does (rows, tokens, width); padded with a row's last."""
        if packing:
            return self.states[token_places(self.offsets, rows)][None]
        starts, lengths = self.offsets[rows], np.diff(self.offsets)[rows]
        places = starts[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        return self.states[torch.from_numpy(places)]


def token_places(offsets: Ints, rows: Ints) -> torch.Tensor:
    """Where the rows' tokens lie among those of all rows, row after row: (tokens,) int64."""
    return torch.from_numpy(np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in rows]))


@dataclass(frozen=True)
class HiddenStates:
    """Where each part of the rows ("train", "validation") has its hidden states, and these once they are computed.

    A token's are ``width`` numbers of type ``dtype``.
    """

    layers: FrozenLayers
    width: int
    dtype: torch.dtype
    places: Mapping[str, str]
    kept: dict[str, Kept] = field(default_factory=dict)
