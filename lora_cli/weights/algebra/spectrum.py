"""The singular values of an update, and which share of it the largest hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from lora_cli.weights.adapter.products import Factors

COLUMNS = 4096
"""Columns of a matrix that are held in float64 at a time."""
NOISE = 1e-6
"""Relative to the largest singular value: smaller ones are rounding errors of float32 factors."""


@dataclass(frozen=True)
class Spectrum:
    """The SVD U diag(s) V of a (rows, columns) matrix: ``u`` (rows, k), ``s`` (k,) descending, ``v`` (k, columns)."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor

    @property
    def rank(self) -> int:
        """The number of singular values above rounding errors."""
        return int((self.s > NOISE * self.s[:1]).sum())

    def energy(self, rank: int) -> float:
        """Return the share of the squared Frobenius norm that the first ``rank`` values hold; 1 for a zero matrix."""
        squares = self.s.square()
        total = float(squares.sum())
        return float(squares[:rank].sum()) / total if total else 1.0

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that holds this share, at least 1 and at most ``self.rank``."""
        largest = max(1, self.rank)
        return next((rank for rank in range(1, largest) if self.energy(rank) >= energy), largest)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors (rows, rank) and (rank, columns) of the nearest product in float32, each scaled by the
        square roots of the singular values."""
        roots = self.s[:rank].sqrt()
        return (self.u[:, :rank] * roots).float(), (roots[:, None] * self.v[:rank]).float()


def spectrum_of(factors: Factors) -> Spectrum:
    """Compute the SVD of s UD in float64 without forming s UD: QR of U and D^T, then the SVD of the small core."""
    left, upper = torch.linalg.qr(factors.up.double())
    right, lower = torch.linalg.qr(factors.down.double().T)
    u, s, v = torch.linalg.svd(factors.scaling * upper @ lower.T, full_matrices=False)
    return Spectrum(left @ u, s, v @ right.T)


def spectrum_of_matrix(matrix: torch.Tensor) -> Spectrum:
    """Compute the SVD of a float32 matrix from the eigenvalues of its smaller Gram matrix in float64, whose rounding
    errors are below float32's. If the matrix is not square, this takes a third of the SVD's time or less."""
    if matrix.shape[0] > matrix.shape[1]:
        transposed = spectrum_of_matrix(matrix.T)
        return Spectrum(transposed.v.T, transposed.s, transposed.u.T)
    gram = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
    for part in torch.split(matrix, COLUMNS, dim=1):
        gram += part.double() @ part.double().T
    squares, vectors = torch.linalg.eigh(gram)
    u = vectors.flip(1).to(matrix.dtype)
    return Spectrum(u, squares.flip(0).clamp(min=0).sqrt(), normalize(u.T @ matrix, dim=1))
