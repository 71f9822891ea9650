"""What is written, made to survive a crash of the machine."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

_WITHOUT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def make_folder(folder: Path, parents: bool = True) -> None:
    """Make a folder, unless it is there, with its ``parents``; each new name survives a crash.

    Raises OSError when it cannot be made, or would be in a folder that is not there.
    """
    if folder.is_dir():
        return
    if parents:
        make_folder(folder.absolute().parent)
    folder.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a parent that may be written, but not read
        sync(folder.absolute().parent)


def reserve(handle: int, start: int, size: int) -> None:
    """Have the disk keep room for these bytes of what is open, where the system can (macOS cannot). Raises OSError when
    there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, start, size)


def sync(path: Path) -> None:
    """Make a file's or folder's content survive a crash."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync_open(handle)
    finally:
        os.close(handle)


def sync_open(handle: int) -> None:
    """Make the content of what is open survive a crash, where the file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _WITHOUT_SYNC:
            raise
