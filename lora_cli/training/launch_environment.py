"""What a launcher (torchrun, Accelerate) tells this process about the run's processes, before they connect."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl(2): the signal that a process gets when its parent dies."""


def end_with_launcher() -> None:
    """Ask Linux to kill this process when its launcher dies, however it dies.

    Otherwise processes that wait for each other would never end. Killing is safe: checkpoints are complete at any time.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def process_index() -> int:
    """Return this process's rank in the run. Rank 0 prints and writes the files."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes the run has, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_here() -> bool:
    """Whether this is the first of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
