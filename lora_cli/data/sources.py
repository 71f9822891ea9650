"""Files, folders, globs and hub ids -> rows that know their file and line."""

from __future__ import annotations

import csv
import glob
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_cli.errors import Fault, UserError, is_pointer, mend, nearest
from lora_cli.recipe.schema import Source

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
UNREAD_DATA = {".ndjson", ".tsv", ".arrow", ".feather", ".orc", ".avro", ".xlsx", ".gz", ".bz2", ".xz", ".zst", ".zip"}
"""Types of files that hold rows, and are not left out of a folder without a word."""


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


def kind_of(value: Any) -> str:
    """What a value of a row is, in a user's words."""
    words = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else words.get(type(value), type(value).__name__)


def check_sources(sources: Iterable[Source]) -> list[Fault]:
    """The paths that name nothing, and keys that say nothing of theirs, without reading a row."""
    faults: list[Fault] = []
    for source in sources:
        try:
            files = _files(source.path)
        except UserError as error:
            faults.extend(error.faults)
            continue
        if files is None:
            continue
        told = f"is for a hub id, and this is a {_kind_of_path(source.path)}"
        if source.split != "train":
            hint = "give the path of the split's own files"
            faults.append(Fault(f"split: {source.split} {told}", source.path, hint))
        if source.streaming:
            hint = "leave it out: rows are read one by one in any case"
            faults.append(Fault(f"streaming {told}", source.path, hint))
    return faults


def read_rows(sources: Iterable[Source]) -> Iterator[Row | Fault]:
    """Every row of every source in order; a record that cannot be read comes as the fault to report.

    Raises UserError when a path names nothing, or a file cannot be opened at all.
    """
    for index, source in enumerate(sources):
        files = _files(source.path)
        read = 0
        if files is None:
            for row in hub_rows(source.path, source.split, source.streaming):
                yield Row(row.columns, row.where, index)
                read += 1
        else:
            for file in files:
                if is_pointer(file):
                    raise UserError("not the file itself", str(file), mend(file))
                for item in READERS[file.suffix.lower()](file):
                    yield item if isinstance(item, Fault) else Row(item[1], item[0], index)
                    read += 1
        if not read:
            yield Fault("holds no rows", where=source.path, hint="every source must have at least one row")


def whole_rows(sources: Iterable[Source]) -> Iterator[Row]:
    """Every row of every source in order. Raises UserError at the first record that cannot be read."""
    for item in read_rows(sources):
        if isinstance(item, Fault):
            raise UserError([item])
        yield item


def places(sources: Sequence[Source], rows: Collection[tuple[int, int]]) -> list[str]:
    """Where rows stand, each given by its source and its place in it, counted from 0: the files are read once more.

    Of a file that is not what it was, the row's number.
    """
    found = {(at, number): f"{sources[at].path} (row {number + 1})" for at, number in rows}
    for at in {at for at, _ in rows}:
        wanted = {number for other, number in rows if other == at}
        with suppress(UserError):
            if _files(sources[at].path) is None:
                found |= {
                    (at, number): _hub_place(sources[at].path, sources[at].split, number + 1) for number in wanted
                }
                continue
            read = islice(whole_rows([sources[at]]), max(wanted) + 1)
            found |= {(at, number): row.where for number, row in enumerate(read) if number in wanted}
    return [found[row] for row in rows]


def _files(path: str) -> list[Path] | None:
    """The data files that a path stands for, sorted; None for a hub id. Raises UserError when there is none."""
    here = Path(path)
    if here.is_file():
        if here.suffix.lower() not in READERS:
            hint = f"types read: {', '.join(READERS)}"
            raise UserError(f"cannot read files of type '{here.suffix or here.name}'", path, hint)
        return [here]
    if here.is_dir():
        return _readable([here / name for name in glob.glob("**", root_dir=here, recursive=True)], path)  # noqa: PTH207 (Path.rglob follows no link, before Python 3.13)
    if glob.has_magic(path):
        return _readable([Path(name) for name in glob.glob(path, recursive=True)], path)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if HUB_ID.fullmatch(path) and here.suffix.lower() not in READERS and not here.parent.exists():
        return None
    siblings = [f.name for f in here.parent.iterdir() if f.suffix.lower() in READERS] if here.parent.is_dir() else []
    hint = nearest(here.name, siblings) or f"paths are relative to {Path.cwd()}"
    raise UserError("no such data file", path, hint)


def _readable(found: list[Path], path: str) -> list[Path]:
    """The data files among these, sorted, each under one of its names. Raises UserError when there is none, or when
    others look to hold rows too."""
    files = sorted(each for each in found if each.is_file())
    unread = [each for each in files if each.suffix.lower() in UNREAD_DATA]
    if unread:
        more = f" and {len(unread) - 1:,} more" if len(unread) > 1 else ""
        hint = f"types read: {', '.join(READERS)}; convert it, or name the others by a glob such as *.jsonl"
        raise UserError(f"cannot read {unread[0]}{more}", path, hint)
    readable = {each.resolve(): each for each in reversed(files) if each.suffix.lower() in READERS}
    if not readable:
        what = "the folder holds no data file" if Path(path).is_dir() else "no data file matches"
        raise UserError(what, path, f"types read: {', '.join(READERS)}")
    return sorted(readable.values())


def _kind_of_path(path: str) -> str:
    return "file" if Path(path).is_file() else "folder" if Path(path).is_dir() else "glob"


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from error


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"not UTF-8: byte 0x{raw[error.start]:02x}", f"{path}:{line}", "save it as UTF-8") from error


def _lines(path: Path, newline: str | None) -> Iterator[str]:
    """A file's lines, one at a time; ``newline`` as ``open`` takes it. Raises UserError at one that is not UTF-8."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    what = f"not UTF-8: byte 0x{raw[error.start]:02x}"
                    raise UserError(what, f"{path}:{number}", "save it as UTF-8") from error
                yield from io.StringIO(line, newline=newline)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from error


Record = tuple[str, dict[str, Any]]


def _jsonl(path: Path) -> Iterator[Record | Fault]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    yield Fault(f"not UTF-8: byte 0x{raw[error.start]:02x}", where, "save the file as UTF-8")
                    continue
                if line.strip():
                    yield _json_object(line, where)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", str(path)) from error


def _json_object(text: str, where: str) -> Record | Fault:
    try:
        value = json.loads(text, object_pairs_hook=keys_once)
    except json.JSONDecodeError as error:
        return Fault(f"not valid JSON: {error.msg} (column {error.colno})", where, "one JSON object a line")
    except (ValueError, RecursionError) as error:
        return Fault(f"not valid JSON: {error}", where, "one JSON object a line")
    if not isinstance(value, dict):
        return Fault(f"expected a JSON object, found {kind_of(value)}", where, "one JSON object a line")
    return where, value


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that stands there twice, of which JSON would keep the last alone."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"named twice: {', '.join(_repeated([name for name, _ in pairs]))}")
    return found


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _check_named_once(columns: Sequence[str], where: str) -> None:
    """Raises UserError for a table's column that stands there twice."""
    if repeated := _repeated(columns):
        raise UserError(f"column named twice: {', '.join(repeated)}", where, "give each its own name")


def _json(path: Path) -> Iterator[Record | Fault]:
    text = _decode(_read_bytes(path), path)
    try:
        value = json.loads(text, object_pairs_hook=keys_once) if text.strip() else []
    except json.JSONDecodeError as error:
        what, place = f"not valid JSON: {error.msg} (column {error.colno})", f"{path}:{error.lineno}"
        raise UserError(what, place, "a .json file is one list of objects, a .jsonl file an object a line") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", str(path)) from error
    if not isinstance(value, list):
        raise UserError(f"expected a list of objects, found {kind_of(value)}", str(path), "[{...}, {...}]")
    for number, item in enumerate(value, 1):
        where = f"{path} (row {number})"
        if isinstance(item, dict):
            yield where, item
        else:
            yield Fault(f"expected an object, found {kind_of(item)}", where, "a .json file is one list of objects")


def _csv(path: Path) -> Iterator[Record | Fault]:
    csv.field_size_limit(sys.maxsize)  # a cell may hold a whole text; the library stops at 128 KiB
    reader = csv.reader(_lines(path, newline=""), strict=True)
    header: list[str] | None = None
    line = 1  # where a record begins: a cell may hold line breaks
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                _check_separator(header, where)
                _check_named_once(header, where)
            elif len(cells) != len(header):
                yield Fault(f"{len(cells)} cells under {len(header)} columns", where, f"columns: {', '.join(header)}")
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        hint = "a cell with quotes, commas or line breaks stands in quotes, and quotes in it are doubled"
        raise UserError(f"not valid CSV: {error}", f"{path}:{line}", hint) from error


def _check_separator(header: list[str], where: str) -> None:
    """Raises UserError for a header of one column that holds what other programs put between columns."""
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and mark in header[0]:
            what = f"one column, named {header[0]!r}: these look to be columns set apart by {name}"
            raise UserError(what, where, "save the file with commas between columns")


def _parquet(path: Path) -> Iterator[Record | Fault]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_named_once(file.schema_arrow.names, str(path))
            for batch in file.iter_batches():
                for columns in batch.to_pylist():
                    number += 1
                    yield f"{path} (row {number})", _without_filling(columns)
    # OverflowError, ValueError, KeyError: a date or a time zone that Python has none for.
    except (pa.ArrowException, OSError, OverflowError, ValueError, KeyError) as error:
        what = f"not a readable Parquet file: {str(error).splitlines()[0]}"
        raise UserError(what, str(path), "copy or write it again") from error


def _without_filling(columns: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the nulls that Arrow puts into objects for the keys that others in their column have: a chat
    template would write them into a tool's call."""

    def cleared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleared(inner) for key, inner in value.items() if inner is not None}
        return [cleared(inner) for inner in value] if isinstance(value, list) else value

    return {name: cleared(value) for name, value in columns.items()}


def _text(path: Path) -> Iterator[Record | Fault]:
    """A row for each paragraph: lines between blank ones, joined as they stand."""
    lines: list[str] = []
    number = 0
    for number, line in enumerate(_lines(path, newline=None), 1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield _paragraph(path, number, lines)
            lines = []
    if lines:
        yield _paragraph(path, number + 1, lines)


def _paragraph(path: Path, after: int, lines: list[str]) -> Record:
    return f"{path}:{after - len(lines)}", {"text": "".join(lines).removesuffix("\n")}


READERS: dict[str, Callable[[Path], Iterator[Record | Fault]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}


def _hub_place(name: str, split: str, number: int) -> str:
    return f"{name}[{split}] (row {number})"


def hub_rows(name: str, split: str, streaming: bool = False) -> Iterator[Row]:
    """The rows of a split of a data set on the hub (or in its local cache), through ``datasets``; from a memory-mapped
    copy of it or, ``streaming``, as they come.

    Raises UserError when it cannot be loaded: offline and not cached, no such data set, no such split.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split=split, streaming=streaming)
        for number, columns in enumerate(rows, 1):
            yield Row(_without_filling(columns), _hub_place(name, split, number))
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        what = f"the data set could not be loaded from the hub: {str(error).splitlines()[0]}"
        raise UserError(what, name, "give a path that exists, or a hub id that can be reached from here") from error
