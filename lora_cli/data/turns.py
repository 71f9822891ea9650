"""Parsing of a row's chat columns: the turns, with their tool calls, and the available tools.

``formats.py`` chooses these columns; ``chat.py`` renders the conversation through the tokenizer's template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_cli.data.readers import dict_without_duplicates, kind_of
from lora_cli.errors import UserError

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
"""ShareGPT's names, with LLaMA-Factory's two for the calls of tools, as JSON text, and for what a tool answers."""
LONE_SURROGATE = "holds half a character (a lone surrogate, written \\ud800 to \\udfff)"
LONE_SURROGATE_HINT = "write the character itself, or both its halves"
ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking")
"""Keys of an assistant's turn with its reasoning, as the templates of Qwen3 and gpt-oss take it."""
READ = ("tool_calls", *REASONING)
"""Keys of an assistant's turn that are read besides its text."""
BEYOND_TEXT = ("function_call", "reasoning", *READ)
"""Keys of a turn with content beyond its text."""
WEIGHTS = ("weight", "train", "training")
"""Keys that say whether a turn is to be learned."""
ANSWERED = ("name", "tool_call_id")
"""Keys of a tool's turn that identify the call it answers."""
TOOLS_HINT = "a list of JSON schemas, as Transformers' chat templates take them, or its JSON text; or remove the column"
TURNS_HINT = "each turn is {role, content} or {from, value}"
CALLS_HINT = "each call is {type: function, function: {name, arguments}}, with arguments an object or its JSON text"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. ``extra`` holds what the template receives besides role and content: an assistant's
    ``tool_calls`` and reasoning, or the call that a tool's turn answers. An assistant's turn that is not ``learned`` is
    context."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    learned: bool = True

    @property
    def called(self) -> list[str]:
        """The names of the tools that the turn calls."""
        return [(call.get("function") or call)["name"] for call in self.extra.get("tool_calls", ())]

    @property
    def has_reasoning(self) -> bool:
        """Whether the turn has reasoning apart from its text."""
        return not self.extra.keys().isdisjoint(REASONING)

    def with_reasoning(self, text: str) -> Message:
        """The turn with ``text`` in place of its reasoning."""
        return replace(self, extra={**self.extra, **{key: text for key in REASONING if key in self.extra}})

    def with_text_arguments(self) -> Message:
        """The turn with the arguments of its tool calls as JSON text."""
        calls = [_with_text_arguments(call) for call in self.extra.get("tool_calls", ())]
        return replace(self, extra={**self.extra, "tool_calls": calls}) if calls else self


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if call.get("function"):
        return call | {"function": _with_text_arguments(call["function"])}
    return call | {"arguments": json.dumps(call["arguments"], ensure_ascii=False)}


@dataclass(frozen=True)
class Conversation:
    """Turns in order, and the JSON schemas of the tools."""

    turns: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """The turns as Transformers' ``apply_chat_template`` takes them."""
        return [{"role": turn.role, "content": turn.content, **turn.extra} for turn in self.turns]

    def before(self, index: int) -> Conversation:
        """The conversation up to turn ``index`` (exclusive)."""
        return replace(self, turns=self.turns[:index])

    def with_text_arguments(self) -> Conversation:
        """The conversation with the arguments of its tool calls as JSON text."""
        return replace(self, turns=tuple(turn.with_text_arguments() for turn in self.turns))

    def with_typed_tools(self) -> Conversation:
        """The conversation with each tool that is a function's schema alone as {type: function, function}."""
        tools = (tool if "function" in tool else {"type": "function", "function": tool} for tool in self.tools)
        return replace(self, tools=tuple(tools))

    def with_turn(self, index: int, turn: Message) -> Conversation:
        """The conversation with ``turn`` in place of turn ``index``."""
        return replace(self, turns=(*self.turns[:index], turn, *self.turns[index + 1 :]))


def read_turns(value: Any, where: str) -> tuple[Message, ...]:
    """The turns of a list of {role, content} or {from, value}, or of such a list as JSON text, as in a CSV file's cell.
    An assistant's turn may also have reasoning and tool_calls; with tool_calls it needs no text.

    Raises UserError, with the turn's place.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _from_json(value, where, TURNS_HINT)
    if not isinstance(value, list) or not value:
        raise UserError("expected a list of turns", where, TURNS_HINT)
    turns = []
    for number, turn in enumerate(value):
        place = f"{where}[{number}]"
        if not isinstance(turn, dict):
            raise UserError(f"expected a turn, found {kind_of(turn)}", place, TURNS_HINT)
        sharegpt = "from" in turn
        role, content = (turn.get("from"), turn.get("value")) if sharegpt else (turn.get("role"), turn.get("content"))
        if sharegpt and role == "function_call":
            calls = _from_json(content, place, CALLS_HINT) if isinstance(content, str) else content
            if not calls:
                raise UserError("the turn calls no tool", place, CALLS_HINT)
            turn, content = turn | {"tool_calls": calls if isinstance(calls, list) else [calls]}, None
        role = SHAREGPT_ROLES.get(str(role), role) if sharegpt else role
        if role not in ROLES:
            hint = f"roles: {', '.join(ROLES)} (ShareGPT: {', '.join(SHAREGPT_ROLES)})"
            raise UserError(f"unknown role {role!r}", place, hint)
        _check_unread(turn, role, place)
        extra = _extra(turn, role, place)
        if content is None and not extra.get("tool_calls"):
            words = "value" if sharegpt else "content"
            what = f"'{words}' is null" if words in turn else f"there is no '{words}', but {', '.join(map(str, turn))}"
            raise UserError(f"the turn has no text: {what}", place, TURNS_HINT)
        content = "" if content is None else _text(content, place)
        turns.append(Message(role, content, extra, role != "assistant" or _is_learned(turn, place)))
    return tuple(turns)


def _text(content: Any, place: str) -> str:
    """A turn's text, given as text or as a list of {type: text, text}. Raises UserError for anything else."""
    if isinstance(content, list):
        content = "".join(_text_of_part(part, place) for part in content)
    if not isinstance(content, str):
        hint = "expected text, or a list of {type: text, text}"
        raise UserError(f"the turn's text is {kind_of(content)}", place, hint)
    if has_lone_surrogate(content):
        raise UserError(f"the turn's text {LONE_SURROGATE}", place, LONE_SURROGATE_HINT)
    return content


def _text_of_part(part: Any, place: str) -> str:
    hint = "each is {type: text, text}: only text is read"
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise UserError(f"a part of the turn is {kind_of(part) if kind is None else f'of type {kind!r}'}", place, hint)
    if not isinstance(text := part.get("text"), str):
        found = "null or missing" if text is None else kind_of(text)
        raise UserError(f"the text of a part of the turn is {found}", place, hint)
    return text


def _check_unread(turn: Mapping[str, Any], role: str, place: str) -> None:
    """Raises UserError when the turn has content beyond its text that would be lost."""
    read = READ if role == "assistant" else ()
    unread = next((key for key in BEYOND_TEXT if turn.get(key) and key not in read), None)
    if unread is not None:
        hint = f"write it into the turn's text in the model's own syntax, and remove {unread}"
        raise UserError(f"the turn has {unread}, but only its text is read", place, hint)


def _is_learned(turn: Mapping[str, Any], place: str) -> bool:
    """Whether the turn is to be learned. Raises UserError for weights other than 0 and 1, or that disagree."""
    given = {key: turn[key] for key in WEIGHTS if turn.get(key) is not None}
    if odd := next((key for key, weight in given.items() if weight not in (0, 1)), None):
        raise UserError(f"the turn has {odd} {given[odd]!r}", place, "write 1 (true) to learn it, 0 (false) not to")
    if len(set(given.values())) > 1:
        raise UserError(f"{' and '.join(given)} contradict each other", place, "keep one of them")
    return all(given.values())


def _extra(turn: Mapping[str, Any], role: str, place: str) -> dict[str, Any]:
    """What the template receives of a turn besides its role and text."""
    if role == "tool":
        extra = {key: turn[key] for key in ANSWERED if turn.get(key)}
        _check_json(extra, place)
        return extra
    extra = {key: _text(turn[key], f"{place}.{key}") for key in REASONING if turn.get(key)}
    calls = turn.get("tool_calls")
    return extra | ({"tool_calls": _read_calls(calls, f"{place}.tool_calls")} if calls else {})


def _read_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls, with their arguments as objects: many templates would quote arguments in text form a second time.

    Raises UserError, with the call's place.
    """
    if not isinstance(value, list):
        raise UserError(f"expected a list of calls, found {kind_of(value)}", where, CALLS_HINT)
    calls = []
    for number, call in enumerate(value):
        place = f"{where}[{number}]"
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name") or None, str):
            raise UserError("the call has no function name", place, CALLS_HINT)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _from_json(arguments, place, CALLS_HINT) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            raise UserError(f"the call's arguments are {kind_of(arguments)}, expected an object", place, CALLS_HINT)
        _check_json([call, arguments], place)
        function = function | {"arguments": arguments}
        calls.append(call | {"function": function} if call.get("function") else function)
    return calls


def read_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """The tools of a list of JSON schemas or of such a list as JSON text. Null, blank text or an empty list mean none.

    Raises UserError, with the place.
    """
    if isinstance(value, str):
        value = _from_json(value, where, TOOLS_HINT) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise UserError(f"expected a list of tools, found {kind_of(value)}", where, TOOLS_HINT)
    for number, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise UserError(f"expected a tool's JSON schema, found {kind_of(tool)}", f"{where}[{number}]", TOOLS_HINT)
    _check_json(value, where)
    return tuple(value)


def _from_json(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=dict_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {error}", where, hint) from error


def _check_json(value: Any, where: str) -> None:
    """Raises UserError for a value that JSON (a date, bytes) or UTF-8 (a lone surrogate) cannot represent."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be written as JSON: {error}", where) from error
    if has_lone_surrogate(text):
        raise UserError(LONE_SURROGATE, where, LONE_SURROGATE_HINT)


def has_lone_surrogate(text: str) -> bool:
    """Whether the text holds a lone surrogate, which JSON can escape but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
