"""An adapter's provenance record: its base, data, versions and training."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from lora_cli import __version__
from lora_cli.errors import Fault, UserError
from lora_cli.model.files import read_json
from lora_cli.recipe.schema import Quantization, Recipe

PROVENANCE = "provenance.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
DTYPES = ("float32", "bfloat16", "float16")
OBJECTS = ("base", "data", "versions", "made")
"""Keys of a record whose values, if present, are objects."""
WITHOUT = "copy it again, or remove it: the adapter then counts as made by another program"


def check_trained_alike(folders: Sequence[Path], hint: str) -> None:
    """Raises UserError when the adapters' bases were quantized differently in training: no base would fit their sum."""
    first, *others = folders
    form = trained_on(first)
    for folder in others:
        if trained_on(folder) != form:
            raise UserError(f"its base was not quantized in training as that of {first}", str(folder), hint)


def trained_on(folder: Path) -> tuple[Quantization, str | None] | None:
    """Return how the base was quantized to train an adapter, and from which dtype; None when it was not quantized."""
    recipe = recipe_of(folder)
    quantization = recipe.quantization if recipe else None
    return None if quantization is None else (quantization, read_record(folder).get("dtype"))


def base_record(name: str, adapter: Path, digest: str | None) -> dict[str, Any]:
    """Return the record's entry for the base of the adapter at ``adapter``: folder or hub id, fingerprint, and relative
    path, so that the base is found when both folders are moved together."""
    base = Path(name).resolve()
    local = bool(name) and base.is_dir()
    return {
        "name_or_path": str(base) if local else name or None,
        "relative_path": os.path.relpath(base, adapter.resolve()) if local else None,
        "fingerprint": digest,
    }


def versions() -> dict[str, str]:
    """Return the software versions that a result depends on."""
    found = {"lora": __version__, "python": platform.python_version()}
    return found | {name: version(name) for name in PACKAGES}


def now() -> str:
    """Return the current time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_record(folder: Path) -> dict[str, Any]:
    """Read provenance.json of an adapter or a model made from one; empty when missing. Raises UserError if invalid."""
    path = folder / PROVENANCE
    record = read_json(path, WITHOUT) if path.is_file() else {}
    if not _is_record(record):
        raise UserError("not an adapter's record", str(path), WITHOUT)
    return record


def _is_record(record: Any) -> TypeGuard[dict[str, Any]]:
    """Whether the values that are read from a record have the types with which they are written."""
    if not isinstance(record, dict) or not all(isinstance(record.get(key, {}), dict) for key in OBJECTS):
        return False
    if not isinstance(record.get("made", {}).get("of", []), list):
        return False
    validation = record.get("data", {}).get("validation") or {"rows": 0}
    if not isinstance(validation, dict) or not isinstance(validation.get("rows"), int):
        return False
    names = [record.get("base", {}).get(key) for key in ("name_or_path", "relative_path", "fingerprint")]
    return record.get("dtype") in (None, *DTYPES) and all(isinstance(name, str | None) for name in names)


def recipe_of(folder: Path) -> Recipe | None:
    """Return the recipe by which an adapter, or a model made from one, was trained; None when it is not recorded.

    Keys of other versions are left out. Raises UserError for values that this version cannot read.
    """
    record = read_record(folder)
    if "recipe" not in record:
        return None
    try:
        return Recipe.model_validate_json(json.dumps(record["recipe"]), extra="ignore")  # JSON lists become tuples
    except ValidationError as error:
        where, by = str(folder / PROVENANCE), record.get("versions", {}).get("lora", "unknown")
        wrong = ((".".join(map(str, each["loc"])), each["msg"].lower()) for each in error.errors())
        faults = [Fault(f"recipe.{key}: {what} (written by lora {by})", where, WITHOUT) for key, what in wrong]
        raise UserError(faults) from error
