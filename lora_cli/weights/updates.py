"""What adapters make of their base's stored tensors, a tensor at a time and in it a few rows at a time.

No more is held than a few of the largest tensors. Only LoRA's products and tensors that an adapter holds in place of
the base's are done so; ``find_changes`` says where PEFT has to merge a model in memory instead. Transformers and PEFT
are imported only where they are needed: that takes longer than many a merge.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_cli.errors import UserError
from lora_cli.model.files import read_config
from lora_cli.weights.check import ADAPTER_WEIGHTS, EMBEDDINGS, PEFT_PREFIX, read_adapter_config
from lora_cli.weights.pieces import workers
from lora_cli.weights.shards import TensorInfo, read_headers, read_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PIECE = 2**18
"""Numbers of a weight at once in a thread: what is made of them stays in the processor's cache."""
BITS = {2: torch.int16, 4: torch.int32}
"""Types of a number's size: their comparison takes a fraction of the time."""
LINEAR = {"A.weight", "B.weight"}
EMBEDDING = {"embedding_A", "embedding_B"}
MAGNITUDE = "magnitude_vector"

Place = tuple[str, TensorInfo]
"""A tensor's name in its file, and the file."""


@dataclass(frozen=True)
class Factors:
    """s UD of a weight (rows, columns), in float32: ``up`` (rows, r), ``down`` (r, columns), DoRA's ``magnitude``
    (rows,)."""

    up: torch.Tensor
    down: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None

    def added_to(self, piece: torch.Tensor, rows: slice) -> torch.Tensor:
        """W + s UD of some rows, in place; scaled to DoRA's magnitudes if there are any (arXiv:2402.09353, eq. 5)."""
        piece.add_((self.up[rows] @ self.down).mul_(self.scaling))
        if self.magnitude is not None:
            piece.mul_((self.magnitude[rows] / piece.norm(dim=1))[:, None])
        return piece


@dataclass(frozen=True)
class Product:
    """Where the parts of a layer's update lie. An embedding's are stored the other way round."""

    layer: str
    parts: Mapping[str, Place]
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the update: (out, in), an embedding's (tokens, width)."""
        shapes = {part: info.shape for part, (_, info) in self.parts.items()}
        if shapes.keys() >= EMBEDDING:
            return shapes["embedding_A"][1], shapes["embedding_B"][0]
        return shapes["B.weight"][0], shapes["A.weight"][1]

    @property
    def rank(self) -> int:
        """Of the update."""
        shapes = {part: info.shape for part, (_, info) in self.parts.items()}
        return shapes["embedding_A" if shapes.keys() >= EMBEDDING else "A.weight"][0]

    def read(self) -> Factors:
        """The update as it is to be added to the weight of its shape."""
        read = {part: read_tensor(info, name).float() for part, (name, info) in self.parts.items()}
        if read.keys() >= EMBEDDING:
            return Factors(read["embedding_A"].T, read["embedding_B"].T, self.scaling, None)
        return Factors(read["B.weight"], read["A.weight"], self.scaling, read.get(MAGNITUDE))


@dataclass(frozen=True)
class Changes:
    """What adapters make of a base: products to add and tensors to take instead, by the names the base stores.

    ``turned`` are the weights stored as (in, out), as GPT-2 has them.
    """

    products: Mapping[str, tuple[Product, ...]]
    taken: Mapping[str, Place]
    turned: frozenset[str]

    @property
    def words(self) -> int | None:
        """The size of the vocabulary where an adapter's embedding or head says it; None for the base's."""
        rows = [info.shape[0] for name, (_, info) in self.taken.items() if name.split(".")[-2] in EMBEDDINGS]
        return max(rows, default=None)

    @property
    def rescaled(self) -> bool:
        """Whether a product is DoRA's, which changes the whole weight and not only adds to it."""
        return any(MAGNITUDE in product.parts for found in self.products.values() for product in found)


@dataclass(frozen=True)
class Summed:
    """A tensor with its updates in it, and how many of its numbers these leave as they were once they are stored."""

    tensor: torch.Tensor
    unchanged: int


def find_changes(adapters: Sequence[Path], base: Path, headers: Mapping[str, TensorInfo]) -> Changes | None:
    """What LoRA adapters do to the tensors that a base stores; None where PEFT has to do it."""
    skeleton = functools.cache(lambda: _skeleton(base))
    words = read_config(base).get("vocab_size")
    products: dict[str, tuple[Product, ...]] = {}
    taken: dict[str, Place] = {}
    for folder in adapters:
        config, read = read_adapter_config(folder), adapter_parts(folder)
        if config["peft_type"] != "LORA" or read is None or config.get("target_parameters"):
            return None
        halves, others = read
        found = {name: stored_name(name, headers) for name in (*others, *(f"{layer}.weight" for layer in halves))}
        for name, stored in found.items():
            if stored is None or _is_tied(name, headers[stored], words, skeleton):
                return None
        for name, (own, info) in others.items():
            stored = found[name]
            if stored is None or (headers[stored].shape != info.shape and not _has_more_words(name, info, words)):
                return None
            taken[stored] = (own, info)
        for layer, parts in halves.items():
            stored = found[f"{layer}.weight"]
            assert stored is not None
            product = Product(layer, parts, scaling_of(config, layer, parts))
            products[stored] = (*products.get(stored, ()), product)
    if taken.keys() & products.keys():
        return None
    return Changes(products, taken, _turned(products, headers, skeleton))


def summed(changes: Changes, name: str, weight: torch.Tensor, dtype: torch.dtype) -> Summed:
    """The base's tensor ``name`` with all updates, added in float32 and then rounded to ``dtype``.

    Raises UserError when the sum is no number.
    """
    if name in changes.taken:
        own, info = changes.taken[name]
        return Summed(read_tensor(info, own).to(dtype), 0)
    if name not in changes.products:
        return Summed(weight.to(dtype) if weight.is_floating_point() else weight, 0)
    products = changes.products[name]
    factors = [product.read() for product in products]
    result = torch.empty_like(weight, dtype=dtype)
    whole, target = (weight.T, result.T) if name in changes.turned else (weight, result)

    def fill(first: int) -> int:
        rows = slice(first, first + step)
        former = whole[rows]
        piece = former.to(torch.float32, copy=True)
        for each in factors:
            piece = each.added_to(piece, rows)
        if not all(map(math.isfinite, torch.aminmax(piece))):
            where = str(next(iter(products[0].parts.values()))[1].file.parent)
            raise UserError(f"the weights cannot be merged: {products[0].layer} would hold NaN or infinity", where)
        target[rows] = piece
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


def adapter_parts(folder: Path) -> tuple[dict[str, dict[str, Place]], dict[str, Place]] | None:
    """The parts of an adapter's products by layer, and its other tensors; None when it holds parts of other kinds."""
    halves: dict[str, dict[str, Place]] = {}
    others: dict[str, Place] = {}
    for name, info in read_headers([folder / ADAPTER_WEIGHTS]).items():
        layer, is_part, part = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").partition(".lora_")
        if is_part:
            halves.setdefault(layer, {})[part] = (name, info)
        else:
            others[layer] = (name, info)
    kinds = (LINEAR, LINEAR | {MAGNITUDE}, EMBEDDING)
    return (halves, others) if all(parts.keys() in kinds for parts in halves.values()) else None


def _is_tied(name: str, info: TensorInfo, words: int | None, skeleton: Callable[[], PreTrainedModel]) -> bool:
    """Whether the tensor is one of the two that may hold the same numbers, the embedding's and the head's."""
    layer = name.rpartition(".")[0]
    if layer.rpartition(".")[2] not in EMBEDDINGS and words not in info.shape:
        return False
    bare = skeleton()
    ends = (bare.get_input_embeddings(), bare.get_output_embeddings())
    return bool(bare.config.get_text_config().tie_word_embeddings) and bare.get_submodule(layer) in ends


def _has_more_words(name: str, info: TensorInfo, words: int | None) -> bool:
    return name.split(".")[-2] in EMBEDDINGS and words is not None and info.shape[0] > words


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


def scaling_of(config: Mapping[str, Any], layer: str, parts: Mapping[str, Place]) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732); an alpha of the layer's own in ``alpha_pattern``,
    whose keys are the ends of names, or regular expressions for them."""
    rank = parts["embedding_A" if parts.keys() >= EMBEDDING else "A.weight"][1].shape[0]
    patterns = config.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
