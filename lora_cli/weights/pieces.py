"""Large tensors worked on in pieces, by threads that stay."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch


@functools.cache
def workers() -> ThreadPoolExecutor:
    """As many threads as torch has, each to work on a piece with one thread of its own.

    Not all of them on each part of each operation: on a busy machine these would wait for one another.
    """
    return ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
