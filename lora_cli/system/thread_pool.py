"""A thread pool for work on pieces of large tensors."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch


@functools.cache
def workers() -> ThreadPoolExecutor:
    """Return a pool of as many threads as torch has. Each works on its own piece, with one torch thread.

    Splitting each operation over all threads instead would make them wait for one another on a busy machine.
    """
    return ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
