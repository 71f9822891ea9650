"""Elapsed time and token rate."""

from __future__ import annotations

import time

from lora_cli.data.batches import Step


class Clock:
    """Seconds and real (non-padding) tokens since the process's first step; the rate leaves out evaluations."""

    def __init__(self) -> None:
        self.began = self._mark = time.perf_counter()
        self._tokens = 0
        self._steps = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def count(self, step: Step) -> None:
        """Add a step and its real tokens."""
        self._steps += 1
        self._tokens += step.tokens

    def seconds_for(self, steps: int) -> float:
        """Return how long ``steps`` steps take at the average pace so far."""
        return self.seconds / max(self._steps, 1) * steps

    def leave_out(self, seconds: float) -> None:
        """Do not count this time in the next rate."""
        self._mark += seconds

    def rate(self) -> float:
        """Real tokens a second since the last call."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._mark, 1e-9)
        self._mark, self._tokens = now, 0
        return rate
