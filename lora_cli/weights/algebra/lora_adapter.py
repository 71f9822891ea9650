"""Read a LoRA adapter as its updates s UD, layer by layer, and write new adapters. No base is needed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_cli.errors import Fault, LoraError, UserError, grouped_error
from lora_cli.model.targets import EMBEDDINGS, module_leaf
from lora_cli.weights.adapter.adapter_config import (
    ADAPTER_WEIGHTS,
    PEFT_PREFIX,
    check_mergeable_lora,
    read_adapter_config,
    sort_targets,
)
from lora_cli.weights.adapter.check_adapter import check_adapter, check_given_once
from lora_cli.weights.adapter.origin import named_base
from lora_cli.weights.adapter.products import MAGNITUDE, Factors, Product, adapter_parts, product_of
from lora_cli.weights.adapter.provenance import PROVENANCE, base_record, now, read_record, versions
from lora_cli.weights.files.fingerprint import file_sha256, fingerprint
from lora_cli.weights.files.shards import TensorInfo, model_headers, read_tensor


@dataclass(frozen=True)
class Base:
    """The base of an adapter: its folder if found, else its name; its fingerprint if known."""

    name: str
    fingerprint: str | None


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter folder: its configuration, its layers' updates, and ``others``, tensors that are not part of these."""

    folder: Path
    config: Mapping[str, Any]
    products: Mapping[str, Product]
    others: Mapping[str, TensorInfo]
    base: Base


def read_lora(folder: Path) -> LoraAdapter:
    """Open the adapter in ``folder``, leaving its factors in their file.

    Raises UserError when it is not a LoRA adapter of linear layers and embeddings, its initialization changed its base,
    or tensors are missing or hold NaN or infinity.
    """
    check_mergeable_lora(folder, repeatable=())
    check_adapter(folder, None)
    config, read = read_adapter_config(folder), adapter_parts(folder)
    if read is None or config.get("target_parameters"):
        what = "holds updates that are not products of two matrices of one layer"
        raise UserError(what, str(folder), "only LoRA of linear layers and embeddings is supported here")
    halves, others = read
    products = {layer: product_of(config, layer, parts) for layer, parts in halves.items()}
    return LoraAdapter(folder, config, products, others, _base_of(folder))


def _base_of(folder: Path) -> Base:
    """Return the base of the adapter in ``folder``. A fingerprint missing from the adapter's record is computed from
    the base, if that can be read, and is None otherwise."""
    name, place = named_base(folder)
    stored = read_record(folder).get("base", {}).get("fingerprint")
    if not place or not Path(place).is_dir():
        return Base(name, stored)
    try:
        return Base(place, stored or fingerprint(Path(place)))
    except LoraError:
        return Base(place, None)


def check_plain(adapter: LoraAdapter) -> None:
    """Raises UserError when an adapter uses DoRA, or holds tensors other than LoRA factors and copies of the base's."""
    if adapter.config.get("use_dora"):
        what = "a DoRA adapter's update depends on the base's weights (use_dora)"
        raise UserError(what, str(adapter.folder), "merge it into its base with lora merge")
    for name, info in adapter.others.items():
        if not _is_bases(adapter.base, info):
            what = f"tensor {name} replaces the base's and is not a LoRA update"
            raise UserError(what, str(adapter.folder), "only adapters with nothing but LoRA tensors are supported here")


def _is_bases(base: Base, info: TensorInfo) -> bool:
    """Whether a tensor is an unchanged copy of the base's embedding or head, which PEFT saves if these are adapted."""
    if module_leaf(info.name) not in (*EMBEDDINGS, "base_layer") or not Path(base.name).is_dir():
        return False
    kept = read_tensor(info).float()
    return any(
        torch.equal(read_tensor(each).float(), kept)
        for name, each in model_headers(Path(base.name)).items()
        if each.shape == info.shape and module_leaf(name) in EMBEDDINGS
    )


def check_same_base(adapters: Sequence[LoraAdapter]) -> None:
    """Raises UserError when an adapter is given twice or the bases differ: in their fingerprints or, where one is
    unknown, in both adapted layers and names. Layers that two adapters share must also have the same shape."""
    check_given_once(adapter.folder for adapter in adapters)
    first = adapters[0]
    for other in adapters[1:]:
        digests = (first.base.fingerprint, other.base.fingerprint)
        shared = [layer for layer in other.products if layer in first.products]
        is_same = digests[0] == digests[1] if all(digests) else bool(shared) or other.base.name == first.base.name
        if not is_same:
            what, name = f"another base than that of {first.folder}", other.base.name
            has_changed = f"{name} has changed since one of them was trained"
            hint = f"it is for {name}, not {first.base.name}" if name != first.base.name else has_changed
            raise UserError(what, str(other.folder), hint)
        faults = []
        for layer in shared:
            here, there = other.products[layer], first.products[layer]
            if here.shape != there.shape:
                what = f"tensors {layer}.lora_A and lora_B are for a weight of {list(here.shape)}"
                faults.append(Fault(f"{what}, in {first.folder} of {list(there.shape)}", str(other.folder)))
        if faults:
            raise grouped_error(faults, "one of them is for another base")


def rank_keys(sizes: Mapping[str, tuple[int, float]], use_rslora: bool = False) -> dict[str, Any]:
    """Return r, lora_alpha and their patterns for an adapter's configuration, from each layer's rank and scaling."""
    found = {layer: (rank, _alpha(rank, scaling, use_rslora)) for layer, (rank, scaling) in sizes.items()}
    (rank, alpha), _ = Counter(found.values()).most_common(1)[0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {layer: own for layer, (own, _) in found.items() if own != rank},
        "alpha_pattern": {layer: own for layer, (_, own) in found.items() if own != alpha},
    }


def _alpha(rank: int, scaling: float, use_rslora: bool) -> float:
    """Return the alpha that gives ``scaling``, rounded if the rounded value gives exactly the same."""
    divisor = math.sqrt(rank) if use_rslora else rank
    exact = scaling * divisor
    return next((each for each in (round(exact), round(exact, 6)) if each / divisor == scaling), exact)


def write_tensors(
    draft: Path, factors: Mapping[str, Factors], others: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write an adapter's tensors under PEFT's names, the factors in float32. ``others`` keep their names."""
    tensors: dict[str, torch.Tensor] = dict(others or {})
    for layer, each in factors.items():
        stem = f"{PEFT_PREFIX}{layer}.lora_"
        if each.is_embedding:
            tensors |= {f"{stem}embedding_A": each.up.T, f"{stem}embedding_B": each.down.T}
        else:
            tensors |= {f"{stem}A.weight": each.down, f"{stem}B.weight": each.up}
        if each.magnitude is not None:
            tensors[f"{stem}{MAGNITUDE}"] = each.magnitude
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, draft / ADAPTER_WEIGHTS, {"format": "pt"})


def write_plain_config(draft: Path, base: str, ranks: Mapping[str, int], fan_in_fan_out: bool) -> None:
    """Write the configuration of an adapter whose layers have these ranks and a scaling of 1."""
    from peft import LoraConfig, TaskType

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base or None,
        inference_mode=True,
        target_modules=list(ranks),
        fan_in_fan_out=fan_in_fan_out,
        **rank_keys({layer: (rank, 1.0) for layer, rank in ranks.items()}),
    )
    sort_targets(config)
    config.save_pretrained(str(draft))


def write_record(
    draft: Path, out: Path, base: Base, by: dict[str, Any], of: Sequence[dict[str, Any]], kept: dict[str, Any]
) -> None:
    """Write the provenance record of an adapter that will lie at ``out``: how it was made (``by``), from what (``of``),
    and the entries ``kept`` from a source's record."""
    record = kept | {
        "versions": versions(),
        "base": base_record(base.name, out, base.fingerprint),
        "finished": now(),
        "made": by | {"of": of},
    }
    (draft / PROVENANCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def source_record(adapter: LoraAdapter) -> dict[str, str]:
    """Return the entry for a source adapter in the record of an adapter made from it."""
    return {"name_or_path": str(adapter.folder.resolve()), "sha256": file_sha256(adapter.folder / ADAPTER_WEIGHTS)}
