"""How many of the CPU's cores this process may use, and how its threads wait for each other."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

from lora_cli.system.control_groups import group_folders

SPINS = "1000"
"""Turns of the loop in which GNU's OpenMP library waits for work before a thread sleeps; its own default is 300,000."""


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores the process may run on, at most the CPU quota of its control groups.

    More threads than this wait for each other: they slow down a container with 2 of 64 cores many times. ``root`` is
    the folder that holds ``proc`` and ``sys``.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder, version in group_folders("cpu", root):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        with suppress(OSError, ValueError):  # no such folder or file, or "max"
            quota, period, *_ = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            if int(quota) > 0:
                cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def limit_spinning() -> None:
    """Let OpenMP's idle threads sleep soon, unless the environment says how they wait; call it before torch is loaded.

    By default they spin for milliseconds after each operation. Where other processes need the same cores, threads with
    work then wait for those that spin: beside four busy processes on two cores, a run took four times as long.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS
