"""Limits on a chat template's CPU time and memory, so that one row cannot take hours or exhaust the machine."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

MAX_CPU_SECONDS = 1.0
MAX_EXTRA_BYTES = 1 << 28


@contextmanager
def resource_limits() -> Iterator[None]:
    """In the block, raise TimeoutError after MAX_CPU_SECONDS of CPU time, and MemoryError above MAX_EXTRA_BYTES of
    additional memory.

    Enter it in the main thread: the timer uses a signal.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MAX_EXTRA_BYTES
    former = signal.signal(signal.SIGVTALRM, _stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
        # The timer repeats, because Jinja swallows the first error.
        signal.setitimer(signal.ITIMER_VIRTUAL, MAX_CPU_SECONDS, MAX_CPU_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, former)


def _stop(signal_number: int, frame: FrameType | None) -> None:
    raise TimeoutError
