"""The options of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The options of ``scripts/bench/run``, shared by all benchmarks."""

    shape: str
    rounds: int
    steps: int
    threads: int
    dtype: str
    gpu: bool
    quick: bool
    only: tuple[str, ...]
    lengths: tuple[int, ...]
    out: Path | None
