"""What a launcher (torchrun, Accelerate) has told this process about the run's processes, before they meet."""

from __future__ import annotations

import os


def process_index() -> int:
    """Which process of the run this is: 0 is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes the run has, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_here() -> bool:
    """Whether this is the first of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
