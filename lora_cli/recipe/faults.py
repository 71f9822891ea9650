"""Translate pydantic's validation errors into faults in our words, each with its place in the recipe."""

from __future__ import annotations

import json
from difflib import get_close_matches

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from lora_cli.recipe.explain import (
    JsonSchema,
    choices,
    dotted_keys,
    expected,
    keys_named,
    names_at,
    options,
    required_at,
    schema_at,
)
from lora_cli.recipe.peers import PEERS_KEYS, WITHOUT_KEY, peers_hint, peers_value_hint
from lora_cli.recipe.yaml12 import BROKEN, Broken, Faults, Node, Scalar, plain_scalar, quoted

KeyPath = tuple[str | int, ...]

_KINDS: dict[type, set[str]] = {int: {"integer", "number"}, float: {"number"}, tuple: {"array"}}


def add_faults(error: ValidationError, root: Node, faults: Faults, complete: bool) -> None:
    """Add a fault for every error. The errors of a union, one for each alternative, become one fault.

    ``complete`` is False when a base could not be read. Missing keys may then be in that base and are not reported.
    """
    readable = not len(faults)
    found = error.errors(include_url=False, include_input=False)
    details = {_key_path(root, detail): detail for detail in found}
    # Of a union's errors, the deeper one belongs to the alternative that the user meant.
    outer = {path[:length] for path in details for length in range(len(path))}
    for path, detail in details.items():
        _, node = _follow(root, path)
        if path in outer or (node.value is BROKEN and detail["type"] != "extra_forbidden"):
            continue
        match detail["type"]:
            case "extra_forbidden":
                faults.add(node.key or node.place, f"{_dotted(path)}: unknown key", _unknown_key_hint(path, node.value))
            case "missing":
                if complete:
                    _add_missing(path, node, faults)
            case "value_error":
                if readable:
                    _add_broken_rule(detail, root, faults)
            case _:
                _add_wrong_value(path, node, faults)


def _key_path(root: Node, detail: ErrorDetails) -> KeyPath:
    """Return an error's place as the recipe's own keys: pydantic's location without the names of union members."""
    path, _ = _follow(root, detail["loc"])
    if detail["type"] == "missing" and path[-1:] != detail["loc"][-1:]:
        path += detail["loc"][-1:]
    return path


def _follow(root: Node, steps: KeyPath) -> tuple[KeyPath, Node]:
    """Follow the steps that the recipe contains, and return them with the node at which they end."""
    path: KeyPath = ()
    node = root
    for step in steps:
        if (inner := _inner(node, step)) is not None:
            path, node = (*path, step), inner
    return path, node


def _inner(node: Node, step: str | int) -> Node | None:
    if isinstance(node.value, dict) and isinstance(step, str):
        return node.value.get(step)
    if isinstance(node.value, tuple) and isinstance(step, int):
        return node.value[step]
    return None


def _dotted(path: KeyPath) -> str:
    steps = (f"[{step}]" if isinstance(step, int) else f".{_shown(step)}" for step in path)
    return "".join(steps).removeprefix(".")


def _shown(key: str) -> str:
    return key if key.isprintable() and key and len(key) <= 60 else quoted(key)


def _unknown_key_hint(path: KeyPath, value: object) -> str:
    *section, key = path
    if section == [] and key == "base":
        return "base is written in the recipe's file"
    name = str(key)
    homes = keys_named(name)
    if homes and not (name in WITHOUT_KEY and isinstance(value, str)):  # template: llama3 is not our data.template
        return f"{name} belongs in {' or '.join(home.partition('.')[0] for home in homes)}: write {' or '.join(homes)}"
    if hint := peers_hint(str(path[0]), name, value):
        return hint
    here = names_at(section) if section else ("base", *names_at(section))
    known = {home.partition(".")[2]: home for home in dotted_keys()} | {key: key for key in here}
    longer = [key for key in here if len(name) > 2 and name in key]
    alike = [*get_close_matches(name, known, n=1), *get_close_matches(name, PEERS_KEYS, n=1, cutoff=0.75)]
    near = longer if len(longer) == 1 else get_close_matches(name, alike, n=1)
    if near:
        peers = "" if near[0] in known else f" {peers_hint(str(path[0]), near[0], value)}"
        return f"did you mean '{known.get(near[0], near[0])}'?{peers}"
    if value is None:
        return "remove it: it has no value"
    return f"known: {', '.join(sorted(here))}"


def _add_missing(path: KeyPath, around: Node, faults: Faults) -> None:
    place, name = around.key or around.place, _dotted(path)
    needed = [f"{name}.{key}" for key in required_at(path)]
    schema = schema_at(path)
    if needed:
        faults.add(place, f"{name}: missing", f"it needs {', '.join(needed)}")
    else:
        faults.add(place, f"{name}: missing, expected {expected(schema)}", schema.get("description"))


def _add_broken_rule(detail: ErrorDetails, root: Node, faults: Faults) -> None:
    """Add a validator's message at the dotted key it begins with, as in ``data.format: template needs …``."""
    message = str(detail["ctx"]["error"])
    key = message.partition(":")[0]
    faults.add(_follow(root, tuple(key.split(".")))[1].place, message)


def _add_wrong_value(path: KeyPath, node: Node, faults: Faults) -> None:
    schema = schema_at(path)
    # For a number out of range, report the valid range, not the text and lists that the key accepts as well.
    same_kind = [option for option in options(schema) if option.get("type") in _KINDS.get(type(node.value), ())]
    wanted = expected({"anyOf": same_kind}) if same_kind else expected(schema)
    what = f"{_dotted(path)}: expected {wanted}, found {describe_value(node.value)}"
    keys = f"lora explain {path[0]} lists its keys" if len(path) == 1 else None
    share = isinstance(node.value, float) and 0 < node.value < 1
    hint = peers_value_hint(_dotted(path), "a share" if share else node.value)
    faults.add(node.place, what, hint or _remedy(node.value, schema) or keys)


def describe_value(value: Scalar | Broken | dict[str, Node] | tuple[Node, ...]) -> str:
    match value:
        case None:
            return "nothing (null)"
        case str():
            return f"the text {quoted(value)}" if value else "empty text"
        case bool():
            return str(value).lower()
        case int() | float():
            return f"the number {value}"
        case tuple():
            return "a list" if value else "an empty list"
    return "a mapping"


def _remedy(value: object, schema: JsonSchema) -> str | None:
    kinds = {option.get("type") for option in options(schema)}
    numbers = kinds & {"integer", "number"}
    if isinstance(value, dict) and "array" in kinds:
        return "in brackets it is a list: [{...}]"
    if value is None and "default" in schema:
        return f"leave it out for its default, {json.dumps(schema['default'])}"
    if isinstance(value, str):
        if numbers and type(plain_scalar(value)) in (int, float):
            return f"without quotes it is a number: {value}"
        if "array" in kinds:
            if value == "none" and "null" in kinds:
                return "to go without, write null"
            return _in_brackets("" if value == "none" else value, schema)
        near = get_close_matches(value.lower(), choices(schema), n=1, cutoff=0.6)
        return f"did you mean '{near[0]}'?" if near else None
    if type(value) is int and "array" in kinds and (listed := _in_brackets(str(value), schema)):
        return listed
    if isinstance(value, int | float) and value <= 0 and "null" in kinds:
        return "to go without, write null"
    if isinstance(value, float) and value.is_integer() and "integer" in kinds:
        return f"write {int(value)}"
    if type(value) in (int, float) and "string" in kinds and not numbers and not choices(schema):
        return "in quotes it is text"
    return None


def _in_brackets(text: str, schema: JsonSchema) -> str | None:
    """Return a hint that shows ``text`` as a list, or None if the list would be refused too."""
    array = next(option for option in options(schema) if option.get("type") == "array")
    items, values = array["items"], [plain_scalar(part.strip()) for part in text.split(",") if text]

    def fits(value: Scalar) -> bool:
        if isinstance(value, int) and value < items.get("minimum", value):
            return False
        return value in choices(items) or items.get("type") in _KINDS.get(type(value), ())

    is_list = len(values) >= array.get("minItems", 0) and all(map(fits, values))
    return f"in brackets it is a list: [{text}]" if is_list else None
