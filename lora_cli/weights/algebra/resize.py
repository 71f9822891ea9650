"""Change a LoRA adapter's rank: decrease it by the SVD of its updates, increase it by padding that adds nothing."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_cli.errors import UserError
from lora_cli.model.files import copy_tokenizer
from lora_cli.system.folders import atomic_folder
from lora_cli.weights.adapter.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lora_cli.weights.adapter.products import Factors
from lora_cli.weights.adapter.provenance import read_record
from lora_cli.weights.algebra.lora_adapter import (
    LoraAdapter,
    rank_keys,
    source_record,
    write_record,
    write_tensors,
)
from lora_cli.weights.algebra.spectrum import spectrum_of
from lora_cli.weights.files.shards import read_tensor

SEED = 42


@dataclass(frozen=True)
class ResizedLayer:
    """A layer's ranks before and after, and the share of its update's squared norm that is kept."""

    name: str
    before: int
    after: int
    energy: float


@dataclass(frozen=True)
class Resized:
    """The adapter that was written."""

    out: Path
    layers: tuple[ResizedLayer, ...]
    bytes: int


def resize(adapter: LoraAdapter, rank: int | None, energy: float | None, out: Path) -> Resized:
    """Write to ``out`` an adapter whose layers have this rank, or the smallest rank that keeps the share ``energy`` of
    their update's squared norm. Scalings and other tensors do not change.

    The outputs of a layer whose rank grows stay bit-identical: new columns of B are zero, new rows of A are initialized
    as in PEFT (the other way round for an embedding). Raises UserError for a rank above all layers' widths.
    """
    if rank is not None:
        _check_width(adapter, rank)
    draw = torch.Generator().manual_seed(SEED)
    factors: dict[str, Factors] = {}
    layers = []
    for layer, product in adapter.products.items():
        factors[layer], kept = _resized(product.read(), rank, energy, draw)
        layers.append(ResizedLayer(layer, product.rank, factors[layer].down.shape[0], kept))
    others = {info.name: read_tensor(info) for info in adapter.others.values()}
    sizes = {layer.name: (layer.after, factors[layer.name].scaling) for layer in layers}
    keys = rank_keys(sizes, bool(adapter.config.get("use_rslora")))
    record = read_record(adapter.folder)
    if any(layer.after < layer.before for layer in layers):
        record.pop("result", None)  # scores only hold if nothing was cut
    with atomic_folder(out) as draft:
        write_tensors(draft, factors, others)
        config = json.dumps({**adapter.config, **keys}, indent=2, sort_keys=True)
        (draft / ADAPTER_CONFIG).write_text(f"{config}\n", encoding="utf-8")
        by = {"by": "resize", "rank": rank, "energy": energy}
        write_record(draft, out, adapter.base, by, [source_record(adapter)], record)
        copy_tokenizer(adapter.folder, draft)
    return Resized(out, tuple(layers), (out / ADAPTER_WEIGHTS).stat().st_size)


def _check_width(adapter: LoraAdapter, rank: int) -> None:
    widest = max(min(product.shape) for product in adapter.products.values())
    if rank > widest:
        what = f"--rank {rank} is more than the width of any layer ({widest})"
        raise UserError(what, str(adapter.folder), f"use at most {widest}")


def _resized(factors: Factors, rank: int | None, energy: float | None, draw: torch.Generator) -> tuple[Factors, float]:
    """Return the layer's new factors, and the share of the update's squared norm that they keep."""
    before = factors.down.shape[0]
    if rank is not None and rank >= before:
        return _padded(factors, rank - before, draw), 1.0
    spectrum = spectrum_of(replace(factors, scaling=1.0))
    after = spectrum.rank_for(energy or 1.0) if rank is None else rank
    if after == before:
        return factors, 1.0
    held = min(after, spectrum.rank)  # beyond this both factors would be zero, and could not be trained
    up, down = spectrum.factors(held)
    return _padded(replace(factors, up=up, down=down), after - held, draw), spectrum.energy(after)


def _padded(factors: Factors, more: int, draw: torch.Generator) -> Factors:
    """Add ``more`` zero columns to ``up`` and rows to ``down``, initialized as in PEFT so that both can be trained."""
    rows, columns = factors.up.shape[0], factors.down.shape[1]
    new = torch.empty(more, columns)
    if factors.is_embedding:
        new.normal_(generator=draw)
    else:
        torch.nn.init.kaiming_uniform_(new, a=math.sqrt(5), generator=draw)
    up = torch.cat([factors.up, torch.zeros(rows, more)], dim=1)
    return replace(factors, up=up, down=torch.cat([factors.down, new]))
