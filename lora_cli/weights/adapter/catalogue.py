"""Describe adapter folders from their headers, configuration and provenance record, without importing torch."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_cli.errors import Fault, LoraError, UserError
from lora_cli.model.files import locate
from lora_cli.weights.adapter.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, layer_and_part, read_adapter_config
from lora_cli.weights.adapter.origin import named_base
from lora_cli.weights.adapter.provenance import read_record
from lora_cli.weights.files.fingerprint import fingerprint
from lora_cli.weights.files.shards import read_headers

VARIANTS = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer with a LoRA update, and the update's rank. An embedding's ``in_features`` is its number of tokens."""

    name: str
    in_features: int
    out_features: int
    rank: int


@dataclass(frozen=True)
class Entry:
    """An adapter in a listing. ``ranks`` are its distinct ranks, empty for other kinds than LoRA. ``whole`` names what
    it holds besides LoRA's factors, such as a fully trained head. ``bytes`` is the size of its weights file,
    ``validation_loss`` that of its weights, ``best_loss`` its run's lowest, which other weights may have had, and
    ``date`` its time of creation in UTC."""

    path: str
    kind: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    whole: tuple[str, ...]
    parameters: int
    bytes: int
    base: str | None
    data: str | None
    validation_loss: float | None
    best_loss: float | None
    date: str


def find_adapters(folder: Path) -> tuple[list[Entry], list[Fault]]:
    """Return the adapters in a folder and its subfolders, sorted by path, and the faults of those that cannot be read.

    Hidden folders are skipped. Links are followed last, and no folder is read twice. Raises UserError when the folder
    does not exist.
    """
    if not folder.is_dir():
        raise UserError("no such folder", str(folder), "give a folder with runs or adapters in it")
    entries: list[Entry] = []
    faults: list[Fault] = []
    seen: set[str] = set()
    for place, below, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        shown = [name for name in below if not name.startswith(".")]
        below[:] = sorted(shown, key=lambda name: (Path(place, name).is_symlink(), name))  # a run before a link to it
        if ADAPTER_CONFIG in files:
            try:
                entries.append(describe(Path(place)))
            except LoraError as error:
                faults.extend(error.faults)
    return entries, faults


def describe(folder: Path) -> Entry:
    """Describe an adapter. Raises UserError when its files are missing or damaged, RunError when reading them fails."""
    config, record = read_adapter_config(folder), read_record(folder)
    weights = folder / ADAPTER_WEIGHTS
    layers, headers = lora_layers(folder), read_headers([weights])
    made = datetime.fromtimestamp(weights.stat().st_mtime, UTC).isoformat(timespec="seconds")
    own, best = (nested_value(record, "result", name, "loss") for name in ("validation", "best"))
    return Entry(
        path=str(folder),
        kind=" ".join([str(config["peft_type"]), *(word for key, word in VARIANTS.items() if config.get(key))]),
        ranks=tuple(sorted({layer.rank for layer in layers})),
        targets=tuple(sorted({layer.name.rpartition(".")[2] for layer in layers})) or _named(config),
        whole=tuple(sorted({_short(name) for name in headers if layers and ".lora_" not in name})),
        parameters=sum(math.prod(info.shape) for info in headers.values()),
        bytes=weights.stat().st_size,
        base=named_base(folder)[0] or None,
        data=_data(nested_value(record, "recipe", "data", "train")),
        validation_loss=own if isinstance(own, float) else None,
        best_loss=best if isinstance(best, float) else None,
        date=str(record.get("finished") or made),
    )


def lora_layers(folder: Path) -> list[AdaptedLayer]:
    """Return the layers with both factors in an adapter, sorted by name. Raises UserError for a damaged file."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, info in read_headers([folder / ADAPTER_WEIGHTS]).items():
        layer, part = layer_and_part(name)
        half = part.removeprefix("embedding_").removesuffix(".weight")
        if half in ("A", "B") and len(info.shape) == 2:
            shapes.setdefault(layer, {})[half] = info.shape
    return [
        AdaptedLayer(name, halves["A"][1], halves["B"][0], halves["A"][0])
        for name, halves in sorted(shapes.items())
        if len(halves) == 2
    ]


def base_state(folder: Path) -> str:
    """Return the state of an adapter's base: "there", "not found", "not readable", or "changed" when its fingerprint is
    not the one recorded in training. Nothing is downloaded from the hub."""
    name, place = named_base(folder)
    if not name or not Path(place).is_dir():
        return "not found"
    stored = read_record(folder).get("base", {}).get("fingerprint")
    try:
        found = fingerprint(locate(place))
    except LoraError:
        return "not readable"
    return "changed" if stored and found != stored else "there"


def nested_value(record: Any, *keys: str) -> Any:
    """Return the value under these keys in nested objects, or None when a key is missing or its parent is no object."""
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _short(tensor: str) -> str:
    """Return the last part of a tensor's module name, followed by the tensor's own name unless that is ``weight``."""
    plain = re.sub(r"\.(token_adapter|base_layer|modules_to_save|original_module)(?=\.)", "", tensor)  # PEFT's parts
    module, _, own = plain.rpartition(".")
    return module.rpartition(".")[2] + ("" if own == "weight" else f".{own}")


def _named(config: dict[str, Any]) -> tuple[str, ...]:
    targets = config.get("target_modules")
    return tuple(sorted(map(str, targets))) if isinstance(targets, list) else (str(targets),) if targets else ()


def _data(train: Any) -> str | None:
    if isinstance(train, list):
        return ", ".join(str(part.get("path") if isinstance(part, dict) else part) for part in train)
    return str(train) if train else None
