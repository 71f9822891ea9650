"""Folders that appear whole or not at all, and where they may be made.

They are written beside the place they are for: no draft stays behind, however its process ended.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lora_cli.disk import make_folder, sync
from lora_cli.errors import UserError, unwritable

DRAFT = re.compile(r"\..+\.([a-z0-9_]{8}|old)\.draft(\.former)?")
"""Names that are given to folders on their way in or out, and to no others."""
ASIDE = ".old.draft"
FORMER = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.draft\.former")
"""Names of folders whose place another is about to take."""


@contextmanager
def whole_folder(out: Path, replace: bool = False, needed: int | None = None) -> Iterator[Path]:
    """A folder to write into that becomes ``out`` when the block ends well, and vanishes when it does not.

    ``needed`` are the bytes that will be written, as far as they are known. Raises UserError when ``out`` exists and is
    not an empty folder, or its parent cannot be written; RunError when writing fails. To ``replace`` one, its parent
    has to be there: a run's folder that was taken away is not made again.
    """
    out = out.resolve()  # a link is followed, not replaced
    if not replace:
        check_out(out)
    with ExitStack() as stack:  # removes the draft last: a full disk is told as it was with it
        try:
            if not replace:
                make_folder(out.parent)
            draft = stack.enter_context(draft_folder(out))
            mask = _umask()
            draft.chmod(0o777 & ~mask)
            yield draft
            for path in (*draft.rglob("*"), draft):
                if path.stat().st_mode & 0o777 == 0o600:  # by safetensors, which lets nobody else read its files
                    path.chmod(0o666 & ~mask)
                sync(path)
            _put_in_place(draft, out, replace)
        except (OSError, SafetensorError) as error:
            raise unwritable(out, error, needed) from error


def _put_in_place(draft: Path, out: Path, replace: bool) -> None:
    """Give a whole draft its name. What stood there goes with the draft, or is put back when that cannot be done."""
    former = draft.with_name(f"{draft.name}.former")
    try:
        if replace and out.exists():
            out.replace(former)
        draft.replace(out)
        sync(out.parent)
    finally:
        if former.exists() and not out.exists():
            former.replace(out)
        elif former.exists() and not draft.exists():
            former.replace(draft)  # to be removed under a name by which no part of it is ever put back


def entries(folder: Path) -> list[Path]:
    """What lies in a folder; nothing when there is none. Raises OSError when it cannot be listed, which ``glob`` takes
    for empty."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def set_aside(folder: Path) -> None:
    """Take a folder out of sight at once, to be removed with the drafts: it is never seen with a part of its files."""
    folder.replace(folder.with_name(f".{folder.name}{ASIDE}"))


def clear_drafts(folder: Path) -> None:
    """Remove the folders in ``folder`` that a killed process was writing or removing; nothing of other names, and none
    that is being written. What the process had moved out of the way of what never came is put back."""
    for path in entries(folder):
        name = FORMER.fullmatch(path.name)
        if name and not (folder / name[1]).exists():
            path.replace(folder / name[1])
    for path in folder.glob(".*"):
        if DRAFT.fullmatch(path.name):
            _remove_unlocked(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def standing(out: Path) -> Path:
    """Where the folder ``out`` lies: elsewhere when a process was killed as it put another in its place."""
    if not out.exists():
        with suppress(OSError):  # not a folder that can be listed
            for path in entries(out.parent):
                name = FORMER.fullmatch(path.name)
                if name and name[1] == out.name:
                    return path
    return out


def copy_if_there(folder: Path, *files: Path) -> None:
    """Copy those of the files that are there into a folder."""
    for file in filter(Path.is_file, files):
        shutil.copyfile(file, folder / file.name)


def check_out(out: Path, *made_from: Path) -> None:
    """Raises UserError when a folder cannot be made at ``out``, holds something already, is the working directory, or
    lies in one of ``made_from``."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError("exists already", str(out), "choose another --out, or remove it first")
    if out.is_dir() and out.samefile("."):  # a shell there, and this process, would be left in the folder replaced
        raise UserError("is the folder that the command is run in, which would be replaced", str(out), "name another")
    check_writable(out)
    for folder in made_from:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"is inside {folder}, from which it is made", str(out), "choose another --out")


def check_writable(folder: Path) -> None:
    """Raises UserError when ``folder`` could not be made or written; makes nothing."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
    if not nearest.exists():
        raise UserError(f"{nearest} is a broken symbolic link", str(folder), "choose another folder")
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file, not a folder", str(folder), "choose another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write in {nearest}", str(folder), "choose another folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
            _remove_unlocked(draft)


def _remove_unlocked(draft: Path) -> None:
    """Remove a draft, unless a process is writing it or it is somebody else's."""
    with suppress(OSError):
        lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if not draft.name.endswith(ASIDE):  # which nobody writes; there may be no locks here
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(draft, ignore_errors=True)
        finally:
            os.close(lock)
