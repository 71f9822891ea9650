"""Folders and files that survive a crash of the machine once they are written."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

_WITHOUT_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def make_folder(folder: Path, parents: bool = True) -> None:
    """Create ``folder``, with its ``parents``, unless it exists. Each new name survives a crash.

    Raises OSError when it cannot be created or, without ``parents``, when its parent is missing.
    """
    if folder.is_dir():
        return
    if parents:
        make_folder(folder.absolute().parent)
    folder.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a parent with write but no read permission
        sync(folder.absolute().parent)


def preallocate(handle: int, start: int, size: int) -> None:
    """Reserve disk space for ``size`` bytes of an open file, from ``start``, if the system can (macOS cannot).

    Raises OSError when there is not enough space."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, start, size)


def sync(path: Path) -> None:
    """Make a file's or folder's content survive a crash, if its file system supports that."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _WITHOUT_SYNC:
            raise
    finally:
        os.close(handle)
