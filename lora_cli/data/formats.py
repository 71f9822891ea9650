"""Row -> segments: the text of a row, and which parts of it are supervised.

A format is one function and one entry in FORMATS. Chat rows become a conversation, which ``chat.py`` renders with the
tokenizer's template.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from lora_cli.data.readers import kind_of
from lora_cli.data.sources import Row, read_rows
from lora_cli.data.turns import (
    LONE_SURROGATE,
    LONE_SURROGATE_HINT,
    Conversation,
    Message,
    has_lone_surrogate,
    read_tools,
    read_turns,
)
from lora_cli.errors import Fault, UserError, did_you_mean
from lora_cli.recipe.schema import Data, Source, Template

Segment = tuple[str, bool]
"""A piece of text, and whether it is supervised."""


Content = tuple[Segment, ...] | Conversation

ALIASES = {"prompt": ("prompt", "question"), "completion": ("completion", "answer")}
"""Columns that are looked up for a format's name when ``data.columns`` does not map it."""

MAX_FAULTS = 10


@dataclass(frozen=True)
class Columns:
    """Access to a row's columns by the names that a format uses. ``read`` collects the columns found so far."""

    row: Row
    data: Data
    read: set[str] = field(default_factory=set)

    def column(self, name: str) -> str | None:
        """The row's column for ``name``, or None when the row has none."""
        column = next((c for c in self._names(name) if c in self.row.columns), None)
        if column is not None:
            self.read.add(column)
        return column

    def _names(self, name: str) -> tuple[str, ...]:
        return (self.data.columns[name],) if name in self.data.columns else ALIASES.get(name, (name,))

    def value(self, name: str) -> Any:
        """The column's value. Raises UserError, with the row's place and columns, when it is missing or null."""
        column = self.column(name)
        if column is None:
            wanted = " or ".join(f"'{c}'" for c in self._names(name))
            raise UserError(f"no column {wanted}", self.row.where, self._seen())
        value = self.row.columns[column]
        if value is None:
            raise UserError(f"column '{column}' is null", self.row.where, self._seen())
        return value

    def optional(self, name: str) -> Any:
        """The column's value, or None when the column is missing.

        Raises UserError when ``data.columns`` maps ``name`` to a missing column, but the row has a column ``name``.
        """
        column = self.column(name)
        if column is None and name in self.row.columns:
            what = f"no column '{self.data.columns[name]}' (data.columns.{name}), but a column '{name}'"
            raise UserError(what, self.row.where, "use one name for the column in all rows")
        return None if column is None else self.row.columns[column]

    def text(self, name: str, default: str | None = None) -> str:
        """The column's text, or ``default``, if given, when the column is missing or null.

        Raises UserError when it is missing or null without a default, not text, or contains a lone surrogate.
        """
        if default is not None and self.optional(name) is None:
            return default
        value = self.value(name)
        if not isinstance(value, str):
            what = f"column '{self.column(name)}' holds {kind_of(value)}, expected text"
            raise UserError(what, self.row.where, self._seen())
        if has_lone_surrogate(value):
            raise UserError(f"column '{self.column(name)}' {LONE_SURROGATE}", self.row.where, LONE_SURROGATE_HINT)
        return value

    def _seen(self) -> str:
        return f"columns seen: {', '.join(map(str, self.row.columns)) or 'none'}; data.columns maps names to columns"


def text(row: Columns) -> Content:
    """Plain text, all of it supervised."""
    return ((row.text("text"), True),)


def prompt_completion(row: Columns) -> Content:
    """A prompt and a completion, joined without a separator."""
    _check_place(row, "prompt_completion")
    return ((row.text("prompt"), False), (row.text("completion"), True))


def alpaca(row: Columns) -> Content:
    """Stanford Alpaca's columns under its three headings; the input's is left out when the input is empty."""
    _check_place(row, "alpaca")
    extra = row.text("input", default="")
    middle = f"### Input:\n{extra}\n\n" if extra else ""
    prompt = f"### Instruction:\n{row.text('instruction')}\n\n{middle}### Response:\n"
    return ((prompt, False), (row.text("output"), True))


def _check_place(row: Columns, format_name: str) -> None:
    """Raises UserError when the row has a system prompt or history, which the format does not read."""
    unread = {"system", "history"} - set(row.data.columns.values()) - row.read
    if lost := next((name for name in sorted(unread) if row.row.columns.get(name)), None):
        hint = "give the rows as messages: each pair in it is a turn of the user and one of the assistant"
        if lost == "system":
            way = "set data.format: chat, which reads 'system', or use data.template with {system} in it"
            hint = f"{way}, or give the rows as messages"
        raise UserError(f"column '{lost}' is not empty, but format {format_name} does not read it", row.row.where, hint)


def chat(row: Columns) -> Content:
    """A conversation from one of four layouts: ``messages`` (role, content); ShareGPT's ``conversations`` (from,
    value); a prompt and a completion, each a text or a list of turns; Alpaca's columns. Of a prompt and a completion,
    only the completion is learned. Optional columns are ``system`` and ``tools``."""
    system = row.text("system", default="")
    for name in ("messages", "conversations"):
        if row.column(name) is not None:
            turns = read_turns(row.value(name), f"{row.row.where}: {row.column(name)}")
            break
    else:
        if row.column("completion") is None and row.column("instruction") is not None:
            turns = _alpaca_turns(row)
        else:
            turns = (*_side(row, "prompt", "user"), *_side(row, "completion", "assistant"))
    if system and turns[0].role != "system":
        turns = (Message("system", system), *turns)
    tools = read_tools(row.optional("tools"), f"{row.row.where}: {row.column('tools')}")
    return Conversation(turns, tools)


def _alpaca_turns(row: Columns) -> tuple[Message, ...]:
    _check_place(row, "chat")
    asked = [row.text("instruction"), row.text("input", default="")]
    return (Message("user", "\n".join(filter(None, asked))), Message("assistant", row.text("output")))


def _side(row: Columns, name: str, role: str) -> tuple[Message, ...]:
    value = row.value(name)
    if not isinstance(value, list):
        return (Message(role, row.text(name)),)
    turns = read_turns(value, f"{row.row.where}: {row.column(name)}")
    if name == "completion":
        return turns
    return tuple(replace(turn, learned=turn.role != "assistant") for turn in turns)


def _holds_turns(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, dict) for turn in value)


def template(row: Columns) -> Content:
    """The recipe's patterns, filled with the row's columns."""
    patterns = row.data.template
    assert patterns is not None, "the schema asks for data.template with this format"
    return ((_fill(patterns.prompt, row), False), (_fill(patterns.completion, row), True))


def _fill(pattern: str, row: Columns) -> str:
    # Not str.format: a pattern must not access attributes or items of a row's values.
    pieces = string.Formatter().parse(pattern)
    return "".join(literal + (row.text(name) if name else "") for literal, name, _, _ in pieces)


def _fields(pattern: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(pattern) if name}
    except ValueError:  # ``pattern_faults`` reports it
        return set()


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


@dataclass(frozen=True)
class Format:
    """A format: its reader and the names it uses. ``auto`` detects it by any one set of names in ``known_by``."""

    read: Callable[[Columns], Content]
    names: tuple[str, ...]
    known_by: tuple[tuple[str, ...], ...]


FORMATS: dict[str, Format] = {
    "chat": Format(
        chat,
        ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system", "tools"),
        (("messages",), ("conversations",)),
    ),
    "alpaca": Format(alpaca, ("instruction", "input", "output"), (("instruction", "output"),)),
    "prompt_completion": Format(prompt_completion, ("prompt", "completion"), (("prompt", "completion"),)),
    "text": Format(text, ("text",), (("text",),)),
    "template": Format(template, (), ()),  # the names are those in the patterns
}


def column_faults(data: Data) -> list[Fault]:
    """The names in ``data.columns`` that the format does not use."""
    if data.template is not None:
        known = {name for pattern in (data.template.prompt, data.template.completion) for name in _fields(pattern)}
        problem = "the patterns have no such field"
    else:
        wanted = FORMATS if data.format == "auto" else (data.format,)
        known = {name for format_name in wanted for name in FORMATS[format_name].names}
        is_auto = data.format == "auto"
        problem = "no format uses this name" if is_auto else f"format: {data.format} does not use this name"
    return [
        Fault(problem, f"data.columns.{name}", did_you_mean(name, known)) for name in data.columns if name not in known
    ]


def detect_format(row: Row, data: Data) -> str:
    """``data.format``, or for ``auto`` the format that matches the row's columns.

    Raises UserError, naming the columns, when none matches, or when it does not use a name in ``data.columns``.
    """
    if data.format != "auto":
        return data.format
    if data.template is not None:
        return "template"
    columns = Columns(row, data)
    fitting = [
        name
        for name, entry in FORMATS.items()
        if any(all(columns.column(c) is not None for c in names) for names in entry.known_by)
    ]
    if not fitting:
        raise _unknown(columns)
    mapped = {name for name, column in data.columns.items() if column in row.columns}
    found = max(fitting, key=lambda name: len(mapped.intersection(FORMATS[name].names)))
    if found == "prompt_completion" and any(_holds_turns(columns.optional(c)) for c in ("prompt", "completion")):
        found = "chat"
    unused = sorted(mapped.difference(FORMATS[found].names))
    if unused:
        what = f"read as {found}, which does not use data.columns.{unused[0]}"
        raise UserError(what, row.where, "remove it, or set data.format")
    return found


def _unknown(columns: Columns) -> UserError:
    """The error to raise for a row whose columns match no format."""
    row = columns.row
    seen = ", ".join(map(str, row.columns)) or "none"
    if {"chosen", "rejected"} <= row.columns.keys():
        what = f"preference rows, and lora does no preference training: {seen}"
        hint = f"to train on the chosen answers, set data.columns: {{{_name_of_chosen(columns)}: chosen}}"
        return UserError(what, row.where, hint)
    if "input_ids" in row.columns:
        return UserError(f"tokenized rows, and lora tokenizes rows itself: {seen}", row.where, "give their text")
    if "segments" in row.columns:
        hint = "write the texts before the first with label: true as prompt, and that one as completion"
        return UserError(f"axolotl's segments, which lora does not read: {seen}", row.where, hint)
    known = "; ".join(
        f"{name}: {' or '.join(' + '.join('/'.join(ALIASES.get(c, (c,))) for c in names) for names in entry.known_by)}"
        for name, entry in FORMATS.items()
        if entry.known_by
    )
    return UserError(f"no format has these columns: {seen}", row.where, f"{known}; or map yours in data.columns")


def _name_of_chosen(columns: Columns) -> str:
    """The name in ``data.columns`` for ``chosen``: completion beside a prompt of its type, else messages or text."""
    chosen = columns.row.columns["chosen"]
    if isinstance(columns.optional("prompt"), type(chosen)):
        return "completion"
    return "messages" if isinstance(chosen, list) else "text"


def read_content(row: Row, format_name: str, data: Data) -> Content:
    """The content of one row. Raises UserError with the row's place."""
    return FORMATS[format_name].read(Columns(row, data))


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
