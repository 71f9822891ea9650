"""A model in 4 or 8 bits: written so that plain ``from_pretrained`` loads it, with the error that it cost."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from lora_cli.errors import UserError
from lora_cli.model.base import (
    DTYPES,
    best_device,
    bitsandbytes_config,
    load_base,
    load_config,
    load_tokenizer,
    skeleton,
)
from lora_cli.model.files import check_quantizable
from lora_cli.recipe.schema import Model, Quantization
from lora_cli.weights.check import check_weights
from lora_cli.weights.provenance import PROVENANCE
from lora_cli.weights.shards import (
    TensorInfo,
    check_out,
    read_headers,
    read_tensor,
    stored_dtype,
    weight_files,
    whole_folder,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerError:
    """A layer's relative error in the Frobenius norm, |Q(W) - W| / |W|."""

    name: str
    relative: float


@dataclass(frozen=True)
class Quantized:
    """What a quantization wrote: sizes in bytes, and each layer's error, worst first."""

    out: Path
    method: str
    bytes_before: int
    bytes_after: int
    layers: tuple[LayerError, ...]


def quantize(folder: Path, out: Path, quantization: Quantization) -> Quantized:
    """Write the model in ``folder`` to ``out`` with its linear layers (but the head) in 4 or 8 bits.

    Raises UserError when it is quantized already, its weights are damaged or no numbers, or ``out`` will not do.
    """
    check_out(out)
    check_quantizable(folder)
    check_weights(folder, skeleton(load_config(folder)))
    files = weight_files(folder)
    headers = read_headers(files)
    model = load_base(folder, Model(name_or_path=str(folder)), quantization, best_device(), stored_dtype(headers))
    model.config.use_cache = True
    if quantization.method != "int8":  # what was asked for, not what this machine computes best in
        model.config.quantization_config.bnb_4bit_compute_dtype = DTYPES[quantization.compute_dtype]
    layers = sorted(_errors(model, headers), key=lambda layer: -layer.relative)
    with whole_folder(out) as draft:
        model.save_pretrained(str(draft))
        load_tokenizer(folder).save_pretrained(str(draft))
        for name in ("generation_config.json", PROVENANCE):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, draft / name)
    before, after = (sum(file.stat().st_size for file in found) for found in (files, weight_files(out)))
    return Quantized(out, quantization.method, before, after, tuple(layers))


def _errors(model: PreTrainedModel, headers: dict[str, TensorInfo]) -> Iterator[LayerError]:
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit | Linear8bitLt):
            continue
        stored = f"{name}.weight"
        if stored not in headers:
            stored = stored.removeprefix(f"{model.base_model_prefix}.")
        if stored not in headers:
            continue
        original = read_tensor(headers[stored], stored).to(module.weight.device, torch.float32)
        if module.source_cls is Conv1D:  # set by Transformers where it replaces a layer
            original = original.T
        size = float(original.norm())
        if not math.isfinite(size):
            raise UserError(f"tensor {stored} holds values that are no finite numbers", str(headers[stored].file))
        error = float((_expand(module).float() - original).norm())
        yield LayerError(name, error / size if size else error)


def _expand(module: Linear4bit | Linear8bitLt) -> torch.Tensor:
    """The layer's weight (out, in) as a matrix product sees it."""
    weight: Any = module.weight
    if isinstance(module, Linear4bit):
        expanded = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:
        expanded = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return cast("torch.Tensor", expanded)


def expand_quantized(model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> None:
    """Replace the weights that training held quantized by what their quantized form stands for, in place.

    ``dtype`` is the type they were quantized from. Transformers itself says which layers those are.
    """
    there_and_back = roundtrip(quantization)
    for name in quantized_layers(model, quantization):
        parameter = model.get_parameter(f"{name}.weight")
        turned = isinstance(model.get_submodule(name), Conv1D)
        expanded = there_and_back((parameter.data.T if turned else parameter.data).to(dtype).contiguous())
        parameter.data = (expanded.T if turned else expanded).to(parameter.dtype).contiguous()


def quantized_layers(model: PreTrainedModel, quantization: Quantization) -> set[str]:
    """Names of the layers that Transformers quantizes in this architecture."""
    bare = skeleton(model.config)
    quantizer = AutoHfQuantizer.from_config(bitsandbytes_config(quantization, torch.device("cpu")))
    quantizer.preprocess_model(model=bare, device_map=None)
    return {name for name, module in bare.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def roundtrip(quantization: Quantization) -> Callable[[torch.Tensor], torch.Tensor]:
    """Quantize and expand again, as bitsandbytes does it in a layer."""

    def four_bit(weight: torch.Tensor) -> torch.Tensor:
        codes, state = functional.quantize_4bit(
            weight, compress_statistics=quantization.double_quant, quant_type=quantization.method
        )
        return cast("torch.Tensor", functional.dequantize_4bit(codes, state))

    def eight_bit(weight: torch.Tensor) -> torch.Tensor:
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return cast("torch.Tensor", functional.int8_vectorwise_dequant(codes, scales))

    return eight_bit if quantization.method == "int8" else four_bit
