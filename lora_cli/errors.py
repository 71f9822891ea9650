"""The errors a user sees: what is wrong, where, what to do about it, and the exit code that goes with it."""

from __future__ import annotations

import difflib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

_LONGEST = 700  # characters of a fault's parts; three of them are half a screen
_ALIKE = 5  # faults of one kind that are told
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    ``where`` is a place the user can open (``medical.yaml:14:3``, ``train.jsonl:381``), ``hint`` what to do, in a
    line or several. Each may quote what stands in somebody's file: what a terminal would not show is told escaped, and
    what is endless is cut.
    """

    what: str
    where: str | None = None
    hint: str | tuple[str, ...] | None = None

    def __str__(self) -> str:
        place = f"{_shown(self.where)}: " if self.where else ""
        hint = (self.hint,) if isinstance(self.hint, str) else self.hint or ()
        return "\n    ".join([f"{place}{_shown(self.what)}", *map(_shown, hint)])


def _shown(text: str) -> str:
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return short if short.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in short)


class LoraError(Exception):
    """A failure with a message for the user; every fault that was found is told at once."""

    exit_code = 1

    def __init__(
        self, what: str | Iterable[Fault], where: str | None = None, hint: str | tuple[str, ...] | None = None
    ) -> None:
        self.faults = (Fault(what, where, hint),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class UserError(LoraError):
    """The input was wrong: recipe, data, model, adapter or options. Exit code 2."""

    exit_code = 2


def alike(faults: Sequence[Fault], hint: str) -> UserError:
    """What to raise for faults of one kind that share a ``hint``: the first few, and how many more there are."""
    *first, last = faults[:_ALIKE]
    more = f"{len(faults) - _ALIKE} more like these: " if len(faults) > _ALIKE else ""
    return UserError([*first, replace(last, hint=more + hint)])


class RunError(LoraError):
    """The run failed and kept what it had. Exit code 3."""

    exit_code = 3


class Aftermath(RunError):
    """What came over this process because another one of the run failed, which tells the cause. Exit code 3."""


class CheckError(LoraError):
    """What was made is not what it should be, by a check that was asked for. Exit code 4."""

    exit_code = 4


class Interrupted(LoraError):
    """The run was stopped by a signal, with a checkpoint written once it has taken a step. Exit code 128 + the signal's
    number."""

    def __init__(self, what: str, signal_number: int, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.exit_code = 128 + signal_number


def is_lack_of_room(error: Exception) -> bool:
    """Whether the system has no room for what was to be written."""
    return isinstance(error, OSError) and error.errno in (*_FULL, errno.EFBIG)


def unwritable(path: Path, error: Exception, needed: int | None = None) -> RunError:
    """What to raise when ``error`` came while ``path`` was written, which takes ``needed`` bytes."""
    reason = getattr(error, "strerror", None) or str(error)
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    room = f"{free:,} bytes are free there" if needed is None else f"{needed:,} bytes are needed, {free:,} are free"
    if is_lack_of_room(error) and os.statvfs(folder).f_favail == 0:
        room += ", but no more files can be made"
    what = f"could not be written: {reason} ({room})"
    is_full = getattr(error, "errno", None) in _FULL or any(f"(os error {number})" in reason for number in _FULL)
    then = "free disk space and run the command again" if is_full else "run the command again when it can be written"
    return RunError(what, str(path), f"files that were complete are intact; {then}")


def unreadable(path: Path, error: Exception) -> RunError:
    """What to raise when ``error`` came while ``path``, which is there, was read."""
    reason = getattr(error, "strerror", None) or str(error)
    hint = "files that were complete are intact; try again: the cause may have passed"
    return RunError(f"could not be read: {reason}", str(path), hint)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises RunError when the system fails what the block reads of ``path``: its own error may not tell the file."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


_POINTER = b"version https://git-lfs.github.com/spec/"


def is_pointer(path: Path) -> bool:
    """Whether git-LFS has left its pointer to a file here, not the file."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def mend(path: Path) -> str:
    """What to do about a file that cannot be read as what it should be."""
    if is_pointer(path):
        return "this is a git-LFS pointer, not the file: 'git lfs pull' fetches it"
    return "copy or download it again"


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number of things in words: what there is ``one`` of, or ``many`` (left out: its plural in s)."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the nearest known name, or None when none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the nearest known name, or all of them when none is near."""
    known = sorted(known)
    return nearest(name, known) or (f"known: {', '.join(known)}" if known else None)
