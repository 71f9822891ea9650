"""The recipe's reference, its JSON Schema and descriptions of valid values, all generated from the schema."""

from __future__ import annotations

import copy
import functools
import json
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from lora_cli.errors import UserError, nearest_hint
from lora_cli.recipe.peers import peers_hint
from lora_cli.recipe.schema import Recipe

JsonSchema = dict[str, Any]

_LISTED = 5  # a message lists the keys of a mapping only up to this many

_BASE = {
    "type": "string",
    "description": "Another recipe to start from, by a path relative to this one; the keys here override its keys.",
}
WIDTH = 80  # columns of the reference text
_NOTES = """\
Values are YAML 1.2: 1e-4 is a number, yes, no and on are text. ${NAME} and
${NAME:-default} take environment variables, but no secrets (a name with TOKEN,
KEY, SECRET, PASS …): the recipe is written into the run's files.
$${ stands for ${. On the command line a key is set by its dotted name:
adapter.r=32"""


def explain(key: str | None = None) -> str:
    """Return the reference as plain text: of the whole recipe, of a section or of one dotted key.

    Raises UserError when there is no such key, with a hint to the key that was probably meant.
    """
    texts = {"base": _entry("base", _BASE, required=False)}
    for section, node in _schema()["properties"].items():
        texts[section] = textwrap.fill(f"{section}: {_mapping_in(node)['description']}", WIDTH)
        texts |= {name: _entry(name, inner, required) for name, inner, required in _keys_in(section, node)}
    if key is None:
        return "\n\n".join([*texts.values(), _NOTES])
    if key not in texts:
        raise UserError(f"a recipe has no key {key!r}", hint=_unknown_key_hint(key, texts))
    below = (f"{key}.", f"{key}[].")
    return "\n\n".join(text for name, text in texts.items() if name == key or name.startswith(below))


def _unknown_key_hint(key: str, names: Collection[str]) -> str:
    """Return a hint for an unknown ``key``: the sections that have it, its name here, or the nearest of ``names``."""
    homes = [name for name in names if name.rpartition(".")[2] == key]
    if homes:
        return f"did you mean {' or '.join(map(repr, homes))}?"
    peers = peers_hint(key.partition(".")[0], key.rpartition(".")[2])
    return peers or nearest_hint(key, names) or "'lora explain' lists them all"


def json_schema() -> JsonSchema:
    """Return the JSON Schema of a recipe file, for editors.

    A file with a ``base`` may omit keys that the base has, so no key of a section is required here.
    """
    schema = copy.deepcopy(_schema())
    schema["properties"] = {"base": dict(_BASE), **schema["properties"]}
    schema["anyOf"] = [{"required": ["base"]}, {"required": schema.pop("required")}]
    for name, definition in schema["$defs"].items():
        if name.lower() in Recipe.model_fields:
            definition.pop("required", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "lora recipe",
        "description": "A recipe of the lora command line: what is fine-tuned, how, and on what.",
    }


def schema_at(path: Sequence[str | int]) -> JsonSchema:
    """Return the schema of the key or list item at ``path``, or an empty dict when there is no such key."""
    return functools.reduce(_step, path, _schema())


def names_at(path: Sequence[str | int]) -> tuple[str, ...]:
    """The keys that the mapping at ``path`` may hold."""
    return tuple(_mapping_in(schema_at(path)).get("properties", ()))


def required_at(path: Sequence[str | int]) -> tuple[str, ...]:
    """The keys that the mapping at ``path`` must hold."""
    return tuple(_mapping_in(schema_at(path)).get("required", ()))


def dotted_keys() -> tuple[str, ...]:
    """Every key of every section, as ``section.key``."""
    return tuple(f"{section}.{key}" for section in names_at(()) for key in names_at((section,)))


def keys_named(name: str) -> tuple[str, ...]:
    """The dotted keys of all sections that have this key."""
    return tuple(key for key in dotted_keys() if key.partition(".")[2] == name)


def choices(node: JsonSchema) -> tuple[str, ...]:
    """Return the strings that ``node`` enumerates as valid values, or an empty tuple."""
    found = [choice for option in options(node) for choice in option.get("enum", [option.get("const")])]
    return tuple(choice for choice in found if isinstance(choice, str))


def expected(node: JsonSchema) -> str:
    """Describe in words the values that ``node`` accepts."""
    words: list[str] = []
    for option in options(node):
        words += _alternatives(option)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _alternatives(node: JsonSchema) -> list[str]:
    if words := choices(node):
        return list(words)
    match node.get("type"):
        case "boolean":
            return ["true", "false"]
        case "integer":
            return ["a whole number" + _bounds(node)]
        case "number":
            return ["a number" + _bounds(node)]
        case "string":
            return ["text"]
        case "array":
            items = expected(node["items"])
            return [f"a list (each {items})" if " " in items else f"a list of {items}"]
        case "null":
            return ["null"]
    if "properties" in node:
        names = list(node["properties"])
        return [f"a mapping of {', '.join(names)}" if len(names) <= _LISTED else "a mapping"]
    return [f"a mapping of names to {expected(node['additionalProperties'])}"]


def _bounds(node: JsonSchema) -> str:
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "up to", "exclusiveMaximum": "below"}
    parts = [f"{word} {node[bound]}" for bound, word in words.items() if bound in node]
    return " " + " and ".join(parts) if parts else ""


@functools.cache
def _schema() -> JsonSchema:
    return Recipe.model_json_schema()


def options(node: JsonSchema) -> list[JsonSchema]:
    """Return the schemas of the alternatives that ``node`` accepts, one or more, with references resolved."""
    kinds = node.get("anyOf", [node])
    return [_schema()["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind for kind in kinds]


def _step(node: JsonSchema, step: str | int) -> JsonSchema:
    for option in options(node):
        inner = option.get("items") if isinstance(step, int) else option.get("properties", {}).get(step)
        # For a section, which allows no other keys, additionalProperties is false.
        if inner := inner or option.get("additionalProperties"):
            return dict(inner)
    return {}


def _mapping_in(node: JsonSchema) -> JsonSchema:
    """Return the alternative of ``node`` that is a mapping with fixed keys, or an empty dict."""
    return next((option for option in options(node) if "properties" in option), {})


def _keys_in(prefix: str, node: JsonSchema) -> Iterator[tuple[str, JsonSchema, bool]]:
    """Yield every key below ``prefix``, with its schema and whether it is required."""
    for option in options(node):
        if "items" in option:
            yield from _keys_in(f"{prefix}[]", option["items"])
        for name, inner in option.get("properties", {}).items():
            yield f"{prefix}.{name}", inner, name in option.get("required", ())
            yield from _keys_in(f"{prefix}.{name}", inner)


def _entry(name: str, node: JsonSchema, required: bool) -> str:
    default = "required" if required else f"default {json.dumps(node['default'])}" if "default" in node else "optional"
    lines = [f"  {name}"]
    for text in (f"{expected(node)}; {default}", node.get("description", "")):
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(lines)
