"""Create output folders that appear complete or not at all, and check where they may be created.

A folder is written as a draft beside its destination. If its process is killed, a later one removes the draft.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from lora_cli.errors import RunError, UserError, unwritable
from lora_cli.system.disk import make_folder, sync

DRAFT = re.compile(r"\..+\.([a-z0-9_]{8}|old)\.draft(\.former)?")
"""Names of folders that are being written or removed. No other folders have such names."""
ASIDE = ".old.draft"
FORMER = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.draft\.former")
"""Names of folders that were moved aside to be replaced."""


@contextmanager
def atomic_folder(out: Path, replace: bool = False, needed: int | None = None) -> Iterator[Path]:
    """Yield a draft folder that becomes ``out`` when the block succeeds and is removed when the block raises.

    ``needed`` is the number of bytes to be written, if known. Raises UserError when ``out`` exists and is not an empty
    folder, or its parent cannot be written; RunError when writing fails. ``replace`` allows an existing ``out``, but
    requires its parent: the folder of a run that was removed meanwhile is not created again.
    """
    out = out.resolve()  # a link is followed, not replaced
    if not replace:
        check_out(out)
    with ExitStack() as stack:  # removes the draft last: errors report the free space while the draft exists
        try:
            if not replace:
                make_folder(out.parent)
            draft = stack.enter_context(draft_folder(out))
            mask = _umask()
            draft.chmod((draft.stat().st_mode & stat.S_ISGID) | (0o777 & ~mask))  # a shared folder's group stays
            yield draft
            for path in (*draft.rglob("*"), draft):
                if path.stat().st_mode & 0o777 == 0o600:  # safetensors lets only the owner read its files
                    path.chmod(0o666 & ~mask)
                sync(path)
            _put_in_place(draft, out, replace)
        except (OSError, SafetensorError) as error:
            if not replace and getattr(error, "errno", None) == errno.ENOTEMPTY:
                what = "another command made this folder in the meantime"
                raise RunError(what, str(out), "it is left as it is; remove it, or write to another folder") from error
            raise unwritable(out, error, needed) from error


def _put_in_place(draft: Path, out: Path, replace: bool) -> None:
    """Rename a complete draft to ``out``. A folder already there is removed with the draft, or put back on failure."""
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
            former.replace(draft)  # to be removed; clear_drafts never puts back a folder of this name


def entries(folder: Path) -> list[Path]:
    """Return the contents of a folder, empty when there is none. Unlike ``glob``, which would return nothing, raises
    OSError when the folder cannot be listed."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def mark_for_removal(folder: Path) -> None:
    """Hide a folder by renaming it, so that nobody sees it with a part of its files. It is removed with the drafts."""
    folder.replace(folder.with_name(f".{folder.name}{ASIDE}"))


def clear_drafts(folder: Path) -> None:
    """Remove the drafts that killed processes left in ``folder``, but no folder of another name and none still being
    written. A folder that was moved aside for a replacement that never came is put back first."""
    for path in entries(folder):
        name = FORMER.fullmatch(path.name)
        if name and not (folder / name[1]).exists():
            path.replace(folder / name[1])
    for path in folder.glob(".*"):
        if DRAFT.fullmatch(path.name):
            _remove_unlocked(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def current_place(out: Path) -> Path:
    """Return where the folder ``out`` lies: under another name if a process was killed while replacing it."""
    if not out.exists():
        with suppress(OSError):  # its parent cannot be listed
            for path in entries(out.parent):
                name = FORMER.fullmatch(path.name)
                if name and name[1] == out.name:
                    return path
    return out


def copy_if_there(folder: Path, *files: Path) -> None:
    """Copy the files that exist into a folder."""
    for file in filter(Path.is_file, files):
        shutil.copyfile(file, folder / file.name)


def check_out(out: Path, *made_from: Path | None) -> None:
    """Raises UserError when ``out`` cannot be created, is not empty, is the working directory, or lies in one of
    ``made_from``."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError("exists already", str(out), "choose another --out, or remove it first")
    if out.is_dir() and out.samefile("."):  # this process and its shell would stay in the replaced folder
        raise UserError("is the folder that the command is run in, which would be replaced", str(out), "name another")
    check_writable(out)
    for folder in filter(None, made_from):
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"is inside {folder}, from which it is made", str(out), "choose another --out")


def check_writable(folder: Path) -> None:
    """Raises UserError when ``folder`` could not be created or written. Creates nothing."""
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
    """Yield a new folder beside ``out``, whose parent exists. If still there, it is removed when the block ends.

    Drafts of the same ``out`` that killed processes left are removed first. A process holds a lock on its own draft,
    which the system releases when the process ends.
    """
    _sweep(out)
    draft, lock = _make(out)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def _make(out: Path) -> tuple[Path, int]:
    """Create a draft and lock it."""
    while True:
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".draft", dir=out.parent))
        with suppress(FileNotFoundError):  # removed by another process before it was locked
            lock = os.open(draft, os.O_RDONLY)
            with suppress(OSError):  # without file locks, drafts are not removed
                fcntl.flock(lock, fcntl.LOCK_EX)
            if draft.exists():
                return draft, lock
            os.close(lock)


def _sweep(out: Path) -> None:
    own = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}\.draft")
    with suppress(OSError):  # a folder that cannot be listed is no reason to stop
        for draft in [path for path in out.parent.iterdir() if own.fullmatch(path.name)]:
            _remove_unlocked(draft)


def _remove_unlocked(draft: Path) -> None:
    """Remove a draft, unless a process is writing it or it belongs to another user."""
    with suppress(OSError):
        lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if not draft.name.endswith(ASIDE):  # nobody writes these, and locks may not be supported
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(draft, ignore_errors=True)
        finally:
            os.close(lock)
