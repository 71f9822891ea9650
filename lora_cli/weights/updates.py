"""Apply adapters to their base's stored tensors, one tensor at a time, and within a tensor a few rows at a time.

At most a few of the largest tensors are in memory. Only LoRA products and tensors that replace the base's are
supported; for others ``find_changes`` returns None, and PEFT has to merge the model in memory. Transformers and PEFT
are imported only where they are needed, since importing them takes longer than many merges.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_cli.errors import UserError
from lora_cli.model.files import read_config
from lora_cli.model.targets import EMBEDDINGS, module_leaf
from lora_cli.system.thread_pool import workers
from lora_cli.weights.adapter.adapter_config import keeps_base, read_adapter_config
from lora_cli.weights.adapter.products import MAGNITUDE, Product, adapter_parts, product_of
from lora_cli.weights.files.shards import TensorInfo, is_finite, read_tensor, stored_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_cli.weights.adapter.experts import ExpertProduct

PIECE = 2**18
"""Values of a weight that a thread processes at a time: their temporaries stay in the CPU's cache."""
VOCABULARY_MODULES = tuple(name for name in EMBEDDINGS if name not in ("wpe", "embed_positions"))
"""Embeddings and heads that have a row for each token of the vocabulary."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer dtypes by item size in bytes: comparing values as integers takes a fraction of the time."""


@dataclass(frozen=True)
class Changes:
    """What adapters change in a base, by stored name: products to add, and tensors to take in place of the base's.

    Where there are both, the product is added to the tensor that is taken. ``transposed`` are the weights stored as
    (in, out), as in GPT-2. ``untied`` are the embedding and the head of a tied base, each with the place of its tensor,
    if a product updates one of them, since the other must not change too. It is empty where they stay tied.
    """

    products: Mapping[str, tuple[Product | ExpertProduct, ...]]
    replaced: Mapping[str, TensorInfo]
    transposed: frozenset[str]
    untied: Mapping[str, TensorInfo]

    @property
    def vocab_size(self) -> int | None:
        """The size of the vocabulary, from an adapter's embedding or head; None for the base's."""
        rows = [info.shape[0] for name, info in self.replaced.items() if module_leaf(name) in VOCABULARY_MODULES]
        return max(rows, default=None)

    @property
    def layers(self) -> int:
        """The number of layers and parameters with a product. A parameter of experts may be stored as many tensors."""
        return len({product.layer for found in self.products.values() for product in found})

    @property
    def rescaled(self) -> bool:
        """Whether a product is DoRA's, which rescales the weight and does not only add to it."""
        return any(MAGNITUDE in product.parts for found in self.products.values() for product in found)


@dataclass(frozen=True)
class MergedTensor:
    """A tensor with its updates, and how many of its values are the same as before once they are stored."""

    tensor: torch.Tensor
    unchanged: int


@dataclass(frozen=True)
class _Adapter:
    """What an adapter's files hold: ``halves``, the factors of its products by layer, and ``others``, the tensors that
    replace the base's by name."""

    folder: Path
    config: Mapping[str, Any]
    halves: Mapping[str, Mapping[str, TensorInfo]]
    others: Mapping[str, TensorInfo]


class _NotStreamable(Exception):
    """An adapter cannot be applied one stored tensor at a time."""


def find_changes(adapters: Sequence[Path], base: Path, headers: Mapping[str, TensorInfo]) -> Changes | None:
    """Return what LoRA adapters change in a base's stored tensors, or None where PEFT has to merge in memory.

    ``find_origin`` has checked that the adapters' tensors fit the base.
    """
    skeleton = functools.cache(lambda: _skeleton(base))
    vocab_size = read_config(base).get("vocab_size")
    try:
        read = [_read_adapter(folder) for folder in adapters]
        untied = _untied(read, headers, vocab_size, skeleton)
        headers = {**headers, **untied}
        experts, rest = _find_experts(read, headers, base)
        taken = _find_taken(rest, headers, untied, vocab_size)
        products = _find_products(rest, headers)
    except _NotStreamable:
        return None
    if (taken.keys() | products.keys()) & experts.keys():
        return None
    return Changes({**products, **experts}, taken, _transposed(products, {**headers, **taken}, skeleton), untied)


def merged_tensor(changes: Changes, name: str, weight: torch.Tensor, dtype: torch.dtype) -> MergedTensor:
    """Return the base's tensor ``name`` with all updates, added in float32 and then rounded to ``dtype``.

    Raises UserError when the sum holds NaN or infinity.
    """
    if name in changes.replaced:
        weight = read_tensor(changes.replaced[name])
    if name not in changes.products:
        return MergedTensor(weight.to(dtype) if weight.is_floating_point() else weight, 0)
    products = changes.products[name]
    factors = [product.read() for product in products]
    result = torch.empty_like(weight, dtype=dtype)
    whole, target = (weight.T, result.T) if name in changes.transposed else (weight, result)
    if weight.dim() > 2:  # experts, concatenated
        whole, target = whole.flatten(0, -2), target.flatten(0, -2)

    def fill(first: int) -> int:
        rows = slice(first, first + step)
        former = whole[rows]
        piece = former.to(torch.float32, copy=True)
        for each in factors:
            piece = each.apply_to(piece, rows)
        target[rows] = piece
        if not is_finite(target[rows]):  # a sum may overflow its dtype
            where = str(next(iter(products[0].parts.values())).file.parent)
            raise UserError(f"the weights cannot be merged: {products[0].layer} would hold NaN or infinity", where)
        changed = torch.bitwise_xor(target[rows].view(bits), former.to(dtype).view(bits))
        return changed.numel() - int(torch.count_nonzero(changed))

    step, bits = max(1, PIECE // whole.shape[1]), BITS[dtype.itemsize]
    return MergedTensor(result, sum(workers().map(fill, range(0, whole.shape[0], step))))


def _skeleton(base: Path) -> PreTrainedModel:
    from lora_cli.model.base import load_config, meta_model

    return meta_model(load_config(base))


def _read_adapter(folder: Path) -> _Adapter:
    config, parts = read_adapter_config(folder), adapter_parts(folder)
    # PEFT would change the base first, or the tensors are not products to add to it.
    if config["peft_type"] != "LORA" or not keeps_base(config) or parts is None:
        raise _NotStreamable
    return _Adapter(folder, config, *parts)


def _untied(
    adapters: Sequence[_Adapter],
    headers: Mapping[str, TensorInfo],
    vocab_size: int | None,
    skeleton: Callable[[], PreTrainedModel],
) -> dict[str, TensorInfo]:
    """Return the embedding and the head of a tied base if a product updates one of them, else nothing: the names under
    which to store them, each with the place of its own stored tensor, or else of the other's."""
    layers = {f"{layer}.weight" for adapter in adapters for layer in adapter.halves}
    saved = {name for adapter in adapters for name in adapter.others}
    ends = _tied_ends(layers | saved, headers, vocab_size, skeleton)
    if layers.isdisjoint(ends):
        if not saved.isdisjoint(ends):
            raise _NotStreamable
        return {}
    places = {end: stored_name(end, headers) for end in ends}
    stored = next((headers[place] for place in places.values() if place is not None), None)
    if stored is None:
        raise _NotStreamable
    return {place or end: headers[place] if place else stored for end, place in places.items()}


def _tied_ends(
    names: Iterable[str],
    headers: Mapping[str, TensorInfo],
    vocab_size: int | None,
    skeleton: Callable[[], PreTrainedModel],
) -> tuple[str, ...]:
    """Return the names of the embedding's and the head's weights if these are tied. Empty if their stored values
    differ, whatever the configuration says, or if none of ``names`` could be one of them."""
    stored = {name: stored_name(name, headers) for name in names}
    if not any(
        module_leaf(name) in EMBEDDINGS or place is None or vocab_size in headers[place].shape
        for name, place in stored.items()
    ):
        return ()
    from lora_cli.model.base import ties_embeddings

    bare = skeleton()
    ends = (bare.get_input_embeddings(), bare.get_output_embeddings())
    if not ties_embeddings(bare.config):
        return ()
    weights = tuple(f"{name}.weight" for name, module in bare.named_modules() if module in ends)
    places = {place for weight in weights if (place := stored_name(weight, headers)) is not None}
    stored_ends = [read_tensor(headers[place]) for place in places]
    return weights if all(torch.equal(stored_ends[0], other) for other in stored_ends[1:]) else ()


def _find_experts(
    adapters: Sequence[_Adapter], headers: Mapping[str, TensorInfo], base: Path
) -> tuple[dict[str, tuple[ExpertProduct, ...]], list[_Adapter]]:
    """Return the products for experts by stored tensor, and the adapters without their factors for experts."""
    products: dict[str, tuple[ExpertProduct, ...]] = {}
    rest = []
    for adapter in adapters:
        halves = adapter.halves
        if adapter.config.get("target_parameters"):
            from lora_cli.weights.adapter.experts import find_experts

            found = find_experts(adapter.folder, adapter.config, halves, _skeleton(base), headers)
            if found is None:
                raise _NotStreamable
            own, stems = found
            products |= {stored: (*products.get(stored, ()), each) for stored, each in own.items()}
            halves = {layer: parts for layer, parts in halves.items() if layer not in stems}
        rest.append(replace(adapter, halves=halves))
    return products, rest


def _find_taken(
    adapters: Sequence[_Adapter],
    headers: Mapping[str, TensorInfo],
    untied: Mapping[str, TensorInfo],
    vocab_size: int | None,
) -> dict[str, TensorInfo]:
    """Return the adapters' tensors that replace the base's, by stored name."""
    taken: dict[str, TensorInfo] = {}
    for adapter in adapters:
        for name, info in adapter.others.items():
            stored = stored_name(name, headers)
            has_more = module_leaf(name) in VOCABULARY_MODULES and vocab_size is not None and info.shape[0] > vocab_size
            if stored is None or not (has_more or headers[stored].shape == info.shape):
                raise _NotStreamable
            taken[stored] = info
            if ".base_layer." in info.name and stored in untied:  # they were tied when it was saved
                taken |= {end: info for end in untied if end not in taken}
    return taken


def _find_products(adapters: Sequence[_Adapter], headers: Mapping[str, TensorInfo]) -> dict[str, tuple[Product, ...]]:
    """Return the adapters' products by stored tensor."""
    products: dict[str, tuple[Product, ...]] = {}
    for adapter in adapters:
        for layer, parts in adapter.halves.items():
            stored = stored_name(f"{layer}.weight", headers)
            if stored is None:
                raise _NotStreamable
            products[stored] = (*products.get(stored, ()), product_of(adapter.config, layer, parts))
    return products


def _transposed(
    products: Mapping[str, Sequence[Product]],
    headers: Mapping[str, TensorInfo],
    skeleton: Callable[[], PreTrainedModel],
) -> frozenset[str]:
    """Return the weights stored as (in, out). For square ones, the other weights or else the module's class decide."""
    square = {name for name in products if headers[name].shape[0] == headers[name].shape[-1]}
    wide = products.keys() - square
    transposed = {name for name in wide if headers[name].shape != products[name][0].shape}
    if not square or (wide and not transposed):
        return frozenset(transposed)
    if wide == transposed and wide:
        return frozenset(transposed | square)
    from transformers.pytorch_utils import Conv1D

    modules = {name: skeleton().get_submodule(products[name][0].layer) for name in square}
    return frozenset(transposed | {name for name, module in modules.items() if isinstance(module, Conv1D)})
