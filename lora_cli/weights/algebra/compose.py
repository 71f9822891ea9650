"""Combine several weighted adapters into one with PEFT's ``add_weighted_adapter``, on the adapted layers alone.

PEFT gets no base model but a tree of layers with the right names and widths, whose weights are each a single zero
expanded to the weight's shape. Methods: DARE (Yu et al., arXiv:2311.03099), TIES (Yadav et al., arXiv:2306.01708), and
others that PEFT documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from lora_cli.errors import UserError
from lora_cli.model.files import copy_tokenizer
from lora_cli.system.folders import atomic_folder
from lora_cli.weights.adapter.adapter_config import ADAPTER_WEIGHTS, PEFT_PREFIX
from lora_cli.weights.adapter.products import Factors, Product, factors_of
from lora_cli.weights.adapter.provenance import check_trained_alike, read_record, trained_on
from lora_cli.weights.algebra.lora_adapter import (
    LoraAdapter,
    check_plain,
    check_same_base,
    rank_keys,
    source_record,
    write_plain_config,
    write_record,
    write_tensors,
)
from lora_cli.weights.files.shards import read_tensor

SEED = 42
"""The default seed for the values that DARE drops at random."""
EQUAL_RANKS = "equal ranks"
NAME = "composed_{}"  # PEFT finds tensors by their adapter's name, which must not occur in a layer's name


METHODS: dict[str, set[str]] = {
    "cat": set(),
    "svd": {"rank"},
    "linear": {EQUAL_RANKS},
    "ties": {EQUAL_RANKS, "density"},
    "dare_ties": {EQUAL_RANKS, "density", "seed"},
    "dare_linear": {EQUAL_RANKS, "density", "seed"},
    "magnitude_prune": {EQUAL_RANKS, "density"},
    "ties_svd": {"density", "rank"},
    "dare_ties_svd": {"density", "rank", "seed"},
    "dare_linear_svd": {"density", "rank", "seed"},
    "magnitude_prune_svd": {"density", "rank"},
}
"""What each method takes: adapters of equal ranks, the result's ``rank``, a ``density`` (the share of values kept of
each adapter), and a ``seed`` if it is random."""


@dataclass(frozen=True)
class Composition:
    """How adapters are composed: the weight of each, the method and its options."""

    weights: tuple[float, ...]
    method: str
    rank: int | None
    density: float | None
    seed: int | None


@dataclass(frozen=True)
class Composed:
    """The adapter that was written: its distinct ranks in ascending order, the size of its weights file."""

    out: Path
    method: str
    layers: int
    ranks: tuple[int, ...]
    bytes: int


def check_composition(how: Composition, adapters: Sequence[LoraAdapter]) -> None:
    """Raises UserError when the adapters are not plain LoRA or have different bases, or when the method does not take
    these options or needs equal ranks."""
    takes = METHODS[how.method]
    for option, value in {"rank": how.rank, "density": how.density, "seed": how.seed}.items():
        if value is not None and option not in takes:
            able = ", ".join(method for method, taken in METHODS.items() if option in taken)
            raise UserError(f"--{option} is not for --method {how.method}", hint=f"it is only for {able}")
    if "density" in takes and how.density is None:
        raise UserError(f"--method {how.method} needs --density", hint="give the share of values to keep, e.g. 0.5")
    if how.density is not None and not 0 < how.density <= 1:
        raise UserError(f"--density {how.density:g} is out of range", hint="use a number above 0 and up to 1")
    for adapter in adapters:
        check_plain(adapter)
    check_same_base(adapters)
    check_trained_alike(
        [adapter.folder for adapter in adapters], "compose adapters that were trained on the same weights"
    )
    if EQUAL_RANKS in takes:
        _check_ranks(how.method, adapters)


def _check_ranks(method: str, adapters: Sequence[LoraAdapter]) -> None:
    hint = "cat and the methods that end in svd take different ranks; lora adapters resize can make them equal"
    largest = [max(product.rank for product in adapter.products.values()) for adapter in adapters]
    for adapter, rank in zip(adapters, largest, strict=True):
        unlike = [
            layer
            for layer, product in adapter.products.items()
            if layer in adapters[0].products and adapters[0].products[layer].rank != product.rank
        ]
        if unlike or rank != largest[0]:
            place = f" of {unlike[0]}" if unlike else ""
            what = f"--method {method} takes equal ranks: the rank{place} is not that of {adapters[0].folder}"
            raise UserError(what, str(adapter.folder), hint)


def compose(adapters: Sequence[LoraAdapter], how: Composition, out: Path) -> Composed:
    """Compose the adapters into a LoRA adapter with a scaling of 1, and write it to ``out``.

    The caller has run ``check_composition``.
    """
    seed = SEED if how.seed is None else how.seed
    factors = _weighted(adapters, how, seed)
    first = adapters[0]
    parts = [source_record(adapter) | {"weight": weight} for adapter, weight in zip(adapters, how.weights, strict=True)]
    by = {"by": "compose", "method": how.method, "rank": how.rank, "density": how.density, "seed": seed}
    # A later merge needs to know on which form of the base the adapters were trained.
    record = read_record(first.folder) if trained_on(first.folder) else {}
    kept: dict[str, Any] = {key: record[key] for key in ("recipe", "dtype") if key in record}
    with atomic_folder(out) as draft:
        write_tensors(draft, factors)
        fan_in_fan_out = any(adapter.config.get("fan_in_fan_out") for adapter in adapters)
        own = {layer: each.down.shape[0] for layer, each in factors.items()}
        write_plain_config(draft, first.base.name, own, fan_in_fan_out)
        write_record(draft, out, first.base, by, parts, kept)
        copy_tokenizer(first.folder, draft)
    ranks = tuple(sorted(set(own.values())))
    return Composed(out, how.method, len(factors), ranks, (out / ADAPTER_WEIGHTS).stat().st_size)


def _weighted(adapters: Sequence[LoraAdapter], how: Composition, seed: int) -> dict[str, Factors]:
    """Return the composed factors by layer, with a scaling of 1."""
    names = [NAME.format(number) for number in range(len(adapters))]
    model: PeftModel = get_peft_model(_tree(adapters), _config(adapters[0]), adapter_name=names[0])
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        model.add_adapter(name, _config(adapter))
    for name, adapter in zip(names, adapters, strict=True):
        set_peft_model_state_dict(model, _state(adapter), adapter_name=name)
    result = NAME.format("whole")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_weighted_adapter(
            names,
            list(how.weights),
            result,
            combination_type=how.method,
            svd_rank=how.rank,
            svd_full_matrices=False,
            density=how.density,
        )
    state = get_peft_model_state_dict(model, adapter_name=result, save_embedding_layers=False)
    composed = {}
    for layer, product in _all_products(adapters).items():
        factors = factors_of({part: state[f"{PEFT_PREFIX}{layer}.lora_{part}"] for part in product.parts}, 1.0)
        ranks = [adapter.products[layer].rank for adapter in adapters if layer in adapter.products]
        rank = sum(ranks) if how.method == "cat" else None  # PEFT pads with zeros where an adapter lacks the layer
        composed[layer] = replace(factors, up=factors.up[:, :rank], down=factors.down[:rank])
    return composed


def _all_products(adapters: Sequence[LoraAdapter]) -> dict[str, Product]:
    """Return a product of each layer that any of the adapters has. A layer's are alike but for their ranks."""
    return {layer: product for adapter in adapters for layer, product in adapter.products.items()}


def _config(adapter: LoraAdapter) -> LoraConfig:
    sizes = {layer: (product.rank, product.scaling) for layer, product in adapter.products.items()}
    return LoraConfig(target_modules=list(sizes), init_lora_weights=False, **rank_keys(sizes))


def _state(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors in float32, under the names from which PEFT loads them."""
    return {
        f"{PEFT_PREFIX}{layer}.lora_{part}": read_tensor(info).float()
        for layer, product in adapter.products.items()
        for part, info in product.parts.items()
    }


def _tree(adapters: Sequence[LoraAdapter]) -> nn.Module:
    """Build modules with the adapted layers' names and widths. A Conv1D becomes a Linear, with the same factors."""
    tree = nn.Module()
    for layer, product in _all_products(adapters).items():
        *parents, leaf = layer.split(".")
        node = tree
        for name in parents:
            if not hasattr(node, name):
                node.add_module(name, nn.Module())
            node = node.get_submodule(name)
        rows, columns = product.shape
        module: nn.Embedding | nn.Linear
        if product.is_embedding:
            module = nn.Embedding(rows, columns, device="meta")
        else:
            module = nn.Linear(columns, rows, bias=False, device="meta")
        module.weight = nn.Parameter(torch.zeros(()).expand(rows, columns), requires_grad=False)
        node.add_module(leaf, module)
    return tree
