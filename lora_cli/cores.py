"""How many of the CPU's cores this process may use, and how its threads wait for each other."""

from __future__ import annotations

import math
import os
from pathlib import Path

SPINS = "1000"
"""Turns of the loop in which GNU's OpenMP library waits for work before a thread sleeps; its own default is 300,000."""


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


def limit_spinning() -> None:
    """Let OpenMP's idle threads sleep soon, unless the environment says how they wait; call it before torch is loaded.

    By default they spin for milliseconds after each operation. Where other processes need the same cores, threads with
    work then wait for those that spin: beside four busy processes on two cores, a run took four times as long.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS
