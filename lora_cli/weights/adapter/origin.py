"""Find an adapter and the base that it was trained on, and check that they belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_cli.errors import UserError
from lora_cli.model.files import check_model_type, locate
from lora_cli.recipe.schema import Quantization, Recipe
from lora_cli.system.folders import current_place
from lora_cli.weights.adapter.adapter_config import ADAPTER_CONFIG, read_adapter_config
from lora_cli.weights.adapter.check_adapter import check_in_model
from lora_cli.weights.adapter.provenance import read_record, recipe_of
from lora_cli.weights.files.fingerprint import fingerprint
from lora_cli.weights.files.shards import check_complete


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

    Raises UserError when the base is not found, damaged or of an unknown type, its fingerprint differs, or the
    adapter's tensors do not fit it. Adapters of other kinds than LoRA are refused unless ``other_kinds`` is set.
    """
    if base is not None:
        return _checked(folder, locate(base, weights=True), base, other_kinds)
    name, place = named_base(folder)
    if not name:
        hint = "write it there as base_model_name_or_path, or give it with --base"
        raise UserError("the adapter does not say which base it is for", str(folder / ADAPTER_CONFIG), hint)
    revision = read_adapter_config(folder).get("revision")
    try:
        found = locate(place, weights=True, revision=str(revision) if revision else None)
    except UserError as error:
        what = f"the base of this adapter is not found: {error.faults[0].where}: {error.faults[0].what}"
        hint = "put it back, move base and adapter together, or give its new place with --base"
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


def _checked(folder: Path, base: Path, name: str, other_kinds: bool) -> AdapterOrigin:
    check_complete(base)
    check_model_type(base)
    check_base(folder, base)
    check_in_model(folder, base, other_kinds)
    return AdapterOrigin(folder, base, name, recipe_of(folder), read_record(folder).get("dtype"))


def check_base(folder: Path, base: Path) -> None:
    """Raises UserError when the adapter's record has another fingerprint than the model in ``base``."""
    stored = read_record(folder).get("base", {}).get("fingerprint")
    if stored and fingerprint(base) != stored:
        what = f"the adapter belongs to another base: weights or config.json in {base} are not those it was trained on"
        raise UserError(what, str(folder), "restore that base, or train again on this one")
