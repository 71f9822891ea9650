"""Which layers of a model Transformers quantizes, and the error of each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_cli.errors import UserError, did_you_mean, first_few
from lora_cli.model.base import bitsandbytes_config, load_config, meta_model
from lora_cli.model.targets import UNQUANTIZABLE_LAYERS
from lora_cli.recipe.schema import Quantization
from lora_cli.weights.codes import quantize_dequantize
from lora_cli.weights.files.shards import TensorInfo, model_headers
from lora_cli.weights.files.stored_model import unstorable


def quantized_layers(bare: PreTrainedModel, quantization: Quantization) -> dict[str, bool]:
    """Replace the layers of ``bare`` that Transformers quantizes. Return each with whether its weight is stored as
    (in, out)."""
    return replace_layers(bare, bitsandbytes_config(quantization, torch.float32))


def replace_layers(bare: PreTrainedModel, settings: BitsAndBytesConfig) -> dict[str, bool]:
    """Do the same as ``quantized_layers`` with these settings, which may skip layers."""
    quantizer = AutoHfQuantizer.from_config(settings)
    quantizer.preprocess_model(model=bare, device_map=None)
    return {
        name: module.source_cls is Conv1D  # set by Transformers where it replaces a layer
        for name, module in bare.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }


def check_quantized_layers(folder: Path, quantization: Quantization) -> None:
    """Raises UserError when Transformers would quantize no layer of the model in ``folder``."""
    if not quantized_layers(meta_model(load_config(folder)), quantization):  # Falcon's have their own class
        what = "quantization: this model has no layer that can be quantized"
        raise UserError(what, str(folder), "remove this section")


def check_layers(folder: Path, quantization: Quantization, skip: Sequence[str]) -> None:
    """Raises UserError when a name in ``skip`` matches no layer to quantize, when no layer is left, and when those left
    could not be loaded again or the model reads their weights directly."""
    bare = meta_model(load_config(folder))
    layers = list(quantized_layers(bare, quantization))
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    for name in skip:
        try:
            if all(should_convert_module(layer, [name]) for layer in layers):
                what = f"--skip {name}: no layer that would be quantized has this name"
                raise UserError(what, hint=did_you_mean(name, ends))
        except re.error as error:
            raise UserError(f"--skip {name}: neither a name nor a regular expression: {error}") from error
    left = [layer for layer in layers if should_convert_module(layer, list(skip))]
    if not left:
        raise UserError("no layer is left to quantize", str(folder), "skip fewer" if skip else None)
    own = {layer.rpartition(".")[2] for layer in left} & {*UNQUANTIZABLE_LAYERS.get(bare.config.model_type, ())}
    if own:
        what = f"the model reads {', '.join(sorted(own))}'s weights directly: they cannot be quantized"
        raise UserError(what, str(folder), f"leave them as they are: --skip {','.join(sorted({*skip, *own}))}")
    lost = unstorable(bare, model_headers(folder), left)
    if lost:
        what = f"stored joined or split, so it could not be loaded again once quantized: {first_few(lost, 1)}"
        names = ",".join(sorted({*skip, *(layer.rpartition(".")[2] for layer in lost)}))
        raise UserError(what, str(folder), f"leave them as they are: --skip {names}")


def layer_error(layer: str, error: float, size: float, stored: TensorInfo) -> float:
    """Return a layer's relative error in the Frobenius norm, |Q(W) - W| / |W|, from these two norms. Raises UserError
    when W (``stored``) or Q(W) is not finite."""
    if not math.isfinite(size):
        raise UserError(f"tensor {stored.name} holds NaN or infinity", str(stored.file))
    if not math.isfinite(error):
        what = f"tensor {stored.name} has values beyond float16's range, from which int8 is made"
        raise UserError(what, str(stored.file), f"leave it as it is (--skip {layer}), or use --method nf4")
    return error / size if size else error


def dequantize_quantized(model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> None:
    """Quantize and dequantize, in place, the weights that training held quantized.

    ``dtype`` is the type they were quantized from. Transformers itself selects the layers.
    """
    for name, transposed in quantized_layers(meta_model(model.config), quantization).items():
        parameter = model.get_parameter(f"{name}.weight")
        parameter.data = (
            quantize_dequantize(parameter.data.to(dtype), quantization, transposed).to(parameter.dtype).contiguous()
        )
