"""What is wrong with a recipe's data section and its rows, found without tokenizing them."""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable

from lora_cli.data.formats import FORMATS, Columns, detect_format, read_content
from lora_cli.data.sources import Row, read_rows, source_faults, sources_of
from lora_cli.errors import Fault, UserError, did_you_mean
from lora_cli.recipe.schema import Data, Source, Template

MAX_FAULTS = 10


def data_faults(data: Data, unread: set[str], every_column: bool = False) -> list[Fault]:
    """Return every fault in the data section and its rows. With ``every_column``, a name in ``data.columns`` that no
    row has is also a fault. Columns that are not read are added to ``unread``."""
    faults = (pattern_faults(data.template) if data.template else []) or column_faults(data)
    seen: set[str] = set()
    for spec in (data.train, data.own_validation):
        if spec is not None:
            sources = sources_of(spec)
            faults += source_faults(sources) or ([] if faults else row_faults(data, sources, seen, unread))
    return faults or (unseen_faults(data, seen) if every_column else [])


def pattern_faults(patterns: Template) -> list[Fault]:
    """The faults of the patterns themselves: unclosed braces, and fields that are not plain column names."""
    faults = []
    for key, pattern in (("prompt", patterns.prompt), ("completion", patterns.completion)):
        where = f"data.template.{key}"
        try:
            pieces = list(string.Formatter().parse(pattern))
        except ValueError as error:
            faults.append(Fault(str(error), where, "write {{ and }} for literal braces"))
            continue
        for _, name, spec, conversion in pieces:
            if name is not None and (not name or spec or conversion or any(c in name for c in ".[]")):
                field = f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
                faults.append(Fault(f"'{{{field}}}' is no column", where, "write {column}, with nothing else in it"))
    return faults


def column_faults(data: Data) -> list[Fault]:
    """The names in ``data.columns`` that the format does not use. Patterns must have no fault of their own."""
    if data.template is not None:
        patterns = data.template.prompt + data.template.completion
        known = {name for _, name, _, _ in string.Formatter().parse(patterns) if name}
        problem = "the patterns have no such field"
    else:
        wanted = FORMATS if data.format == "auto" else (data.format,)
        known = {name for format_name in wanted for name in FORMATS[format_name].names}
        is_auto = data.format == "auto"
        problem = "no format uses this name" if is_auto else f"format: {data.format} does not use this name"
    return [
        Fault(problem, f"data.columns.{name}", did_you_mean(name, known)) for name in data.columns if name not in known
    ]


def unseen_faults(data: Data, seen: Collection[str]) -> list[Fault]:
    """The columns in ``data.columns`` that no row has. An optional one would otherwise be ignored silently."""
    return [
        Fault(f"no row has a column '{column}'", f"data.columns.{name}", did_you_mean(column, seen))
        for name, column in data.columns.items()
        if column not in seen
    ]


def row_faults(data: Data, sources: Iterable[Source], seen: set[str], unread: set[str]) -> list[Fault]:
    """Read every row as training does, without tokenizing, and return up to ten faults by file and line. Add the names
    of all columns to ``seen``, and of columns that have content but are not read to ``unread``."""
    faults: list[Fault] = []
    formats: dict[int, str] = {}
    try:
        for item in read_rows(sources):
            if isinstance(item, Fault):
                faults.append(item)
            else:
                seen.update(map(str, item.columns))
                faults.extend(_faults_in(item, data, formats, unread))
            if len(faults) >= MAX_FAULTS:
                return [*faults[:MAX_FAULTS], Fault("only the first faults are shown; there may be more")]
    except UserError as error:
        faults.extend(error.faults)
    return faults


def _faults_in(row: Row, data: Data, formats: dict[int, str], unread: set[str]) -> Iterable[Fault]:
    """The faults of a row, read in the format of its source's first row."""
    try:
        if row.source not in formats:
            formats[row.source] = ""  # reported only once when no format matches
            formats[row.source] = detect_format(row, data)
        if format_name := formats[row.source]:
            columns = Columns(row, data)
            FORMATS[format_name].read(columns)
            unread.update(c for c in row.columns.keys() - columns.read - unread if row.columns[c])
    except UserError as error:
        return _mixed_format_faults(row, formats[row.source], data) or error.faults
    return ()


def _mixed_format_faults(row: Row, format_name: str, data: Data) -> list[Fault]:
    """The fault that the row has another format than its source's first row, if it has."""
    try:
        own = detect_format(row, data)
        read_content(row, own, data)
    except UserError:
        return []
    if own == format_name or not format_name:
        return []
    hint = "make each format a source of its own: data.train takes a list, and each source's first row decides"
    return [Fault(f"looks like {own}, but its source's first row is read as {format_name}", row.where, hint)]
