"""A model quantized by Transformers itself, with the whole of it in memory: whatever it can load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.model.base import best_device, load_base
from lora_cli.model.linear4bit import expand
from lora_cli.recipe.schema import Model, Quantization
from lora_cli.weights.quantized_layers import LayerError, layer_error
from lora_cli.weights.shards import check_finite, is_finite
from lora_cli.weights.stored_model import StoredModel
from lora_cli.weights.stored_names import sources_of

Sources = Mapping[str, Mapping[str, str | None]]
"""The stored tensors that each of a model's is made of, as ``sources_of`` finds them."""


def quantize_in_memory(
    source: StoredModel,
    bare: PreTrainedModel,
    out: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    settings: BitsAndBytesConfig,
    max_shard: int,
) -> list[LayerError]:
    """Write the model that ``bare`` is without weights, its layers quantized as ``settings`` and ``quantization`` both
    say, to ``out``.

    Raises UserError when weights are missing or no numbers.
    """
    sources, folder, skip = sources_of(bare, source.headers), source.folder, settings.llm_int8_skip_modules
    model = load_base(folder, Model(name_or_path=str(folder)), quantization, best_device(), dtype, skip=skip)
    model.config.use_cache = True
    model.config.quantization_config = settings
    layers = list(_errors(model, source, sources, dtype))
    _check_rest(model, source, sources)
    model.save_pretrained(str(out), max_shard_size=max_shard)
    return layers


def _errors(model: PreTrainedModel, source: StoredModel, sources: Sources, dtype: torch.dtype) -> Iterator[LayerError]:
    """Of the layers whose weight is one stored tensor as it is, by whatever name. Raises UserError when one is not all
    numbers as ``dtype``, as it was loaded: codes do not tell."""
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit | Linear8bitLt):
            continue
        found = sources.get(f"{name}.weight", {})
        stored = next((each for each, pattern in found.items() if pattern is None), None)
        if stored is None:
            continue
        original = source.read(stored)
        check_finite(original.to(dtype), stored, source.headers[stored].file)
        original = original.to(module.weight.device, torch.float32)
        if module.source_cls is Conv1D:  # set by Transformers where it replaces a layer
            original = original.T
        size = float(original.norm())
        error = float((_expand(module).float() - original).norm())
        yield layer_error(name, error, size, stored, source.headers[stored])


def _check_rest(model: PreTrainedModel, source: StoredModel, sources: Sources) -> None:
    """Raises UserError when a parameter that is not quantized is not all numbers, and tells the stored tensor."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_finite(parameter.data):
            for stored in sources.get(name, {}):
                check_finite(source.read(stored).to(parameter.dtype), stored, source.headers[stored].file)
            check_finite(parameter.data, name, source.folder)


def _expand(module: Linear4bit | Linear8bitLt) -> torch.Tensor:
    """The layer's weight (out, in) as a matrix product sees it."""
    weight: Any = module.weight
    if isinstance(module, Linear4bit):
        return expand(weight.data, weight.quant_state)
    return cast("torch.Tensor", functional.int8_vectorwise_dequant(weight.data, weight.SCB))
