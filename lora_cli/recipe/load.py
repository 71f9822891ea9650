"""Load a Recipe from files, their bases, ``${VAR}`` and command-line overrides; write a Recipe as YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import yaml
from pydantic import ValidationError

from lora_cli.recipe.faults import add_faults, describe_value
from lora_cli.recipe.schema import Recipe
from lora_cli.recipe.yaml12 import BROKEN, Faults, Node, Place, parse, plain_scalar

MAX_BYTES = 1 << 20  # a data file given by mistake is refused at once
DATA_FILES = (".jsonl", ".ndjson", ".csv", ".parquet", ".arrow", ".tsv")
ROWS_GO_IN = "name the rows in the recipe, under data.train"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load the recipe at ``path``. It overrides its bases; ``overrides`` such as ``adapter.r=32`` override the recipe.

    Raises one UserError with every fault found, each with its file, line and column or with the override's text.
    """
    faults = Faults()
    layers, complete = _layers(str(path), faults)
    root = layers[0]
    for layer in layers[1:]:
        root = _merge(root, _drop_empty_sections(layer))
    for override in overrides:
        root = _merge(root, _override(override, faults))
    try:
        recipe = Recipe.model_validate(_plain(_drop_empty_sections(root)))
    except ValidationError as error:
        add_faults(error, root, faults, complete)
        raise faults.error() from None
    faults.raise_any()
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML with every key. ``load_recipe`` reads it back as an equal recipe."""
    return yaml.dump(_escaped(recipe.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def with_changes(recipe: Recipe, changes: Mapping[str, object]) -> Recipe:
    """Return a copy of the recipe with ``changes``: dotted keys and their new values."""
    dumped = recipe.model_dump()
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        dumped[section] = {**(dumped[section] or {}), key: value}
    return Recipe.model_validate(dumped)


def _escaped(value: object) -> object:
    if isinstance(value, dict):
        return {name: _escaped(inner) for name, inner in value.items()}  # keys contain no variables
    if isinstance(value, tuple):
        return [_escaped(inner) for inner in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


class _Dumper(yaml.SafeDumper):
    """A dumper with a representer of its own."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes text that YAML 1.1 reads as a number. Text such as 1e-4 and 0o17 is a number in YAML 1.2 only.
    quoted = not text.isprintable() or not isinstance(plain_scalar(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_text)


def _layers(path: str, faults: Faults) -> tuple[list[Node], bool]:
    """Return the recipe's bases, root first, then the recipe; and whether all of them could be read."""
    layers: list[Node] = []
    chain: dict[Path, str] = {}
    file, named_at = path, None
    while True:
        text = _text(file, named_at, faults)
        if text is None:
            break
        real = Path(file).resolve()
        if named_at is not None and real in chain:
            faults.add(named_at, f"base: recipes that name each other: {' → '.join([*chain.values(), file])}")
            break
        chain[real] = file
        entries = _top_level(file, text, faults)
        if entries is None:
            break
        base = entries.pop("base", None)
        layers.insert(0, Node(entries, Place(file, 1, 1)))
        if base is None:
            return layers, True
        if not isinstance(base.value, str):
            if base.value is not BROKEN:
                faults.add(base.place, f"base: expected a recipe's file name, found {describe_value(base.value)}")
            break
        file, named_at = str(Path(file).parent / base.value), base.place
    if not layers:
        faults.raise_any()
    return layers, False


def _text(file: str, named_at: Place | None, faults: Faults) -> str | None:
    path = Path(file)
    place, subject = (Place(file), "") if named_at is None else (named_at, f"base: {file}: ")
    if path.suffix.lower() in DATA_FILES and path.is_file():
        faults.add(place, f"{subject}this is a data file; a recipe is a YAML file", ROWS_GO_IN)
        return None
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = get_close_matches(path.name, [found.name for found in path.parent.glob("*.y*ml")], n=1)
        faults.add(place, f"{subject}no such file", f"did you mean '{path.with_name(near[0])}'?" if near else None)
        return None
    except IsADirectoryError:
        recipe = path / "recipe.yaml"
        hint = f"did you mean '{recipe}'?" if recipe.is_file() else None
        faults.add(place, f"{subject}this is a folder; a recipe is a YAML file", hint)
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        faults.add(place, f"{subject}cannot be read: {getattr(error, 'strerror', None) or error}")
        return None
    if len(data) > MAX_BYTES:
        faults.add(place, f"{subject}over {MAX_BYTES >> 20} MiB; a recipe is a short YAML file")
        return None
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        column = len(data[line_start : error.start].decode()) + 1
        where = Place(file, data.count(b"\n", 0, error.start) + 1, column)
        faults.add(where, f"the byte 0x{data[error.start]:02X} is not UTF-8", "save the file as UTF-8")
        return None


def _top_level(file: str, text: str, faults: Faults) -> dict[str, Node] | None:
    root = parse(text, lambda line, column: Place(file, line, column), os.environ, faults)
    if isinstance(root.value, dict):
        return dict(root.value)
    if root.value is None:
        faults.add(Place(file, 1, 1), "the recipe is empty", "'lora explain' lists its keys")
    elif root.value is not BROKEN:
        hint = ROWS_GO_IN if isinstance(root.value, tuple) else None
        faults.add(
            root.place, f"expected a recipe's sections (model, data, …), found {describe_value(root.value)}", hint
        )
    return None


def _override(text: str, faults: Faults) -> Node:
    shown = text.encode(errors="backslashreplace").decode()
    place = Place(f"{shown} (command line)")
    key, equals, value = text.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names) or shown != text:
        faults.add(place, "expected section.key=value", "e.g. adapter.r=32")
        return Node({}, place)
    node = parse(value, lambda _line, _column: place, os.environ, faults)
    for name in reversed(names):
        node = Node({name: node}, place)
    return node


def _drop_empty_sections(layer: Node) -> Node:
    """Drop sections that are empty (null): they count as missing, so the base's section applies. Keep a null that is
    the default, as in ``quantization``: it means that there is no such section."""
    assert isinstance(layer.value, dict)
    fields = Recipe.model_fields
    kept = {
        name: node
        for name, node in layer.value.items()
        if node.value is not None or name not in fields or fields[name].default is None
    }
    return replace(layer, value=kept)


def _merge(under: Node, over: Node) -> Node:
    """Merge ``over`` into ``under``, mapping by mapping. Every value keeps the place where it was written.

    An empty mapping as the value of a key, such as data.columns, removes the base's entries. An empty section does not.
    """
    if not isinstance(under.value, dict) or not isinstance(over.value, dict):
        return over
    merged = dict(under.value)
    for name, node in over.value.items():
        clears = node.value == {} and name not in Recipe.model_fields
        merged[name] = node if clears or name not in merged else _merge(merged[name], node)
    # A key that a section lacks is reported at the file's section, not at an override of another of its keys.
    return replace(over if over.place.line else under, value=merged)


def _plain(node: Node) -> object:
    if isinstance(node.value, dict):
        return {name: _plain(inner) for name, inner in node.value.items()}
    if isinstance(node.value, tuple):
        return tuple(_plain(inner) for inner in node.value)
    return node.value
