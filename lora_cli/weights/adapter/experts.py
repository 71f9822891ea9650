"""LoRA of experts (PEFT's ``target_parameters``): one product for each stored tensor that holds an expert's weights.

Models hold the experts of a layer in one tensor. Checkpoints may store each expert, and its gate and up projections,
separately. Transformers' loading rules say which stored tensors make up a parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lora_cli.weights.adapter.products import Factors, scaling_of
from lora_cli.weights.files.shards import TensorInfo, read_tensor
from lora_cli.weights.files.stored_model import converters_of, sources_of

KEPT = 4
"""Factors that are cached: those of one layer, which a hundred stored tensors need one after another."""


@dataclass(frozen=True)
class Stacked:
    """The updates s U_e D_e of all experts' weights, (experts, rows, columns), flattened to (experts * rows, columns).
    In float32: ``up`` (experts, rows, r), ``down`` (experts, r, columns)."""

    up: torch.Tensor
    down: torch.Tensor
    scaling: float

    def apply_to(self, piece: torch.Tensor, rows: slice) -> torch.Tensor:
        """Add s UD in place to ``piece``, these ``rows`` of W."""
        height = self.up.shape[1]
        first, last = rows.start, rows.start + len(piece)
        for expert in range(first // height, (last - 1) // height + 1):
            start, end = max(first, expert * height), min(last, (expert + 1) * height)
            up = self.up[expert, start - expert * height : end - expert * height]
            piece[start - first : end - first].addmm_(up, self.down[expert], alpha=self.scaling)
        return piece


@dataclass(frozen=True)
class ExpertProduct:
    """Where the factors of a parameter's update are stored. In A (experts * r, in), an expert's rows are contiguous; in
    B (out, r * experts), its columns are ``experts`` apart.

    The stored tensor to update holds these ``rows`` of one ``expert``, or of all experts when that is None.
    ``transposed``: the model holds an expert as (in, out). ``read_part`` reads a factor in float32.
    """

    layer: str
    parts: Mapping[str, TensorInfo]
    scaling: float
    experts: int
    transposed: bool
    expert: int | None
    rows: slice
    read_part: Callable[[TensorInfo], torch.Tensor]

    def read(self) -> Factors | Stacked:
        """Read the update, laid out like the stored tensor."""
        a, b = self.read_part(self.parts["A.weight"]), self.read_part(self.parts["B.weight"])
        down = a.view(self.experts, -1, a.shape[1])
        up = b.view(b.shape[0], -1, self.experts).permute(2, 0, 1)
        if self.transposed:
            up, down = down.transpose(1, 2), up.transpose(1, 2)
        if self.expert is None:
            return Stacked(up[:, self.rows], down, self.scaling)
        return Factors(up[self.expert, self.rows], down[self.expert], self.scaling)


def _read(part: TensorInfo) -> torch.Tensor:
    return read_tensor(part).float()


@dataclass(frozen=True)
class _Parameter:
    """A model's parameter that an adapter updates. ``shape`` is (experts, rows, columns), with one expert for a matrix.
    The names of the adapter's tensors for it begin with ``stem``."""

    name: str
    stem: str
    shape: tuple[int, int, int]
    transposed: bool


def find_experts(
    folder: Path,
    config: Mapping[str, Any],
    halves: Mapping[str, Mapping[str, TensorInfo]],
    bare: PreTrainedModel,
    headers: Mapping[str, TensorInfo],
) -> tuple[dict[str, ExpertProduct], set[str]] | None:
    """Return what the adapter in ``folder`` adds to stored tensors through ``target_parameters``, and the stem of each
    such parameter. None where a stored tensor is not simply a part of one. ``halves`` are the adapter's tensors. The
    adapter is injected into ``bare``, the model on the meta device.
    """
    converters = converters_of(bare)
    sources = sources_of(bare, headers)
    products: dict[str, ExpertProduct] = {}
    parameters = list(_parameters(folder, bare))
    read_part = functools.lru_cache(maxsize=KEPT)(_read)
    for parameter in parameters:
        parts = halves[parameter.stem]
        rank = parts["A.weight"].shape[0] // parameter.shape[0]
        scaling = scaling_of(config, parameter.name, rank)
        places = _places(parameter.shape, sources.get(parameter.name, {}), headers, converters)
        if places is None:
            return None
        for stored, expert, rows in places:
            count, transposed = parameter.shape[0], parameter.transposed
            products[stored] = ExpertProduct(parameter.name, parts, scaling, count, transposed, expert, rows, read_part)
    return products, {parameter.stem for parameter in parameters}


def _parameters(folder: Path, bare: PreTrainedModel) -> Iterator[_Parameter]:
    """Yield the parameters that an adapter updates. PEFT holds the factors of each in wrappers, which may be nested."""
    config = LoraConfig.from_pretrained(str(folder))
    config.init_lora_weights = True  # there are no weights to initialize from
    config.rank_pattern, config.alpha_pattern = {}, {}  # names do not depend on these
    for stem, module in inject_adapter_in_model(config, bare, low_cpu_mem_usage=True).named_modules():
        if isinstance(module, ParamWrapper):
            shape = tuple(module.get_param().shape)
            transposed = len(shape) == 3 and bool(getattr(module.get_base_layer(), "is_transposed", False))
            name = f"{stem.replace('.base_layer', '')}.{module.parameter_name}"
            yield _Parameter(name, stem, (1, *shape) if len(shape) == 2 else shape, transposed)


def _places(
    shape: tuple[int, int, int],
    sources: Mapping[str, str | None],
    headers: Mapping[str, TensorInfo],
    converters: list[WeightConverter],
) -> list[tuple[str, int | None, slice]] | None:
    """Return a parameter's stored tensors, with the expert (None for all) and the expert's rows that each holds; None
    where stored tensors are not simply parts of the parameter."""
    count, height, width = shape
    found = {stored: headers[stored].shape for stored in sources}
    if len(sources) == 1 and None in sources.values():
        ((stored, own),) = found.items()
        whole = own == shape or (count == 1 and own == shape[1:])
        return [(stored, None if own == shape else 0, slice(None))] if whole else None
    converter = next((each for each in converters if {*each.source_patterns} == {*sources.values()}), None)
    if converter is None or not joins_experts(converter):
        return None
    rows = height // len(converter.source_patterns)
    places: list[tuple[str, int | None, slice]] = []
    for number, pattern in enumerate(converter.source_patterns):
        stored_experts = [stored for stored, own in sources.items() if own == pattern]
        if [found[stored] for stored in stored_experts] != [(rows, width)] * count:
            return None
        part = slice(number * rows, (number + 1) * rows)
        places += [(stored, expert, part) for expert, stored in enumerate(stored_experts)]
    return places


def joins_experts(converter: WeightConverter) -> bool:
    """Whether a converter only stacks experts and, if their projections are stored separately, concatenates these."""
    match converter.operations:
        case [MergeModulelist(dim=0)]:
            return len(converter.source_patterns) == 1
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return True
    return False
