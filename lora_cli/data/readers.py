"""Data files -> records: JSON Lines, JSON, CSV, TSV, Parquet, text."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_cli.errors import Fault, UserError, first_line, pluralize


def kind_of(value: Any) -> str:
    """The type of a row's value, as named in messages to users."""
    words = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else words.get(type(value), type(value).__name__)


GZIP = ".gz"
Record = tuple[str, dict[str, Any]]
"""A record's place and its columns."""


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield a file's lines and their places, without a byte order mark; those of a .gz file are decompressed. Raises
    UserError when it cannot be read."""
    try:
        with gzip.open(path) if path.suffix.lower() == GZIP else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield f"{path}:{number}", raw.removeprefix(BOM_UTF8) if number == 1 else raw
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"cannot be read: {reason}", str(path)) from error


def _decoded(path: Path, newline: str | None) -> Iterator[str]:
    """Yield a file's lines as text; ``newline`` is that of ``open``. Raises UserError at a line that is not UTF-8."""
    for where, raw in _lines(path):
        try:
            yield from io.StringIO(raw.decode(), newline=newline)
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8: byte 0x{raw[error.start]:02x}", where, "save it as UTF-8") from error


def _jsonl(path: Path) -> Iterator[Record | Fault]:
    for where, raw in _lines(path):
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            yield Fault(f"not UTF-8: byte 0x{raw[error.start]:02x}", where, "save the file as UTF-8")
            continue
        if line.strip():
            yield _json_object(line, where)


def _json_object(text: str, where: str) -> Record | Fault:
    try:
        value = json.loads(text, object_pairs_hook=dict_without_duplicates)
    except json.JSONDecodeError as error:
        return Fault(f"not valid JSON: {error.msg} (column {error.colno})", where, "write one JSON object per line")
    except (ValueError, RecursionError) as error:
        return Fault(f"not valid JSON: {error}", where, "write one JSON object per line")
    if not isinstance(value, dict):
        return Fault(f"expected a JSON object, found {kind_of(value)}", where, "write one JSON object per line")
    return where, value


def dict_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict. Raises ValueError for a duplicate key, of which ``json`` would keep only the last value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"duplicate key: {', '.join(_repeated([name for name, _ in pairs]))}")
    return found


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _check_named_once(columns: Sequence[str], where: str) -> None:
    """Raises UserError when a table has two columns of the same name."""
    if repeated := _repeated(columns):
        raise UserError(f"duplicate column: {', '.join(repeated)}", where, "give each column its own name")


def _json(path: Path) -> Iterator[Record | Fault]:
    text = "".join(_decoded(path, newline=""))
    try:
        value = json.loads(text, object_pairs_hook=dict_without_duplicates) if text.strip() else []
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


def _csv(path: Path, delimiter: str = ",") -> Iterator[Record | Fault]:
    csv.field_size_limit(sys.maxsize)  # a cell may hold a whole text; the default limit is 128 KiB
    reader = csv.reader(_decoded(path, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1  # where a record begins: a cell may hold line breaks
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                _check_delimiter(header, where, delimiter)
                _check_named_once(header, where)
            elif len(cells) != len(header):
                message = f"{pluralize(len(cells), 'cell')} for {pluralize(len(header), 'column')}"
                yield Fault(message, where, f"columns: {', '.join(header)}")
            else:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        hint = "put a cell with quotes, commas or line breaks in quotes, and double the quotes in it"
        raise UserError(f"not valid CSV: {error}", f"{path}:{line}", hint) from error


def _check_delimiter(header: list[str], where: str, delimiter: str) -> None:
    """Raises UserError when the header is a single column that contains a common delimiter."""
    names = {";": "semicolons", "|": "bars", "\t": "tabs", ",": "commas"}
    for mark, name in names.items():
        if len(header) == 1 and mark in header[0]:
            what = f"one column, named {header[0]!r}: its columns seem to be separated by {name}"
            raise UserError(what, where, f"save the file with {names[delimiter]} between columns")


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
                    yield f"{path} (row {number})", without_arrow_nulls(columns)
    # OverflowError, ValueError, KeyError: a date or a time zone that Python cannot represent.
    except (pa.ArrowException, OSError, OverflowError, ValueError, KeyError) as error:
        what = f"not a readable Parquet file: {first_line(error)}"
        raise UserError(what, str(path), "copy or write it again") from error


def without_arrow_nulls(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The row without the nulls that Arrow adds to objects for keys that only other objects in the column have. A chat
    template would write them into a tool call."""

    def cleared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleared(inner) for key, inner in value.items() if inner is not None}
        return [cleared(inner) for inner in value] if isinstance(value, list) else value

    return {name: cleared(value) for name, value in columns.items()}


def _text(path: Path) -> Iterator[Record | Fault]:
    """Yield a row for each paragraph: the lines between blank lines, joined unchanged."""
    lines: list[str] = []
    number = 0
    for number, line in enumerate(_decoded(path, newline=None), 1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield _paragraph(path, number, lines)
            lines = []
    if lines:
        yield _paragraph(path, number + 1, lines)


def _paragraph(path: Path, after: int, lines: list[str]) -> Record:
    return f"{path}:{after - len(lines)}", {"text": "".join(lines).removesuffix("\n")}


def file_type(path: Path) -> str:
    """The lower-case suffix by which a reader is chosen: '.jsonl', or '.jsonl.gz' for a compressed file."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix == GZIP else suffix


READERS: dict[str, Callable[[Path], Iterator[Record | Fault]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
    ".txt": _text,
}
READERS |= {f"{kind}{GZIP}": read for kind, read in READERS.items() if read is not _parquet}
