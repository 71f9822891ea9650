"""Bounds on what somebody else's template may take, so that one row costs no hours and not the machine's memory."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

SECONDS = 1.0
BYTES = 1 << 28


@contextmanager
def bounded() -> Iterator[None]:
    """In the block, TimeoutError comes after SECONDS of computing, MemoryError for more than BYTES above what is used.

    To be entered from the main thread: the clock is a signal's.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + BYTES
    former = signal.signal(signal.SIGVTALRM, _stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, SECONDS)  # again and again: Jinja swallows what comes first
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, former)


def _stop(signal_number: int, frame: FrameType | None) -> None:
    raise TimeoutError
