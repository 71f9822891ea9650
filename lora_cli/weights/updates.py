"""What adapters make of their base's stored tensors, a tensor at a time and in it a few rows at a time.

No more is held than a few of the largest tensors. Only LoRA's products and tensors that an adapter holds in place of
the base's are done so; ``find_changes`` says where PEFT has to merge a model in memory instead. Transformers and PEFT
are imported only where they are needed: that takes longer than many a merge.
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
from lora_cli.weights.adapter_config import is_relative, read_adapter_config
from lora_cli.weights.check_model import EMBEDDINGS, owner
from lora_cli.weights.pieces import workers
from lora_cli.weights.products import MAGNITUDE, Place, Product, adapter_parts, product_of
from lora_cli.weights.shards import TensorInfo, is_finite, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_cli.weights.experts import ExpertProduct

PIECE = 2**18
"""Numbers of a weight at once in a thread: what is made of them stays in the processor's cache."""
OF_WORDS = tuple(name for name in EMBEDDINGS if name not in ("wpe", "embed_positions"))
"""Embeddings and heads that have a row for each word."""
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types of a number's size: their comparison takes a fraction of the time."""


@dataclass(frozen=True)
class Changes:
    """What adapters make of a base: products to add and tensors to take instead, by the names the base stores.

    A product is added to what is taken where there are both. ``turned`` are the weights stored as (in, out), as GPT-2
    has them; ``untied`` are the embedding and the head of a base that has one tensor for both, with the place of that:
    an update of one of them is none of the other. Empty where they stay tied.
    """

    products: Mapping[str, tuple[Product | ExpertProduct, ...]]
    taken: Mapping[str, Place]
    turned: frozenset[str]
    untied: Mapping[str, TensorInfo]

    @property
    def words(self) -> int | None:
        """The size of the vocabulary where an adapter's embedding or head says it; None for the base's."""
        rows = [info.shape[0] for name, (_, info) in self.taken.items() if owner(name) in OF_WORDS]
        return max(rows, default=None)

    @property
    def layers(self) -> int:
        """How many layers and parameters have a product: what an adapter has of experts can be for many tensors."""
        return len({product.layer for found in self.products.values() for product in found})

    @property
    def rescaled(self) -> bool:
        """Whether a product is DoRA's, which changes the whole weight and not only adds to it."""
        return any(MAGNITUDE in product.parts for found in self.products.values() for product in found)


@dataclass(frozen=True)
class Summed:
    """A tensor with its updates in it, and how many of its numbers these leave as they were once they are stored."""

    tensor: torch.Tensor
    unchanged: int


@dataclass(frozen=True)
class _Adapter:
    """What an adapter's files hold: by layer the parts of its products, by name the tensors to take instead of the
    base's."""

    folder: Path
    config: Mapping[str, Any]
    halves: Mapping[str, Mapping[str, Place]]
    others: Mapping[str, Place]


class _NotByTensor(Exception):
    """What an adapter does cannot be done a stored tensor at a time."""


def find_changes(adapters: Sequence[Path], base: Path, headers: Mapping[str, TensorInfo]) -> Changes | None:
    """What LoRA adapters do to the tensors that a base stores; None where PEFT has to do it.

    ``trace`` has seen to it that the adapters' tensors are those that the base takes.
    """
    skeleton = functools.cache(lambda: _skeleton(base))
    words = read_config(base).get("vocab_size")
    try:
        read = [_read_adapter(folder) for folder in adapters]
        untied = _untied(read, headers, words, skeleton)
        headers = {**headers, **untied}
        experts, rest = _find_experts(read, headers, base)
        taken = _find_taken(rest, headers, untied, words)
        products = _find_products(rest, headers)
    except _NotByTensor:
        return None
    if (taken.keys() | products.keys()) & experts.keys():
        return None
    shaped = {**headers, **{name: info for name, (_, info) in taken.items()}}
    return Changes({**products, **experts}, taken, _turned(products, shaped, skeleton), untied)


def summed(changes: Changes, name: str, weight: torch.Tensor, dtype: torch.dtype) -> Summed:
    """The base's tensor ``name`` with all updates, added in float32 and then rounded to ``dtype``.

    Raises UserError when the sum is no number.
    """
    if name in changes.taken:
        own, info = changes.taken[name]
        weight = read_tensor(info, own)
    if name not in changes.products:
        return Summed(weight.to(dtype) if weight.is_floating_point() else weight, 0)
    products = changes.products[name]
    factors = [product.read() for product in products]
    result = torch.empty_like(weight, dtype=dtype)
    whole, target = (weight.T, result.T) if name in changes.turned else (weight, result)
    if weight.dim() > 2:  # experts, laid end to end
        whole, target = whole.flatten(0, -2), target.flatten(0, -2)

    def fill(first: int) -> int:
        rows = slice(first, first + step)
        former = whole[rows]
        piece = former.to(torch.float32, copy=True)
        for each in factors:
            piece = each.added_to(piece, rows)
        target[rows] = piece
        if not is_finite(target[rows]):  # a sum may be too large for its type
            where = str(next(iter(products[0].parts.values()))[1].file.parent)
            raise UserError(f"the weights cannot be merged: {products[0].layer} would hold NaN or infinity", where)
        changed = torch.bitwise_xor(target[rows].view(bits), former.to(dtype).view(bits))
        return changed.numel() - int(torch.count_nonzero(changed))

    step, bits = max(1, PIECE // whole.shape[1]), BITS[dtype.itemsize]
    return Summed(result, sum(workers().map(fill, range(0, whole.shape[0], step))))


def stored_name(name: str, headers: Mapping[str, TensorInfo]) -> str | None:
    """The name a model's tensor is stored under, if it is; checkpoints may leave out that of the model's body, as in
    h.0.attn for transformer.h.0.attn."""
    return next((each for each in (name, name.partition(".")[2]) if each in headers), None)


def _skeleton(base: Path) -> PreTrainedModel:
    from lora_cli.model.base import load_config, skeleton

    return skeleton(load_config(base))


def _read_adapter(folder: Path) -> _Adapter:
    config, parts = read_adapter_config(folder), adapter_parts(folder)
    if config["peft_type"] != "LORA" or is_relative(config) or parts is None:  # no products of the base as it is stored
        raise _NotByTensor
    return _Adapter(folder, config, *parts)


def _untied(
    adapters: Sequence[_Adapter],
    headers: Mapping[str, TensorInfo],
    words: int | None,
    skeleton: Callable[[], PreTrainedModel],
) -> dict[str, TensorInfo]:
    """The embedding and the head of a base that has one tensor for both, where a product is for one of them: by the
    names they are to be stored under, with the places of their own or of the one that the base stores."""
    layers = {f"{layer}.weight" for adapter in adapters for layer in adapter.halves}
    saved = {name for adapter in adapters for name in adapter.others}
    ends = _tied_ends(layers | saved, headers, words, skeleton)
    if layers.isdisjoint(ends):
        if not saved.isdisjoint(ends):
            raise _NotByTensor
        return {}
    places = {end: stored_name(end, headers) for end in ends}
    stored = next((headers[place] for place in places.values() if place is not None), None)
    if stored is None:
        raise _NotByTensor
    return {place or end: headers[place] if place else stored for end, place in places.items()}


def _tied_ends(
    names: Iterable[str],
    headers: Mapping[str, TensorInfo],
    words: int | None,
    skeleton: Callable[[], PreTrainedModel],
) -> tuple[str, ...]:
    """The names of the embedding's and the head's weight where these are the same numbers; none where they are not,
    whatever the configuration says, or none of ``names`` could be one of them."""
    stored = {name: stored_name(name, headers) for name in names}
    if not any(
        owner(name) in EMBEDDINGS or place is None or words in headers[place].shape for name, place in stored.items()
    ):
        return ()
    from lora_cli.model.base import ties_words

    bare = skeleton()
    ends = (bare.get_input_embeddings(), bare.get_output_embeddings())
    if not ties_words(bare.config):
        return ()
    weights = tuple(f"{name}.weight" for name, module in bare.named_modules() if module in ends)
    places = {place for weight in weights if (place := stored_name(weight, headers)) is not None}
    stored_ends = [read_tensor(headers[place], place) for place in places]
    return weights if all(torch.equal(stored_ends[0], other) for other in stored_ends[1:]) else ()


def _find_experts(
    adapters: Sequence[_Adapter], headers: Mapping[str, TensorInfo], base: Path
) -> tuple[dict[str, tuple[ExpertProduct, ...]], list[_Adapter]]:
    """The products for experts by stored tensor, and the adapters without what they have of these."""
    products: dict[str, tuple[ExpertProduct, ...]] = {}
    rest = []
    for adapter in adapters:
        halves = adapter.halves
        if adapter.config.get("target_parameters"):
            from lora_cli.weights.experts import find_experts

            found = find_experts(adapter.folder, adapter.config, halves, _skeleton(base), headers)
            if found is None:
                raise _NotByTensor
            products |= {stored: (*products.get(stored, ()), each) for stored, each in found.products.items()}
            halves = {layer: parts for layer, parts in halves.items() if layer not in found.stems}
        rest.append(replace(adapter, halves=halves))
    return products, rest


def _find_taken(
    adapters: Sequence[_Adapter],
    headers: Mapping[str, TensorInfo],
    untied: Mapping[str, TensorInfo],
    words: int | None,
) -> dict[str, Place]:
    """The adapters' tensors that stand for the base's, by stored tensor."""
    taken: dict[str, Place] = {}
    for adapter in adapters:
        for name, (own, info) in adapter.others.items():
            stored = stored_name(name, headers)
            if stored is None or (headers[stored].shape != info.shape and not _has_more_words(name, info, words)):
                raise _NotByTensor
            taken[stored] = (own, info)
            if ".base_layer." in own and stored in untied:  # what was tied when it was saved
                taken |= {end: (own, info) for end in untied if end not in taken}
    return taken


def _find_products(adapters: Sequence[_Adapter], headers: Mapping[str, TensorInfo]) -> dict[str, tuple[Product, ...]]:
    """The adapters' products by stored tensor."""
    products: dict[str, tuple[Product, ...]] = {}
    for adapter in adapters:
        for layer, parts in adapter.halves.items():
            stored = stored_name(f"{layer}.weight", headers)
            if stored is None:
                raise _NotByTensor
            products[stored] = (*products.get(stored, ()), product_of(adapter.config, layer, parts))
    return products


def _has_more_words(name: str, info: TensorInfo, words: int | None) -> bool:
    return owner(name) in OF_WORDS and words is not None and info.shape[0] > words


def _turned(
    products: Mapping[str, Sequence[Product]],
    headers: Mapping[str, TensorInfo],
    skeleton: Callable[[], PreTrainedModel],
) -> frozenset[str]:
    """The weights stored as (in, out). A square one's shape does not tell: it is as all the others are."""
    square = {name for name in products if headers[name].shape[0] == headers[name].shape[-1]}
    wide = products.keys() - square
    turned = {name for name in wide if headers[name].shape != products[name][0].shape}
    if not square or (wide and not turned):
        return frozenset(turned)
    if wide == turned and wide:
        return frozenset(turned | square)
    from transformers.pytorch_utils import Conv1D

    modules = {name: skeleton().get_submodule(products[name][0].layer) for name in square}
    return frozenset(turned | {name for name, module in modules.items() if isinstance(module, Conv1D)})
