"""The adapter that training starts from (``adapter.init_from``), and whether training can continue it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_cli.errors import Fault, UserError, first_few, pluralize, reading
from lora_cli.recipe.schema import Adapter
from lora_cli.weights.adapter.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONVERT,
    UNMERGEABLE,
    keeps_base,
    layer_and_part,
    read_adapter_config,
)
from lora_cli.weights.adapter.check_adapter import OTHER_TENSORS, UNSET, adapted_layers
from lora_cli.weights.adapter.origin import adapter_folder
from lora_cli.weights.adapter.provenance import recipe_of
from lora_cli.weights.files.fingerprint import file_sha256
from lora_cli.weights.files.shards import read_headers

TRAINED = ("A", "B", "magnitude_vector")
"""The tensors of a layer that a recipe trains: LoRA's two factors, and DoRA's magnitudes."""

MERGE = "merge it into its base with lora merge, and train a new adapter on the result"


def start_of(adapter: Adapter) -> Path | None:
    """Return the folder of the adapter that training starts from: ``init_from``, or the adapter of the run it names."""
    return None if adapter.init_from is None else adapter_folder(Path(adapter.init_from)) or Path(adapter.init_from)


def start_record(adapter: Adapter) -> dict[str, str]:
    """Return the record's entry for the adapter that training starts from: its folder and the SHA-256 of its weights
    file; empty when training starts from none."""
    folder = start_of(adapter)
    if folder is None:
        return {}
    file = folder / ADAPTER_WEIGHTS
    with reading(file):
        return {"name_or_path": str(folder.resolve()), "fingerprint": file_sha256(file)}


def check_start(folder: Path, adapter: Adapter, adaptable: Iterable[str], targets: Iterable[str]) -> None:
    """Raises UserError when the adapter to start from does not match the recipe, or has what training does not support,
    such as layers that are not ``adaptable``."""
    config = read_adapter_config(folder)
    hint = "use the adapter's own value in the recipe"
    faults = list(_untrained(config, folder))
    for key in ("r", "lora_alpha", "use_rslora", "use_dora"):
        stored, asked = config.get(key), getattr(adapter, key)
        if stored is not None and stored != asked:
            what = f"adapter.{key}: {asked} in the recipe, but {stored} in the adapter of init_from"
            faults.append(Fault(what, str(folder), hint))
    stored_names, asked_names = set(adapted_layers(folder)), set(targets)
    if strange := sorted(stored_names - set(adaptable)):
        what = f"the adapter of init_from has layers that are not trained here: {first_few(strange, 1)}"
        faults.append(Fault(what, str(folder), MERGE))
    elif stored_names != asked_names:
        what = (
            f"adapter.target_modules: the recipe adapts {pluralize(len(asked_names), 'layer')}, the adapter of "
            f"init_from {len(stored_names):,}; only one of them has {first_few(sorted(asked_names ^ stored_names), 2)}"
        )
        faults.append(Fault(what, str(folder), f"{hint}: {_choice_of_layers(folder, config)}"))
    if faults:
        raise UserError(faults)


def _choice_of_layers(folder: Path, config: Mapping[str, Any]) -> str:
    """The keys that chose an adapter's layers, as in its recipe if that is recorded, else as in its configuration."""
    recipe = recipe_of(folder)
    adapter = config if recipe is None else recipe.adapter.model_dump()
    names, layers = adapter.get("target_modules"), adapter.get("layers_to_transform")
    chosen = names if names is None or isinstance(names, str) else first_few(sorted(names), 4)
    return f"target_modules: {chosen}" + (f", layers_to_transform: {list(layers)}" if layers else "")


def _untrained(config: Mapping[str, Any], folder: Path) -> Iterator[Fault]:
    """Yield what an adapter has beyond the factors and magnitudes that a recipe trains on an unchanged base."""
    where = str(folder / ADAPTER_CONFIG)
    unsummed = [key for key in UNMERGEABLE if config.get(key)]
    for key in unsummed:
        what = f"the adapter of init_from {UNMERGEABLE[key]} ({key}), and cannot be trained here"
        yield Fault(what, where, "train a new one, without adapter.init_from")
    if not keeps_base(config):
        start = _key_and_value(config, "init_lora_weights")
        what = f"the adapter of init_from belongs to a changed copy of its base ({start})"
        yield Fault(what, where, CONVERT)
    others = [key for key in (*OTHER_TENSORS, "kasa_config", "lora_bias") if config.get(key) not in UNSET]
    for key in others:
        more = _key_and_value(config, key)
        what = f"the adapter of init_from holds more than LoRA's A and B ({more}), which is not trained"
        yield Fault(what, where, MERGE)
    stored = read_headers([folder / ADAPTER_WEIGHTS])
    names = [name for name in stored if layer_and_part(name)[1].partition(".")[0] not in TRAINED]
    if names and not (unsummed or others):  # their faults say so already
        what = f"the adapter of init_from holds more than LoRA's A and B: tensor {first_few(names, 1)}"
        yield Fault(what, str(folder), MERGE)


def _key_and_value(config: Mapping[str, Any], key: str) -> str:
    value = config[key]
    return f"{key}: {', '.join(map(str, value)) if isinstance(value, list | dict) else value}"
