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

_LONGEST = 700  # characters shown of each part of a fault; three such parts fill half a screen
_ALIKE = 5  # faults of one kind that are reported
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    ``where`` is a place the user can open (``medical.yaml:14:3``, ``train.jsonl:381``), ``hint`` says what to do, in
    one or more lines. Each may quote a user's file, so ``str`` escapes unprintable characters and cuts long texts.
    """

    what: str
    where: str | None = None
    hint: str | tuple[str, ...] | None = None

    def __str__(self) -> str:
        place = f"{_shown(self.where)}: " if self.where else ""
        hint = (self.hint,) if isinstance(self.hint, str) else self.hint or ()
        return "\n    ".join([f"{place}{_shown(self.what)}", *map(_shown, hint)])


def _shown(text: str) -> str:
    return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ...")


def printable(text: str) -> str:
    """Return ``text`` with its unprintable characters escaped, with which somebody's file could control a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return ``text`` of several lines with its unprintable characters escaped, except the ends of lines."""
    return "\n".join(map(printable, text.split("\n")))


class LoraError(Exception):
    """A failure with a message for the user, which lists every fault that was found."""

    exit_code = 1

    def __init__(
        self, what: str | Iterable[Fault], where: str | None = None, hint: str | tuple[str, ...] | None = None
    ) -> None:
        self.faults = (Fault(what, where, hint),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class UserError(LoraError):
    """The input was wrong: recipe, data, model, adapter or options. Exit code 2."""

    exit_code = 2


def grouped_error(faults: Sequence[Fault], hint: str) -> UserError:
    """Return an error with the first few ``faults`` of one kind, the number of the others and their common ``hint``."""
    *first, last = faults[:_ALIKE]
    more = f"{len(faults) - _ALIKE} more like these: " if len(faults) > _ALIKE else ""
    return UserError([*first, replace(last, hint=more + hint)])


class RunError(LoraError):
    """The command failed while it ran; files that were complete are intact. Exit code 3."""

    exit_code = 3


class SecondaryError(RunError):
    """A failure in this process whose cause another process of the run reports. Exit code 3."""


class CheckError(LoraError):
    """A check of the command's result failed. Exit code 4."""

    exit_code = 4


class Interrupted(LoraError):
    """A signal stopped the run; a checkpoint exists if it had taken a step. Exit code 128 + the signal's number."""

    def __init__(self, what: str, signal_number: int, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_out_of_space(error: Exception) -> bool:
    """Whether a write failed for lack of room: the disk or quota is full, or the file is too large."""
    return isinstance(error, OSError) and error.errno in (*_FULL, errno.EFBIG)


def is_refused_thread(error: Exception) -> bool:
    """Whether the system refused this process another thread."""
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def unwritable(path: Path, error: Exception, needed: int | None = None) -> RunError:
    """Return the RunError for an ``error`` while writing ``path``, which takes ``needed`` bytes (None: unknown)."""
    reason = getattr(error, "strerror", None) or str(error)
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    room = f"{free:,} bytes are free there" if needed is None else f"{needed:,} bytes are needed, {free:,} are free"
    if is_out_of_space(error) and os.statvfs(folder).f_favail == 0:
        room += ", but no more files can be made"
    what = f"could not be written: {reason} ({room})"
    is_full = getattr(error, "errno", None) in _FULL or any(f"(os error {number})" in reason for number in _FULL)
    then = "free disk space and run the command again" if is_full else "run the command again when it can be written"
    return RunError(what, str(path), f"files that were complete are intact; {then}")


def unreadable(path: Path, error: Exception) -> RunError:
    """Return the RunError for an ``error`` while reading ``path``, which exists."""
    reason = getattr(error, "strerror", None) or str(error)
    hint = "files that were complete are intact; try again: the cause may have passed"
    return RunError(f"could not be read: {reason}", str(path), hint)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into a RunError that names ``path``: the OSError may not name the file."""
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


@contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError in the block, which writes ``needed`` bytes (None: unknown), into a RunError that names
    ``path``."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error, needed) from error


_POINTER = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(path: Path) -> bool:
    """Whether ``path`` holds a git-LFS pointer instead of the file itself."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def repair_hint(path: Path) -> str:
    """Return a hint on what to do about a file with invalid content."""
    if is_lfs_pointer(path):
        return "this is a git-LFS pointer, not the file: 'git lfs pull' fetches it"
    return "copy or download it again"


def pluralize(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: ``one`` in the singular, ``many`` in the plural (default: ``one`` with an s)."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def first_few(items: Sequence[str], most: int) -> str:
    """Return the first ``most`` items, with commas between them, and the number of the others if there are any."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def format_range(values: Sequence[float]) -> str:
    """Return the lowest and the highest value as text, one value if they are equal, or an empty text for none."""
    return "-".join(dict.fromkeys(f"{value:g}" for value in (min(values), max(values)))) if values else ""


def nearest_hint(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the nearest known name, or None when none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the nearest known name, or all of them when none is near."""
    known = sorted(known)
    return nearest_hint(name, known) or (f"known: {', '.join(known)}" if known else None)
