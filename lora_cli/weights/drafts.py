"""Folders that are written beside the place they are for: none stays behind, however its process ended."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def draft_folder(out: Path) -> Iterator[Path]:
    """A new folder beside ``out``, whose parent exists; what is left of it goes when the block ends.

    What processes that were killed have left of the same ``out`` goes as well. A process holds a lock on its own draft,
    which the system takes back when it ends.
    """
    _sweep(out)
    draft, lock = _make(out)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def _make(out: Path) -> tuple[Path, int]:
    """A draft and the lock on it."""
    while True:
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".draft", dir=out.parent))
        with suppress(FileNotFoundError):  # swept by another process before it was locked
            lock = os.open(draft, os.O_RDONLY)
            with suppress(OSError):  # where there are no locks, nothing is swept
                fcntl.flock(lock, fcntl.LOCK_EX)
            if draft.exists():
                return draft, lock
            os.close(lock)


def _sweep(out: Path) -> None:
    own = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}\.draft")
    with suppress(OSError):  # a folder that may not be listed is no reason to stop
        for draft in [path for path in out.parent.iterdir() if own.fullmatch(path.name)]:
            remove_unlocked(draft)


def remove_unlocked(draft: Path) -> None:
    """Remove a draft, unless a process is writing it or it is somebody else's."""
    with suppress(OSError):
        lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(draft, ignore_errors=True)
        finally:
            os.close(lock)
