"""Parse YAML text into values with their places in the text.

PyYAML scans and parses. Scalars follow YAML 1.2's core schema, unlike those of PyYAML's own constructors: here ``1e-4``
is a number, ``yes`` is text, ``010`` is ten and ``22:22`` is text.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import yaml

from lora_cli.errors import Fault, UserError

MAX_DEPTH = 32
MAX_VALUES = 20_000  # an alias counts as all values of its anchor, so that nested aliases cannot explode


@dataclass(frozen=True)
class Place:
    """Where something was written: a line and column of a file or, with line 0, the command line."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


class Faults:
    """The faults found so far, to be raised together."""

    def __init__(self) -> None:
        self._found: list[tuple[Place, Fault]] = []

    def __len__(self) -> int:
        return len(self._found)

    def add(self, place: Place, what: str, hint: str | None = None) -> None:
        self._found.append((place, Fault(what, str(place), hint)))

    def error(self) -> UserError:
        """Return an error with all faults in the order of reading: files line by line, then the command line."""
        return UserError(fault for _, fault in sorted(self._found, key=_reading_order))

    def raise_any(self) -> None:
        """Raise a UserError if anything was found."""
        if self._found:
            raise self.error()


def _reading_order(found: tuple[Place, Fault]) -> tuple[bool, str, int, int]:
    place = found[0]
    return (place.line == 0, place.file, place.line, place.column)


class Broken(enum.Enum):
    """Placeholder for a value that could not be read, whose fault is already recorded."""

    BROKEN = enum.auto()


BROKEN = Broken.BROKEN

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Node:
    """A value and its place; in a mapping also the place of its key. ``size`` counts the value and all values in it."""

    value: Scalar | Broken | dict[str, Node] | tuple[Node, ...]
    place: Place
    key: Place | None = None
    size: int = 1


def parse(text: str, locate: Callable[[int, int], Place], env: Mapping[str, str], faults: Faults) -> Node:
    """Parse the only document in ``text``. Values that cannot be read are BROKEN, with a fault added to ``faults``.

    ``locate`` makes a Place from a line and a column, both counted from 1. ``env`` holds the variables for ``${VAR}``.
    """
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = locate(before.count("\n") + 1, error.position - before.rfind("\n"))
        faults.add(place, f"the character U+{ord(text[error.position]):04X} is not allowed in YAML")
        return Node(BROKEN, place)
    try:
        return _Reader(loader, locate, env, faults).document()
    except _Stop:
        return Node(BROKEN, locate(1, 1))
    except yaml.MarkedYAMLError as error:
        mark, what, hint = _translate_error(error, text)
        place = locate(mark.line + 1, mark.column + 1) if mark else locate(1, 1)
        faults.add(place, what, hint)
    except (ValueError, OverflowError):  # PyYAML passes "\UFFFFFFFF" to chr and a huge %YAML version to int unchecked
        mark = loader.get_mark()
        place = locate(mark.line + 1, mark.column + 1)
        faults.add(place, "not valid YAML: a number that stands for no character or version")
    return Node(BROKEN, place)


class _Stop(Exception):
    """Reading cannot continue; the fault is already recorded."""


class _Reader:
    """Turns PyYAML's events into nodes and collects faults as long as reading can continue."""

    def __init__(
        self, loader: yaml.SafeLoader, locate: Callable[[int, int], Place], env: Mapping[str, str], faults: Faults
    ) -> None:
        self._events = iter(loader.get_event, None)
        self._locate = locate
        self._env = env
        self._faults = faults
        self._anchors: dict[str, Node | None] = {}  # None: the anchored value is still being read

    def document(self) -> Node:
        next(self._events)  # the stream's start
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return Node(None, self._locate(1, 1))
        root = self._node(next(self._events), 0)
        next(self._events)  # the document's end
        second = next(self._events)
        if not isinstance(second, yaml.StreamEndEvent):
            raise self._stop(second, "a second document begins here; a recipe is one document")
        return root

    def _node(self, event: yaml.Event, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
        if depth > MAX_DEPTH:
            raise self._stop(event, f"more than {MAX_DEPTH} levels deep")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        place = self._place(event)
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self._scalar(event, place), place)
        elif isinstance(event, yaml.SequenceStartEvent):
            items = tuple(self._node(item, depth + 1) for item in self._until(yaml.SequenceEndEvent))
            node = Node(items, place, size=1 + sum(item.size for item in items))
        else:
            entries = self._mapping(depth)
            node = Node(entries, place, size=1 + sum(entry.size for entry in entries.values()))
        if node.size > MAX_VALUES:
            raise self._stop(event, f"more than {MAX_VALUES:,} values, those that aliases repeat included")
        if event.tag is not None:
            hint = "a recipe holds plain values; quotes make text of a number"
            self._faults.add(place, f"tags such as {quoted(event.tag.replace(_YAML_TAG, '!!'))} are not allowed", hint)
            node = Node(BROKEN, place)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, event: yaml.AliasEvent) -> Node:
        if event.anchor not in self._anchors:
            raise self._stop(event, f"no anchor &{event.anchor} above this alias", "quote text that begins with '*'")
        node = self._anchors[event.anchor]
        if node is None:
            raise self._stop(event, f"the anchor &{event.anchor} would contain itself")
        return node

    def _mapping(self, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        for event in self._until(yaml.MappingEndEvent):
            place = self._place(event)
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                self._node(event, depth + 1)
                self._node(next(self._events), depth + 1)
                self._faults.add(place, "a key is a plain word, not an alias, a tag, a list or a mapping")
                continue
            node = self._node(next(self._events), depth + 1)
            if event.value in entries:
                first = entries[event.value].key
                self._faults.add(place, f"duplicate key {quoted(event.value)}: it is already at {first}")
            elif self._encodable(event.value, place):
                entries[event.value] = replace(node, key=place)
        return entries

    def _until(self, end: type[yaml.Event]) -> Iterator[yaml.Event]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _scalar(self, event: yaml.ScalarEvent, place: Place) -> Scalar | Broken:
        before = len(self._faults)
        text = _VARIABLE.sub(lambda match: self._variable(match, place), event.value)
        if len(self._faults) > before or not self._encodable(text, place):
            return BROKEN
        return plain_scalar(text) if event.implicit[0] else text

    def _variable(self, match: re.Match[str], place: Place) -> str:
        if match[0] == "$${":
            return "${"
        name, default = match["name"], match["default"]
        if name is None:
            hint = "write ${NAME} or ${NAME:-default} for an environment variable, $${ for a literal ${"
            self._faults.add(place, "'${' without a variable's name or a closing '}'", hint)
            return ""
        if _SECRET.search(name):
            hint = "leave it in the environment: the hub client and the trackers read it from there"
            what = f"{name} looks like a secret, and the recipe is written into the run's files"
            self._faults.add(place, what, hint)
            return ""
        value = self._env.get(name)
        if default is not None:
            return value or default  # as in a shell, ':-' also replaces an empty variable
        if value is None:
            hint = f"set it, or give a default: ${{{name}:-default}}"
            self._faults.add(place, f"the environment variable {name} is not set", hint)
        return value or ""

    def _encodable(self, text: str, place: Place) -> bool:
        try:
            text.encode()
        except UnicodeEncodeError:
            self._faults.add(place, f"{quoted(text)} is not valid Unicode")
            return False
        return True

    def _stop(self, event: yaml.Event, what: str, hint: str | None = None) -> _Stop:
        self._faults.add(self._place(event), what, hint)
        return _Stop()

    def _place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        assert mark is not None, "the parser marks every event"
        return self._locate(mark.line + 1, mark.column + 1)


_YAML_TAG = "tag:yaml.org,2002:"
_SECRET = re.compile(
    "PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|APIKEY|(^|_)(TOKEN|KEY|PASS|PAT|AUTH|CREDS|JWT|COOKIE)($|_)|_PWD$",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>(?:(?!\$\{)[^}])*))?\})?")

_CONSTANTS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LONGEST_INTEGER = 300  # digits; Python refuses to print 4,301 digits, and no float has 310


def plain_scalar(text: str) -> Scalar:
    """Return the value of unquoted ``text`` in YAML 1.2's core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        if len(text) > _LONGEST_INTEGER:
            return -math.inf if text.startswith("-") else math.inf
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text) if _FLOAT.fullmatch(text) else text


def quoted(text: str) -> str:
    """Return ``text`` quoted, cut to 60 characters and with unprintable characters escaped."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


# The start of PyYAML's problem text → our message and hint. These are reported at PyYAML's problem_mark …
_AT_PROBLEM: dict[str, tuple[str, str | None]] = {
    "found character '\\t'": ("a tab where YAML takes spaces only", "indent with spaces"),
    "found character": ("this character cannot begin a value", "quote the text"),
    "mapping values are not allowed": (
        "a ':' that is not allowed here",
        "quote text with ': ' in it, or check the indentation and that the line above has its ':'",
    ),
    "expected <block end>": (
        "this line does not fit those above it",
        "check its indentation, and that every quote is closed",
    ),
    "expected the node content": ("expected a value here", None),
    "expected chomping": ("text after '|' or '>' begins on the next line", "quote text that begins with '|' or '>'"),
    "found unknown escape character": (
        "an unknown backslash escape in double quotes",
        "write \\\\ for a backslash, or use single quotes",
    ),
}
# … and these at its context_mark, where the construct with the problem begins.
_AT_CONTEXT: dict[str, tuple[str, str | None]] = {
    "could not find expected ':'": ("expected 'key: value', found no ':' after this", None),
    "found unexpected end of stream": ("this quote is never closed", None),
    "found unexpected document separator": ("this quote is never closed", None),
    "expected ',' or ']'": ("this '[' is not closed, or lacks a comma between two items", None),
    "expected ',' or '}'": ("this '{' is not closed, or lacks a comma between two entries", None),
}
_VARIABLE_IN_BRACKETS = re.compile(r"[\[{, ]\$\{")


def _translate_error(error: yaml.MarkedYAMLError, text: str) -> tuple[yaml.Mark | None, str, str | None]:
    problem = error.problem or "it cannot be read"
    for theirs, (what, hint) in _AT_CONTEXT.items():
        if problem.startswith(theirs):
            mark = error.context_mark or error.problem_mark
            if "," in theirs and _VARIABLE_IN_BRACKETS.search(text, mark.index if mark else 0):
                hint = 'inside [ ] and { } a variable needs quotes: "${VAR}"; for a number give the key its own line'
            return mark, what, hint
    for theirs, (what, hint) in _AT_PROBLEM.items():
        if problem.startswith(theirs):
            return error.problem_mark, what, hint
    return error.problem_mark or error.context_mark, f"not valid YAML: {problem}", None
