"""Fold an adapter into its base: W + (alpha / r) BA for LoRA (arXiv:2106.09685, section 4.1).

Tensor by tensor, from file to file: no more memory than a few of the largest tensors. Where an adapter holds more than
LoRA's products, or the base's files have other names than its layers, PEFT merges in memory.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import UserError
from lora_cli.model.adapters import load_adapter
from lora_cli.model.base import DTYPES, load_base, load_config, load_tokenizer, skeleton
from lora_cli.recipe.schema import Model
from lora_cli.weights.check import ADAPTER_WEIGHTS, OTHER_TENSORS, PEFT_PREFIX, adapted_layers, read_adapter_config
from lora_cli.weights.provenance import PROVENANCE, AdapterOrigin
from lora_cli.weights.quantize import expand_quantized, quantized_layers, roundtrip
from lora_cli.weights.shards import (
    INDEX,
    TensorInfo,
    check_out,
    read_headers,
    rewrite,
    stored_dtype,
    weight_files,
    whole_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Merged:
    """What a merge wrote. ``into`` says which weights the adapter was added to."""

    out: Path
    base: str
    modules: int
    into: str
    dtype: str
    bytes: int


def merge(origin: AdapterOrigin, out: Path) -> Merged:
    """Write the base with the adapter folded in to ``out``: weights in the base's dtype, tokenizer, generation config.

    The sum is taken in float32. An adapter that was trained on a quantized base is added to that base's weights as
    training saw them (quantized and expanded again), which is what it was fitted to.

    Raises UserError when ``out`` will not do or the sum is no number; ``trace`` has checked adapter and base.
    """
    check_out(out)
    adapter = origin.folder
    files = weight_files(origin.base)
    headers = read_headers(files)
    dtype = stored_dtype(headers)
    quantization = origin.recipe.quantization if origin.recipe else None
    bare = skeleton(load_config(origin.base))
    updates = find_updates(adapter, bare, headers)
    modules = len(adapted_layers(adapter))
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else origin.base)
    with whole_folder(out, needed=sum(file.stat().st_size for file in files)) as draft:
        if updates is None:
            _merge_in_memory(origin, headers, dtype, draft)
        else:
            expanded = stored_names(quantized_layers(bare, quantization), bare, headers) if quantization else {}
            seen = DTYPES[origin.dtype] if origin.dtype else dtype

            def sum_of(name: str, weight: torch.Tensor) -> torch.Tensor:
                turned = expanded[name] if name in expanded else updates[name].turned
                whole = (weight.T if turned else weight).contiguous()
                if name in expanded:
                    assert quantization is not None
                    whole = roundtrip(quantization)(whole.to(seen))
                whole = updates[name].added_to(whole.float()) if name in updates else whole
                return (whole.T if turned else whole).to(weight.dtype).contiguous()

            for file in files:
                rewrite(file, draft / file.name, updates.keys() | expanded.keys(), sum_of)
            for name in (INDEX, "config.json"):
                if (origin.base / name).is_file():
                    shutil.copyfile(origin.base / name, draft / name)
        tokenizer.save_pretrained(str(draft))
        for folder, name in ((origin.base, "generation_config.json"), (adapter, PROVENANCE)):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, draft / name)
    size = sum(file.stat().st_size for file in weight_files(out))
    into = f"the base in {quantization.method}, expanded" if quantization else "the base"
    return Merged(out, origin.base_name, modules, into, str(dtype).removeprefix("torch."), size)


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight, which its file may hold ``turned``, as (in, out)."""

    turned: bool
    scaling: float
    file: Path
    layer: str

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """W + s BA of a float32 weight (out, in), in place; DoRA's is set to its magnitudes (arXiv:2402.09353, eq. 5).

        Raises UserError when the sum is no number.
        """
        with safe_open(self.file, framework="pt") as stored:
            a, b = (stored.get_tensor(f"{self.layer}.lora_{half}.weight").float() for half in "AB")
            weight.add_((b @ a).mul_(self.scaling))
            if f"{self.layer}.lora_magnitude_vector" in stored.keys():  # noqa: SIM118 (safe_open is no mapping)
                magnitude = stored.get_tensor(f"{self.layer}.lora_magnitude_vector").float()
                weight.mul_((magnitude / weight.norm(dim=1))[:, None])
        if not weight.isfinite().all():
            layer = self.layer.removeprefix(PEFT_PREFIX)
            raise UserError(f"the weights cannot be merged: {layer} would hold NaN or infinity", str(self.file.parent))
        return weight


def find_updates(adapter: Path, bare: PreTrainedModel, headers: Mapping[str, TensorInfo]) -> dict[str, Update] | None:
    """The adapter's updates by the stored names of the weights; None where they are not all plain products."""
    config = read_adapter_config(adapter)
    file = adapter / ADAPTER_WEIGHTS
    parts = {name.partition(".lora_")[2] for name in read_headers([file])}
    if any(config.get(key) not in (None, [], "none") for key in OTHER_TENSORS):
        return None
    if parts - {"A.weight", "B.weight", "magnitude_vector"}:
        return None
    layers = adapted_layers(adapter)
    names = stored_names(layers, bare, headers)
    if len(names) < len(layers):
        return None
    prefix = PEFT_PREFIX if all(name.startswith(PEFT_PREFIX) for name in read_headers([file])) else ""
    return {
        name: Update(turned, _scaling(config, layer, shapes["A"][0]), file, f"{prefix}{layer}")
        for (layer, shapes), (name, turned) in zip(layers.items(), names.items(), strict=True)
    }


def _scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732); alphas of their own in ``alpha_pattern``."""
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns, layer), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def stored_names(layers: Iterable[str], bare: PreTrainedModel, headers: Mapping[str, TensorInfo]) -> dict[str, bool]:
    """The names that linear layers' weights are stored under, and whether as (in, out); without those not found."""
    found = {}
    for layer in layers:
        # Checkpoints may leave out the name of the model's body: h.0.attn for transformer.h.0.attn.
        names = (f"{layer}.weight", f"{layer.removeprefix(f'{bare.base_model_prefix}.')}.weight")
        name = next((name for name in names if name in headers), None)
        try:
            module = bare.get_submodule(layer)
        except AttributeError:
            continue
        if name is not None and isinstance(module, nn.Linear | Conv1D):
            found[name] = isinstance(module, Conv1D)
    return found


def _merge_in_memory(origin: AdapterOrigin, headers: dict[str, TensorInfo], dtype: torch.dtype, draft: Path) -> None:
    base = load_base(origin.base, Model(name_or_path=str(origin.base)), None, torch.device("cpu"), torch.float32)
    quantization = origin.recipe.quantization if origin.recipe else None
    if quantization is not None:
        expand_quantized(base, quantization, DTYPES[origin.dtype] if origin.dtype else dtype)
    try:
        merged = load_adapter(base, origin.folder).merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN or infinity in the sum
        raise UserError(f"the weights cannot be merged: {error}", str(origin.folder)) from error
    _cast_as_stored(merged, headers, dtype)
    merged.config.use_cache = True
    merged.save_pretrained(str(draft))


def _cast_as_stored(model: PreTrainedModel, headers: dict[str, TensorInfo], otherwise: torch.dtype) -> None:
    """Give every weight the type the base stores it in: a base in bfloat16 may keep its norms in float32."""
    for name, parameter in model.named_parameters():
        info = headers.get(name) or headers.get(name.removeprefix(f"{model.base_model_prefix}."))
        parameter.data = parameter.data.to(stored_dtype({name: info}) if info else otherwise)
