"""Large tensors worked on in pieces, by threads that stay, in memory that stays."""

from __future__ import annotations

import ctypes
import functools
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and numbers of malloc.h
KEPT, LARGEST = 2**30, 2**25  # bytes; glibc takes no larger LARGEST


@functools.cache
def workers() -> ThreadPoolExecutor:
    """As many threads as torch has, each to work on a piece with one thread of its own.

    Not all of them on each part of each operation: on a busy machine these would wait for one another.
    """
    return ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))


def keep_freed_memory() -> None:
    """Let a tensor's memory serve the next one, for the rest of the process; only glibc can.

    Given back to the system and asked for again it would come page by page, each cleared first: a sixth of the time
    that a merge takes.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST)
