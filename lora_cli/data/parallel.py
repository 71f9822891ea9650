"""Apply a function to items in order: first in this process, then, if that takes long, in one process per core."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lora_cli.errors import RunError, UserError
from lora_cli.system.cores import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

SERIAL_SECONDS = 4.0
"""Seconds of work before other processes are started; starting them takes about as long."""
MAX_WORKERS = 12
"""Maximum number of processes: reading the items cannot keep more of them busy."""
_given: list[Callable[[Any], Any]] = []
"""The function, in a worker process. Sent with each item instead, its tokenizer would be most of the data sent."""


def in_order(work: Callable[[Item], Result], items: Iterator[Item]) -> Iterator[Result]:
    """Yield ``work(item)`` for each item, in order. ``work``, items and results must be picklable.

    Raises the first error in that order: any from ``work``, or a UserError from ``items``. Raises RunError when
    worker processes cannot be started, or one is killed.
    """
    spent = 0.0
    cores = usable_cores()
    for item in items:
        began = time.perf_counter()
        result = work(item)
        spent += time.perf_counter() - began
        yield result
        if spent >= SERIAL_SECONDS and cores > 1:
            break
    yield from _in_processes(work, items, min(cores, MAX_WORKERS))


def _in_processes(work: Callable[[Item], Result], items: Iterator[Item], count: int) -> Iterator[Result]:
    item = next(items, None)
    if item is None:
        return
    try:
        # Not forked: a copy of a process whose libraries run threads may hang.
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (work,))
    except OSError as error:
        what = f"the processes that tokenize rows could not be started: {error.strerror}"
        hint = "they need a writable /dev/shm; or give the command one core (taskset -c 0), and it starts none"
        raise RunError(what, hint=hint) from error
    waiting: deque[Future[Result]] = deque()
    failed: UserError | None = None
    try:
        while item is not None or waiting:
            if item is not None:
                waiting.append(pool.submit(_take, item))
                try:
                    item = next(items, None)
                except UserError as error:  # raised below, unless an earlier item fails
                    item, failed = None, error
            while waiting and (item is None or len(waiting) > 2 * count):
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        what = "a process that tokenized rows was killed, perhaps for lack of memory"
        raise RunError(what, hint="give the command fewer cores (taskset), and it starts fewer processes") from error
    finally:
        pool.shutdown(cancel_futures=True)
    if failed is not None:
        raise failed


def _begin(work: Callable[[Any], Any]) -> None:
    """Set up a worker process: keep ``work``, use one core, leave Ctrl-C to the parent, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _given.append(work)


def _take(item: Any) -> Any:
    return _given[0](item)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
