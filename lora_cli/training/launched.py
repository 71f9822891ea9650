"""What a launcher (torchrun, Accelerate) has told this process about the run's processes, before they meet."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl(2): the signal that a process gets when its parent dies."""


def end_with_launcher() -> None:
    """Have the system kill this process when the launcher that started it dies, however it dies (Linux).

    Else nobody would be left to stop a run whose processes wait for each other; its checkpoints are whole at any time.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def process_index() -> int:
    """Which process of the run this is: 0 is the one that speaks and writes."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """How many processes the run has, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_here() -> bool:
    """Whether this is the first of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0
