"""Folders and files that survive a crash of the machine once they are written, and those of neighbouring runs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
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


def in_neighbours(cache: Path, pattern: str) -> Iterator[Path]:
    """Yield the files and folders of this user that match ``pattern`` in the caches of all runs of this user in the
    folder where the run with this ``cache`` is. They may be removed at any time."""
    for folder in sorted(cache.parent.parent.glob(f"*/{cache.name}")):
        with suppress(FileNotFoundError):  # the other run removes it meanwhile
            for path in sorted(folder.glob(pattern)):
                # No other user's: anybody can write to /tmp, and a link's owner may point it elsewhere at any time.
                if all(each.lstat().st_uid == os.getuid() for each in (folder.parent, folder, path)):
                    yield path


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
