"""LoRA's updates as an adapter's file holds them: a product of two matrices for each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_cli.weights.adapter_config import ADAPTER_WEIGHTS, PEFT_PREFIX, own_value
from lora_cli.weights.shards import TensorInfo, read_headers, read_tensor

LINEAR = {"A.weight", "B.weight"}
EMBEDDING = {"embedding_A", "embedding_B"}
MAGNITUDE = "magnitude_vector"
COPIES = (".modules_to_save.", ".original_module.")
"""In names of what PEFT saves once more, and as it was, of an embedding trained whole that has had words added."""


Place = tuple[str, TensorInfo]
"""A tensor's name in its file, and where it lies there."""


@dataclass(frozen=True)
class Factors:
    """s UD of a weight (rows, columns), in float32: ``up`` (rows, r), ``down`` (r, columns), DoRA's ``magnitude``
    (rows,)."""

    up: torch.Tensor
    down: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None

    def added_to(self, piece: torch.Tensor, rows: slice) -> torch.Tensor:
        """W + s UD of some rows, in place; scaled to DoRA's magnitudes if there are any (arXiv:2402.09353, eq. 5)."""
        piece.add_((self.up[rows] @ self.down).mul_(self.scaling))
        if self.magnitude is not None:
            piece.mul_((self.magnitude[rows] / piece.norm(dim=1))[:, None])
        return piece


@dataclass(frozen=True)
class Product:
    """Where the parts of a layer's update lie. An embedding's are stored the other way round."""

    layer: str
    parts: Mapping[str, Place]
    scaling: float

    @property
    def is_embedding(self) -> bool:
        """Whether the update is an embedding's."""
        return self.parts.keys() == EMBEDDING

    @property
    def shape(self) -> tuple[int, int]:
        """Of the update: (out, in), an embedding's (tokens, width)."""
        shapes = {part: info.shape for part, (_, info) in self.parts.items()}
        if self.is_embedding:
            return shapes["embedding_A"][1], shapes["embedding_B"][0]
        return shapes["B.weight"][0], shapes["A.weight"][1]

    @property
    def rank(self) -> int:
        """Of the update."""
        return _rank(self.parts)

    def read(self) -> Factors:
        """The update as it is to be added to the weight of its shape."""
        read = {part: read_tensor(info, name).float() for part, (name, info) in self.parts.items()}
        if self.is_embedding:
            return Factors(read["embedding_A"].T, read["embedding_B"].T, self.scaling, None)
        return Factors(read["B.weight"], read["A.weight"], self.scaling, read.get(MAGNITUDE))


def adapter_parts(folder: Path) -> tuple[dict[str, dict[str, Place]], dict[str, Place]] | None:
    """The parts of an adapter's products by layer, and its other tensors; None when it holds parts of other kinds."""
    halves: dict[str, dict[str, Place]] = {}
    others: dict[str, Place] = {}
    for name, info in read_headers([folder / ADAPTER_WEIGHTS]).items():
        layer, is_part, part = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        if is_part:
            halves.setdefault(layer, {})[part] = (name, info)
        elif not any(part in name for part in COPIES):
            others[layer.replace(".base_layer.", ".")] = (name, info)
    kinds = (LINEAR, LINEAR | {MAGNITUDE}, EMBEDDING)
    return (halves, others) if all(parts.keys() in kinds for parts in halves.values()) else None


def scaling_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732); an alpha of the layer's own in ``alpha_pattern``."""
    alpha = own_value(config.get("alpha_pattern"), layer, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def product_of(config: Mapping[str, Any], layer: str, parts: Mapping[str, Place]) -> Product:
    """The product whose parts an adapter with this configuration holds for a layer."""
    return Product(layer, parts, scaling_of(config, layer, _rank(parts)))


def _rank(parts: Mapping[str, Place]) -> int:
    return parts["embedding_A" if parts.keys() == EMBEDDING else "A.weight"][1].shape[0]
