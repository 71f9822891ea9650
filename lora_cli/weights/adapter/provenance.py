"""An adapter's provenance record (its base, data and training), and the search for its base."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ValidationError

from lora_cli import __version__
from lora_cli.errors import Fault, UserError
from lora_cli.model.files import locate, read_json
from lora_cli.recipe.schema import Quantization, Recipe
from lora_cli.system.folders import current_place
from lora_cli.weights.adapter.adapter_config import ADAPTER_CONFIG, read_adapter_config
from lora_cli.weights.adapter.check_adapter import check_in_model
from lora_cli.weights.files.fingerprint import fingerprint
from lora_cli.weights.files.shards import check_complete

PROVENANCE = "provenance.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
DTYPES = ("float32", "bfloat16", "float16")
OBJECTS = ("base", "data", "versions", "made")
"""Keys of a record whose values, if present, are objects."""
WITHOUT = "copy it again, or remove it: the adapter then counts as made by another program"


@dataclass(frozen=True)
class AdapterOrigin:
    """An adapter folder, its base, and the recipe and dtype of its training (None for an adapter made elsewhere)."""

    folder: Path
    base: Path
    base_name: str
    recipe: Recipe | None
    dtype: str | None

    @property
    def quantization(self) -> Quantization | None:
        """How the base was quantized in training; None if it was not, or that is not recorded."""
        return self.recipe.quantization if self.recipe else None


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


def adapter_folder(target: Path) -> Path | None:
    """Return the adapter folder at a path: the folder itself or a run's ``adapter``; None when neither is an adapter.

    Also finds an adapter whose run was killed while replacing it, and which therefore has another name.
    """
    for folder in map(current_place, (target, target / "adapter")):
        if (folder / ADAPTER_CONFIG).is_file():
            return folder
    return None


def find_origin(folder: Path, base: str | None = None, other_kinds: bool = False) -> AdapterOrigin:
    """Find the adapter's base, or take the one given, and check that the adapter was trained on it.

    Raises UserError when the base is not found or damaged, its fingerprint differs, or the adapter's tensors do not fit
    it. Adapters of other kinds than LoRA are refused unless ``other_kinds`` is set.
    """
    if base is not None:
        return _checked(folder, locate(base, weights=True), base, other_kinds)
    name, place = named_base(folder)
    if not name:
        hint = "write it there as base_model_name_or_path"
        raise UserError("the adapter does not say which base it is for", str(folder / ADAPTER_CONFIG), hint)
    revision = read_adapter_config(folder).get("revision")
    try:
        found = locate(place, weights=True, revision=str(revision) if revision else None)
    except UserError as error:
        what = f"the base of this adapter is not found: {error.faults[0].where}: {error.faults[0].what}"
        hint = "put it back, move base and adapter together, or tell lora merge its place (--base)"
        raise UserError(what, str(folder), hint) from error
    return _checked(folder, found, name, other_kinds)


def named_base(folder: Path) -> tuple[str, str]:
    """Return the base that an adapter names (empty for none) and where to look for the base, which may have been moved
    along with the adapter."""
    stored = read_record(folder).get("base", {})
    name = str(stored.get("name_or_path") or read_adapter_config(folder).get("base_model_name_or_path") or "")
    relative = stored.get("relative_path")
    moved = (folder / relative) if relative else None
    return name, str(moved.resolve()) if moved is not None and moved.is_dir() and not Path(name).is_dir() else name


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


def _checked(folder: Path, base: Path, name: str, other_kinds: bool) -> AdapterOrigin:
    check_complete(base)
    check_base(folder, base)
    check_in_model(folder, base, other_kinds)
    return AdapterOrigin(folder, base, name, recipe_of(folder), read_record(folder).get("dtype"))


def check_base(folder: Path, base: Path) -> None:
    """Raises UserError when the adapter's record has another fingerprint than the model in ``base``."""
    stored = read_record(folder).get("base", {}).get("fingerprint")
    if stored and fingerprint(base) != stored:
        what = f"the adapter belongs to another base: weights or config.json in {base} are not those it was trained on"
        raise UserError(what, str(folder), "restore that base, or train again on this one")


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
