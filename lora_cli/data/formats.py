"""Row -> segments: the text of a row, and which parts of it are supervised.

A format is one function and one entry in FORMATS. Chat rows become a conversation, which ``chat.py`` renders with the
tokenizer's template.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from lora_cli.data.readers import kind_of
from lora_cli.data.sources import Row
from lora_cli.data.turns import (
    LONE_SURROGATE,
    LONE_SURROGATE_HINT,
    Conversation,
    Message,
    has_lone_surrogate,
    read_tools,
    read_turns,
)
from lora_cli.errors import UserError
from lora_cli.recipe.schema import Data

Segment = tuple[str, bool]
"""A piece of text, and whether it is supervised."""


Content = tuple[Segment, ...] | Conversation

ALIASES = {"prompt": ("prompt", "question"), "completion": ("completion", "answer")}
"""Columns that are looked up for a format's name when ``data.columns`` does not map it."""


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
