"""How many of the CPU's cores this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many cores the process may run on, at most the CPU quota of its control group (version 2 or 1).

    More threads than this wait for each other: they slow down a container with 2 of 64 cores many times.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period, *_ = " ".join((groups / name).read_text() for name in files).split()
            if quota not in ("max", "-1"):
                cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
        except (OSError, ValueError):  # this version of control groups is not in use
            continue
    return cores
