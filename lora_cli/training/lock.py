"""One run at a time in a folder: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_cli.errors import UserError


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the folder, made if need be, as long as the block lasts; ``shared`` with others who do so as well.

    One that was made, and in which nothing was left, is removed again. Raises UserError while another process holds it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself is locked: no file to leave behind
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "wait until it ends, or choose another training.output_dir"
            raise UserError("another run is at work in this folder", str(folder), hint) from error
        try:
            yield
        finally:
            for path in made:
                with suppress(OSError):
                    path.rmdir()
    finally:
        os.close(handle)


def check_unlocked(folder: Path) -> None:
    """Raises UserError while another process holds the folder; writes nothing."""
    if folder.is_dir():
        with locked(folder, shared=True):  # the processes of one run may ask at the same instant
            pass
