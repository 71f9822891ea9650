"""Quantize any model that Transformers can load, with Transformers itself and the whole model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.model.base import load_base
from lora_cli.model.device import best_device
from lora_cli.model.linear4bit import dequantize
from lora_cli.recipe.schema import Model, Quantization
from lora_cli.weights.files.shards import check_finite, is_finite
from lora_cli.weights.files.stored_model import StoredModel, sources_of
from lora_cli.weights.quantized_layers import layer_error

Sources = Mapping[str, Mapping[str, str | None]]
"""The stored tensors that make up each of a model's tensors, as ``sources_of`` returns them."""


def quantize_in_memory(
    source: StoredModel,
    bare: PreTrainedModel,
    out: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    settings: BitsAndBytesConfig,
    max_shard: int,
) -> dict[str, float]:
    """Load the model in ``source``, quantized by ``quantization`` (repeated in ``settings``), and write it to ``out``.
    Return the layers' relative errors, where known.

    ``bare`` is the same model on the meta device. Raises UserError when weights are missing or hold NaN or infinity.
    """
    sources, folder, skip = sources_of(bare, source.headers), source.folder, settings.llm_int8_skip_modules
    model = load_base(folder, Model(name_or_path=str(folder)), quantization, best_device(), dtype, skip=skip)
    model.config.use_cache = True
    model.config.quantization_config = settings
    errors = _errors(model, source, sources, dtype)
    _check_rest(model, source, sources)
    model.save_pretrained(str(out), max_shard_size=max_shard)
    return errors


def _errors(model: PreTrainedModel, source: StoredModel, sources: Sources, dtype: torch.dtype) -> dict[str, float]:
    """Return the error of each layer whose weight is an unchanged stored tensor of any name. Raises UserError when such
    a tensor holds NaN or infinity in ``dtype``, in which it was loaded: its codes do not show that."""
    errors = {}
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
        error = float((_dequantize(module).float() - original).norm())
        errors[name] = layer_error(name, error, size, source.headers[stored])
    return errors


def _check_rest(model: PreTrainedModel, source: StoredModel, sources: Sources) -> None:
    """Raises UserError, naming the stored tensor, when an unquantized parameter holds NaN or infinity."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_finite(parameter.data):
            for stored in sources.get(name, {}):
                check_finite(source.read(stored).to(parameter.dtype), stored, source.headers[stored].file)
            check_finite(parameter.data, name, source.folder)


def _dequantize(module: Linear4bit | Linear8bitLt) -> torch.Tensor:
    """Dequantize the layer's weight (out, in)."""
    weight: Any = module.weight
    if isinstance(module, Linear4bit):
        return dequantize(weight.data, weight.quant_state)
    return cast("torch.Tensor", functional.int8_vectorwise_dequant(weight.data, weight.SCB))
