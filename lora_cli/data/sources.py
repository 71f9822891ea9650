"""Files, folders, globs and hub ids -> rows that know their file and line."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_cli.data.readers import READERS, Record, file_type, without_arrow_nulls
from lora_cli.errors import Fault, UserError, first_few, is_lfs_pointer, nearest_hint, repair_hint
from lora_cli.recipe.schema import Source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
UNREAD_DATA = {".arrow", ".feather", ".orc", ".avro", ".xlsx", ".gz", ".bz2", ".xz", ".zst", ".zip"}
"""Data file types that are not supported. A folder that has one is refused, so that no data is skipped silently."""

TRAIN_SPLIT = re.compile(r"(?<![a-z])train(ing)?(?![a-z])", re.IGNORECASE)
HELD_OUT_SPLIT = re.compile(r"(?<![a-z])(val(id(ation)?)?|dev|test(ing)?|eval(uation)?)(?![a-z])", re.IGNORECASE)
"""How ``datasets`` recognizes the split of a file, from its name or that of a folder around it."""


@dataclass(frozen=True)
class Row:
    """One record: its columns as read, the place it came from, and the index of its source in the mixture."""

    columns: Mapping[str, Any]
    where: str
    source: int = 0


def sources_of(spec: str | tuple[str | Source, ...]) -> tuple[Source, ...]:
    """The parts of ``data.train`` or ``data.validation``, each with a path, a weight and a split."""
    parts = (spec,) if isinstance(spec, str) else spec
    return tuple(Source(path=part) if isinstance(part, str) else part for part in parts)


def source_faults(sources: Iterable[Source]) -> list[Fault]:
    """The faults of paths that name no data, and of keys that do not apply to their path. Reads no row."""
    faults: list[Fault] = []
    for source in sources:
        try:
            files = _files(source.path)
        except UserError as error:
            faults.extend(error.faults)
            continue
        if files is None:
            continue
        path = Path(source.path)
        kind = "file" if _is_file(path) else "folder" if path.is_dir() else "glob"
        misplaced = (
            (source.name is not None, f"name: {source.name}", "give the path of the configuration's own files"),
            (source.split != "train", f"split: {source.split}", "give the path of the split's own files"),
            (source.streaming, "streaming", "remove it: files are always read row by row"),
        )
        what = f"is for a hub id only, and this is a {kind}"
        faults += [Fault(f"{key} {what}", source.path, hint) for is_given, key, hint in misplaced if is_given]
    return faults


def read_rows(sources: Iterable[Source]) -> Iterator[Row | Fault]:
    """Yield every row of every source in order, and a Fault for a record that cannot be read or a source without rows.

    Raises UserError when a path names no data, or a file cannot be read further.
    """
    for index, source in enumerate(sources):
        read = 0
        for item in _records(source):
            yield item if isinstance(item, Fault) else Row(item[1], item[0], index)
            read += 1
        if not read:
            yield Fault("holds no rows", where=source.path, hint="every source must have at least one row")


def valid_rows(sources: Iterable[Source]) -> Iterator[Row]:
    """Yield every row of every source in order. Raises UserError at the first Fault of ``read_rows``."""
    for item in read_rows(sources):
        if isinstance(item, Fault):
            raise UserError([item])
        yield item


def row_places(sources: Sequence[Source], rows: Collection[tuple[int, int]]) -> list[str]:
    """The places of rows given as (source, index in it from 0). Reads the files again.

    For a row that can no longer be read, the place is the source's path and the row's number.
    """
    found = {(at, number): f"{sources[at].path} (row {number + 1})" for at, number in rows}
    for at in {at for at, _ in rows}:
        wanted = {number for other, number in rows if other == at}
        with suppress(UserError):
            if _files(sources[at].path) is None:
                found |= {(at, number): _hub_place(sources[at], number + 1) for number in wanted}
                continue
            read = islice(valid_rows([sources[at]]), max(wanted) + 1)
            found |= {(at, number): row.where for number, row in enumerate(read) if number in wanted}
    return [found[row] for row in rows]


def _records(source: Source) -> Iterator[Record | Fault]:
    files = _files(source.path)
    if files is None:
        yield from hub_records(source)
        return
    for file in files:
        if is_lfs_pointer(file):
            raise UserError("not the file itself", str(file), repair_hint(file))
        yield from READERS[file_type(file)](file)


def _files(path: str) -> list[Path] | None:
    """The data files that a path names, sorted; None for a hub id. Raises UserError when there is no data file."""
    here = Path(path)
    if _is_file(here):
        if file_type(here) not in READERS:
            hint = f"types read: {', '.join(READERS)}"
            raise UserError(f"cannot read files of type '{file_type(here) or here.name}'", path, hint)
        return [here]
    if here.is_dir():
        files = _readable([here / name for name in glob.glob("**", root_dir=here, recursive=True)], path)  # noqa: PTH207 (before Python 3.13, Path.rglob follows no link)
        _check_split(files, here)
        return files
    if glob.has_magic(path):
        return _readable([Path(name) for name in glob.glob(path, recursive=True)], path)  # noqa: PTH207 (Path.glob accepts no absolute pattern)
    if HUB_ID.fullmatch(path) and file_type(here) not in READERS and not here.parent.exists():
        return None
    if here.exists():
        raise UserError("not a file or a folder: rows are read more than once", path, "write the rows to a file")
    siblings = [f.name for f in here.parent.iterdir() if file_type(f) in READERS] if here.parent.is_dir() else []
    relative = None if here.is_absolute() else f"paths are relative to {Path.cwd()}"
    listed = f"in brackets it is a list: [{path}]" if "," in path else None
    hints = filter(None, (listed, nearest_hint(here.name, siblings) or relative))
    raise UserError("no such data file", path, tuple(hints))


def _readable(found: list[Path], path: str) -> list[Path]:
    """The data files in ``found``, sorted; a file with several names appears once. Raises UserError when there is none,
    or when there are data files of unsupported types."""
    files = sorted(filter(_is_file, found))
    unread = [each for each in files if each.suffix.lower() in UNREAD_DATA and file_type(each) not in READERS]
    if unread:
        hint = f"types read: {', '.join(READERS)}; convert it, or select the others with a glob such as *.jsonl"
        raise UserError(f"cannot read {first_few([*map(str, unread)], 1)}", path, hint)
    readable = {os.path.realpath(each): each for each in reversed(files) if file_type(each) in READERS}
    if not readable:
        what = "the folder holds no data file" if Path(path).is_dir() else "no data file matches"
        raise UserError(what, path, f"types read: {', '.join(READERS)}")
    return sorted(readable.values())


def _is_file(path: Path) -> bool:
    """Whether it is a file, or a broken link, which reading will report."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _check_split(files: Sequence[Path], folder: Path) -> None:
    """Raises UserError when the folder holds a data set's held-out split beside its training split. Text files may have
    any names: they are documents."""
    names = [str(file.relative_to(folder)) for file in files if file_type(file) not in (".txt", ".txt.gz")]
    trained = next((name for name in names if TRAIN_SPLIT.search(name)), None)
    held_out = next((name for name in names if HELD_OUT_SPLIT.search(name) and not TRAIN_SPLIT.search(name)), None)
    if trained and held_out:
        hint = "give the files of one split by a glob such as *train*, or its folder; or all files by a glob"
        raise UserError(f"holds several splits: {trained} and {held_out}", str(folder), hint)


def _hub_place(source: Source, number: int) -> str:
    return f"{source.path}[{part_of(source)}] (row {number})"


def part_of(source: Source) -> str:
    """The configuration, if one is named, and the split of a hub data set."""
    return source.split if source.name is None else f"{source.name}, {source.split}"


def hub_records(source: Source) -> Iterator[Record]:
    """Yield the records of a split of a data set on the hub or in its local cache, using ``datasets``: from a
    memory-mapped copy or, with ``streaming``, as they arrive.

    Raises UserError when it cannot be loaded: offline and not cached, no such data set, no such split.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(source.path, source.name, split=source.split, streaming=source.streaming)
        for number, columns in enumerate(rows, 1):
            yield _hub_place(source, number), without_arrow_nulls(columns)
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        message = " ".join(str(error).splitlines()[:2])
        what = f"the data set could not be loaded from the hub: {message}"
        hint = "give a path that exists, or a hub id that can be reached from here"
        if message.startswith("Config name is missing"):
            hint = f"choose one in data.train: [{{path: {source.path}, name: ...}}]"
        raise UserError(what, source.path, hint) from error
