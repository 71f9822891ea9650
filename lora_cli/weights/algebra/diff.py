"""Compare two LoRA adapters layer by layer from their factors, without forming the updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lora_cli.weights.adapter.products import Factors
from lora_cli.weights.algebra.lora_adapter import LoraAdapter, check_plain, check_same_base
from lora_cli.weights.algebra.spectrum import Spectrum, spectrum_of


@dataclass(frozen=True)
class LayerDiff:
    """Two updates s BA of a layer: their Frobenius norms, their cosine similarity, and the overlap of their column
    spaces (out) and row spaces (in). Cosine and overlaps are None where an update is zero."""

    name: str
    norms: tuple[float, float]
    cosine: float | None
    overlap_out: float | None
    overlap_in: float | None


@dataclass(frozen=True)
class Diff:
    """Two adapters: the cosine over all layers, the layers that both have, and the layers that only one has."""

    cosine: float | None
    layers: tuple[LayerDiff, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def diff(first: LoraAdapter, second: LoraAdapter) -> Diff:
    """Compare two adapters. Raises UserError when they have different bases, are not plain LoRA, or are the same."""
    check_plain(first)
    check_plain(second)
    check_same_base([first, second])
    layers, together = [], 0.0
    squares = [_squared_norm(first), _squared_norm(second)]
    for name in sorted(first.products.keys() & second.products.keys()):
        a, b = first.products[name].read(), second.products[name].read()
        product = _inner(a, b)
        together += product
        layers.append(_layer(name, product, spectrum_of(a), spectrum_of(b)))
    return Diff(
        _cosine(together, squares[0], squares[1]),
        tuple(layers),
        tuple(sorted(first.products.keys() - second.products.keys())),
        tuple(sorted(second.products.keys() - first.products.keys())),
    )


def _inner(a: Factors, b: Factors) -> float:
    """Return the Frobenius inner product of two updates: <U1 D1, U2 D2> = <U1^T U2, D1 D2^T>, both r1 x r2."""
    left = a.up.double().T @ b.up.double()
    right = a.down.double() @ b.down.double().T
    return a.scaling * b.scaling * float((left * right).sum())


def _layer(name: str, product: float, a: Spectrum, b: Spectrum) -> LayerDiff:
    squares = [float(each.s.square().sum()) for each in (a, b)]
    return LayerDiff(
        name,
        (math.sqrt(squares[0]), math.sqrt(squares[1])),
        _cosine(product, *squares),
        _overlap(a.u[:, : a.rank], b.u[:, : b.rank]),
        _overlap(a.v[: a.rank].T, b.v[: b.rank].T),
    )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Return the overlap of two orthonormal bases' spans, 0 to 1: |A^T B|^2 / min(r1, r2) (arXiv:2106.09685, eq. 4)."""
    fewer = min(a.shape[1], b.shape[1])
    return float((a.T @ b).square().sum()) / fewer if fewer else None


def _squared_norm(adapter: LoraAdapter) -> float:
    return sum(_inner(factors, factors) for factors in (product.read() for product in adapter.products.values()))


def _cosine(product: float, first: float, second: float) -> float | None:
    return max(-1.0, min(1.0, product / math.sqrt(first * second))) if first > 0 and second > 0 else None
