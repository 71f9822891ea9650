"""Allow one run at a time in a folder: the system releases the lock when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import RunError, UserError
from lora_cli.system.disk import make_folder

WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of a file system that does not support locks."""


@dataclass(frozen=True)
class FolderLock:
    """The open folder of a run in progress; ``locked`` is whether a lock keeps other runs out."""

    folder: Path
    handle: int
    locked: bool

    def check(self) -> None:
        """Raises RunError when the folder is no longer found under its name: anything written there would go into
        another run's folder, or create an incomplete one."""
        try:
            if os.path.samestat(self.folder.stat(), os.fstat(self.handle)):
                return
            what = "another folder is now in the place of the run's"
        except (FileNotFoundError, NotADirectoryError):
            what = "the run's folder is no longer there"
        raise RunError(f"{what}; nothing more was written", str(self.folder), self._way_back())

    def _way_back(self) -> str:
        place = ""
        with suppress(OSError):  # /proc exists on Linux only
            place = str(Path(f"/proc/self/fd/{self.handle}").readlink())
        if place.endswith(" (deleted)"):
            return "it was removed with all its checkpoints: start a new run"
        lies = f"what the run has written is now in {place}: " if place else ""
        return f"{lies}move it back, or set training.output_dir to it; --resume then continues from its last checkpoint"


@contextmanager
def locked(folder: Path) -> Iterator[FolderLock]:
    """Hold a lock on the folder, which is created if missing, while the block runs.

    A folder created here is removed again if it is left empty, except when the lock is refused: by then it may belong
    to the other process. Raises UserError while another process holds the lock.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)  # the folder itself is locked: no file to leave behind
    try:
        try:
            keeps_out = _lock(folder, handle)
        except UserError:
            made.clear()
            raise
        yield FolderLock(folder, handle, keeps_out)
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()
        os.close(handle)


def _lock(folder: Path, handle: int) -> bool:
    """Take the lock, and return whether the file system supports locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        hint = "wait until it ends, or choose another training.output_dir"
        raise UserError("another run is using this folder", str(folder), hint) from error
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        return False
    return True


def check_unlocked(folder: Path) -> None:
    """Raises UserError while another process holds the folder; writes nothing."""
    if folder.is_dir():
        with locked(folder):
            pass
