"""LoRA's updates as an adapter's file stores them: a product of two matrices for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_cli.weights.adapter.adapter_config import ADAPTER_WEIGHTS, layer_and_part, pattern_value
from lora_cli.weights.files.shards import TensorInfo, read_headers, read_tensor

LINEAR = {"A.weight", "B.weight"}
EMBEDDING = {"embedding_A", "embedding_B"}
MAGNITUDE = "magnitude_vector"
REDUNDANT_COPIES = (".modules_to_save.", ".original_module.")
"""Name parts of the trained and the original copy that PEFT also saves of a fully trained, resized embedding."""


@dataclass(frozen=True)
class Factors:
    """The update s UD of a weight (rows, columns), in float32: ``up`` (rows, r), ``down`` (r, columns), and DoRA's
    ``magnitude`` (rows,). An adapter's file holds an ``is_embedding`` update's factors transposed."""

    up: torch.Tensor
    down: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None
    is_embedding: bool = False

    def apply_to(self, piece: torch.Tensor, rows: slice) -> torch.Tensor:
        """Add s UD in place to ``piece``, these ``rows`` of W; with DoRA, rescale (arXiv:2402.09353, eq. 5)."""
        piece.add_((self.up[rows] @ self.down).mul_(self.scaling))
        if self.magnitude is not None:
            piece.mul_((self.magnitude[rows] / piece.norm(dim=1))[:, None])
        return piece


@dataclass(frozen=True)
class Product:
    """Where the factors of a layer's update are stored. An embedding's are stored transposed."""

    layer: str
    parts: Mapping[str, TensorInfo]
    scaling: float

    @property
    def is_embedding(self) -> bool:
        """Whether the update is an embedding's."""
        return self.parts.keys() == EMBEDDING

    @property
    def shape(self) -> tuple[int, int]:
        """The update's shape: (out, in), or (tokens, width) for an embedding."""
        if self.is_embedding:
            return self.parts["embedding_A"].shape[1], self.parts["embedding_B"].shape[0]
        return self.parts["B.weight"].shape[0], self.parts["A.weight"].shape[1]

    @property
    def rank(self) -> int:
        """The update's rank."""
        return _rank(self.parts)

    def read(self) -> Factors:
        """Read the update, laid out like the weight."""
        read = {part: read_tensor(info).float() for part, info in self.parts.items()}
        return factors_of(read, self.scaling)


def factors_of(parts: Mapping[str, torch.Tensor], scaling: float) -> Factors:
    """Return the update of a layer that is stored as these ``parts``."""
    if parts.keys() == EMBEDDING:
        return Factors(parts["embedding_A"].T, parts["embedding_B"].T, scaling, is_embedding=True)
    return Factors(parts["B.weight"], parts["A.weight"], scaling, parts.get(MAGNITUDE))


def adapter_parts(folder: Path) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]] | None:
    """Return an adapter's factors by layer and its other tensors, or None when it holds factors of other kinds."""
    halves: dict[str, dict[str, TensorInfo]] = {}
    others: dict[str, TensorInfo] = {}
    for name, info in read_headers([folder / ADAPTER_WEIGHTS]).items():
        layer, part = layer_and_part(name)
        if part:
            halves.setdefault(layer, {})[part] = info
        elif not any(part in name for part in REDUNDANT_COPIES):
            others[layer.replace(".base_layer.", ".")] = info
    kinds = (LINEAR, LINEAR | {MAGNITUDE}, EMBEDDING)
    return (halves, others) if all(parts.keys() in kinds for parts in halves.values()) else None


def scaling_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732), with a layer's alpha in ``alpha_pattern``."""
    alpha = pattern_value(config.get("alpha_pattern"), layer, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def product_of(config: Mapping[str, Any], layer: str, parts: Mapping[str, TensorInfo]) -> Product:
    """Return a layer's product from its ``parts`` in an adapter with this configuration."""
    return Product(layer, parts, scaling_of(config, layer, _rank(parts)))


def _rank(parts: Mapping[str, TensorInfo]) -> int:
    return parts["embedding_A" if parts.keys() == EMBEDDING else "A.weight"].shape[0]
