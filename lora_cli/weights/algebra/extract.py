"""Extract the LoRA adapter nearest to a fully fine-tuned model: the SVD of each layer's difference, one at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import Fault, UserError, grouped_error
from lora_cli.model.base import load_config, meta_model
from lora_cli.model.files import copy_tokenizer
from lora_cli.model.layers import adaptable_layers
from lora_cli.system.folders import atomic_folder
from lora_cli.weights.adapter.adapter_config import ADAPTER_WEIGHTS, PEFT_PREFIX
from lora_cli.weights.algebra.lora_adapter import Base, write_plain_config, write_record
from lora_cli.weights.algebra.spectrum import spectrum_of_matrix
from lora_cli.weights.files.check_model import check_weights
from lora_cli.weights.files.fingerprint import fingerprint
from lora_cli.weights.files.shards import SINGLE, TensorInfo, check_finite, model_headers, read_tensor, stored_name
from lora_cli.weights.files.stream import shard_writer


@dataclass(frozen=True)
class ExtractedLayer:
    """A layer of the adapter, its rank, and the share of the difference's squared norm that it keeps."""

    name: str
    rank: int
    energy: float


@dataclass(frozen=True)
class Extracted:
    """The adapter that was written. ``left_out`` are tensors that differ but are not a linear layer's weight: the
    adapter does not include them."""

    out: Path
    layers: tuple[ExtractedLayer, ...]
    left_out: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Pair:
    """A layer's weight in both models; ``transposed``: stored as (in, out)."""

    base: TensorInfo
    tuned: TensorInfo
    transposed: bool

    def difference(self) -> torch.Tensor:
        """Return tuned minus base, (out, in), in float32. Raises UserError when either holds NaN or infinity."""
        found = []
        for info in (self.base, self.tuned):
            found.append(read_tensor(info).float())
            check_finite(found[-1], info.name, info.file)
        delta = found[1] - found[0]
        return delta.T if self.transposed else delta


def extract(base: Path, name: str, tuned: Path, rank: int | None, energy: float | None, out: Path) -> Extracted:
    """Write to ``out`` the adapter for ``base`` (named ``name``) that is nearest to ``tuned``, with a scaling of 1.
    Each layer has this rank, or the smallest rank that keeps the share ``energy`` of its difference's squared norm.

    Raises UserError when the models' layers do not match, a tensor holds NaN or infinity, or no layer differs.
    """
    model, made = meta_model(load_config(base)), meta_model(load_config(tuned))
    check_weights(base, model)
    check_weights(tuned, made)
    headers = model_headers(base), model_headers(tuned)
    pairs = _pairs(model, *headers, tuned)
    used = {info.name for pair in pairs.values() for info in (pair.base, pair.tuned)}
    left_out = tuple(_other_differences((made, model), *headers, used))
    layers = []
    with atomic_folder(out) as draft:
        announced = [f"{PEFT_PREFIX}{layer}.lora_{half}.weight" for layer in pairs for half in "AB"]
        with shard_writer(draft, announced, sys.maxsize) as write:
            for layer, pair in pairs.items():
                delta = pair.difference()
                if delta.any():
                    spectrum = spectrum_of_matrix(delta)
                    own = spectrum.rank_for(energy or 1.0) if rank is None else min(rank, *delta.shape)
                    up, down = spectrum.factors(own)
                    write(f"{PEFT_PREFIX}{layer}.lora_A.weight", down)
                    write(f"{PEFT_PREFIX}{layer}.lora_B.weight", up)
                    layers.append(ExtractedLayer(layer, own, spectrum.energy(own)))
        (draft / SINGLE).rename(draft / ADAPTER_WEIGHTS)
        if not layers:
            raise UserError("no linear layer's weight differs from the base's", str(tuned), f"the base is {base}")
        ranks = {layer.name: layer.rank for layer in layers}
        write_plain_config(draft, name, ranks, any(pair.transposed for pair in pairs.values()))
        of = [{"name_or_path": str(tuned.resolve()), "fingerprint": fingerprint(tuned)}]
        by = {"by": "extract", "rank": rank, "energy": energy}
        write_record(draft, out, Base(name, fingerprint(base)), by, of, {})
        copy_tokenizer(tuned, draft)
    return Extracted(out, tuple(layers), left_out, (out / ADAPTER_WEIGHTS).stat().st_size)


def _pairs(
    model: PreTrainedModel, base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], folder: Path
) -> dict[str, Pair]:
    """Return the linear layers' weights in both models. Raises UserError if one is missing or differs in shape."""
    pairs, faults = {}, []
    for layer in adaptable_layers(model):
        own = f"{layer}.weight"
        names = stored_name(own, base), stored_name(own, tuned)
        if names[0] is None or names[1] is None:
            which = "the base" if names[0] is None else "this model"
            faults.append(Fault(f"tensor {own} is not in {which}", str(folder)))
            continue
        here, there = base[names[0]], tuned[names[1]]
        if here.shape != there.shape:
            what = f"tensor {names[1]} has shape {list(there.shape)}, the base's {list(here.shape)}"
            faults.append(Fault(what, str(folder)))
            continue
        transposed = isinstance(model.get_submodule(layer), Conv1D)
        pairs[layer] = Pair(here, there, transposed)
    if faults:
        raise grouped_error(faults, "give a model that was made from this base")
    return pairs


def _other_differences(
    models: Sequence[PreTrainedModel], base: Mapping[str, TensorInfo], tuned: Mapping[str, TensorInfo], used: set[str]
) -> Iterator[str]:
    """Yield the tensors besides ``used`` that differ. A tensor that one model lacks is compared with the one it is tied
    to, if stored there. Otherwise it differs if it is a parameter, which masks stored by older versions are not."""
    prefix = f"{models[-1].base_model_prefix}."
    places = [
        {name.removeprefix(prefix): info for name, info in headers.items() if name not in used}
        for headers in (base, tuned)
    ]
    own: dict[str, str] = {}
    for model in models:
        first = {parameter: name.removeprefix(prefix) for name, parameter in model.named_parameters()}
        every = model.named_parameters(remove_duplicate=False)
        own |= {name.removeprefix(prefix): first[parameter] for name, parameter in every}
    for name in sorted(places[0].keys() | places[1].keys()):
        here, there = (each.get(name) or each.get(own.get(name, name)) for each in places)
        if here is None or there is None:
            differs = name in own
        else:
            differs = not torch.equal(read_tensor(here).float(), read_tensor(there).float())
        if differs:
            yield name
