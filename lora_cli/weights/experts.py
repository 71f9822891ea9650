"""LoRA of experts (PEFT's ``target_parameters``): a product for each, wherever the base stores that expert.

Models hold the experts of a layer in one tensor; checkpoints hold each by itself, or the gate's and the up projection's
apart. Which tensors a parameter is made of Transformers says, as it does when it loads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lora_cli.weights.products import Factors, Place, scaling_of
from lora_cli.weights.shards import TensorInfo, read_tensor
from lora_cli.weights.stored_names import converters_of, sources_of

KEPT = 4
"""Parts of an adapter that are held: those of a layer, which a hundred stored tensors need one after another."""


@dataclass(frozen=True)
class Stacked:
    """s U_e D_e of the experts' weights (experts, rows, columns), laid end to end as (experts * rows, columns); in
    float32: ``up`` (experts, rows, r), ``down`` (experts, r, columns)."""

    up: torch.Tensor
    down: torch.Tensor
    scaling: float

    def added_to(self, piece: torch.Tensor, rows: slice) -> torch.Tensor:
        """W + s UD of some rows, in place."""
        height = self.up.shape[1]
        first, last = rows.start, rows.start + len(piece)
        for expert in range(first // height, (last - 1) // height + 1):
            start, end = max(first, expert * height), min(last, (expert + 1) * height)
            up = self.up[expert, start - expert * height : end - expert * height]
            piece[start - first : end - first].addmm_(up, self.down[expert], alpha=self.scaling)
        return piece


@dataclass(frozen=True)
class ExpertProduct:
    """Where the parts of a parameter's update lie: A (experts * r, in) has an expert's rows together, B
    (out, r * experts) its columns ``experts`` apart.

    The stored tensor that it is for holds these ``rows`` of one ``expert``, or of all where that is None. ``turned``
    says that the model holds an expert as (in, out), ``read_part`` reads a part in float32.
    """

    layer: str
    parts: Mapping[str, Place]
    scaling: float
    experts: int
    turned: bool
    expert: int | None
    rows: slice
    read_part: Callable[[Place], torch.Tensor]

    def read(self) -> Factors | Stacked:
        """The update as it is to be added to the stored tensor."""
        a, b = self.read_part(self.parts["A.weight"]), self.read_part(self.parts["B.weight"])
        down = a.view(self.experts, -1, a.shape[1])
        up = b.view(b.shape[0], -1, self.experts).permute(2, 0, 1)
        if self.turned:
            up, down = down.transpose(1, 2), up.transpose(1, 2)
        if self.expert is None:
            return Stacked(up[:, self.rows], down, self.scaling)
        return Factors(up[self.expert, self.rows], down[self.expert], self.scaling, None)


def _read(place: Place) -> torch.Tensor:
    name, info = place
    return read_tensor(info, name).float()


@dataclass(frozen=True)
class _Parameter:
    """A model's parameter that an adapter is for: its shape (experts, rows, columns), one expert where it has no more;
    ``stem`` is how the adapter's tensors for it are named."""

    name: str
    stem: str
    shape: tuple[int, int, int]
    turned: bool


@dataclass(frozen=True)
class Found:
    """The products of an adapter's experts by stored tensor, and what its own tensors for them are named by."""

    products: Mapping[str, ExpertProduct]
    stems: frozenset[str]


def find_experts(
    folder: Path,
    config: Mapping[str, Any],
    halves: Mapping[str, Mapping[str, Place]],
    bare: PreTrainedModel,
    headers: Mapping[str, TensorInfo],
) -> Found | None:
    """What the adapter in ``folder`` adds to stored tensors as ``target_parameters``; None where these are not the
    parameters' parts as they stand. ``halves`` are the adapter's tensors, ``bare`` is the model on meta, which is
    adapted.
    """
    converters = converters_of(bare)
    sources = sources_of(bare, headers)
    products: dict[str, ExpertProduct] = {}
    parameters = list(_parameters(folder, bare))
    read_part = functools.lru_cache(maxsize=KEPT)(_read)
    for parameter in parameters:
        parts = halves[parameter.stem]
        rank = parts["A.weight"][1].shape[0] // parameter.shape[0]
        scaling = scaling_of(config, parameter.name, rank)
        places = _places(parameter.shape, sources.get(parameter.name, {}), headers, converters)
        if places is None:
            return None
        for stored, expert, rows in places:
            count, turned = parameter.shape[0], parameter.turned
            products[stored] = ExpertProduct(parameter.name, parts, scaling, count, turned, expert, rows, read_part)
    stems = frozenset(parameter.stem for parameter in parameters)
    return Found(products, stems)


def _parameters(folder: Path, bare: PreTrainedModel) -> Iterator[_Parameter]:
    """The parameters that an adapter is for, and where PEFT keeps what it has for each: wrappers inside wrappers."""
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    config.init_lora_weights = True  # there are no weights to begin from
    config.rank_pattern, config.alpha_pattern = {}, {}  # which the names do not depend on
    for stem, module in inject_adapter_in_model(config, bare, low_cpu_mem_usage=True).named_modules():
        if isinstance(module, ParamWrapper):
            shape = tuple(module.get_param().shape)
            turned = len(shape) == 3 and bool(getattr(module.get_base_layer(), "is_transposed", False))
            name = f"{stem.replace('.base_layer', '')}.{module.parameter_name}"
            yield _Parameter(name, stem, (1, *shape) if len(shape) == 2 else shape, turned)


def _places(
    shape: tuple[int, int, int],
    sources: Mapping[str, str | None],
    headers: Mapping[str, TensorInfo],
    converters: list[WeightConverter],
) -> list[tuple[str, int | None, slice]] | None:
    """The stored tensors of a parameter, with which expert each holds (None for all) and which of its rows."""
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
    """Whether a converter stacks the experts and lays what is stored apart of each end to end, and nothing else."""
    match converter.operations:
        case [MergeModulelist(dim=0)]:
            return len(converter.source_patterns) == 1
        case [MergeModulelist(dim=0), Concatenate(dim=1)]:
            return True
    return False
