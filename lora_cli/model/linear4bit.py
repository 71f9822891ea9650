"""bitsandbytes' 4-bit layers on a CPU with AVX512, where release 0.50.2 silently computes two things wrongly.

The first evaluation pass repacks the weights; gradients, ``dequantize_4bit`` and saving then read them in the wrong
order. Where a weight's row is not a multiple of the block of values that share a scale, ``dequantize_4bit`` uses
neighbouring blocks' scales: weights are off by more than half their size.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch.nn.functional import linear

from lora_cli.errors import UserError
from lora_cli.model.targets import Target

HAS_TRITON = find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
"""Whether Triton and the C compiler that it calls are installed."""
BLOCK = 64
"""Values of a weight that share a scale: the default of bitsandbytes and Transformers."""


def dequantize(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """Dequantize 4-bit codes to the shape and dtype of bitsandbytes' QuantState.

    On a CPU, dequantizes rows of one block each, for which bitsandbytes uses the right scales and all cores.
    """
    from bitsandbytes.functional import dequantize_4bit

    if weight.is_cuda and HAS_TRITON:
        from lora_cli.model import dequantize4bit

        if dequantize4bit.is_supported(weight, state):
            return dequantize4bit.dequantize(weight, state)
    if weight.is_cuda:
        return cast("torch.Tensor", dequantize_4bit(weight, state))
    blocks, rest = divmod(state.shape.numel(), state.blocksize)
    rows = copy.copy(state)
    rows.shape = torch.Size([1, state.shape.numel()] if rest else [blocks, state.blocksize])
    return cast("torch.Tensor", dequantize_4bit(weight, rows)).view(state.shape)


def patch_4bit_layers(model: torch.nn.Module) -> None:
    """Work around both faults in the model's 4-bit layers. Call before their first forward pass."""
    for layer in _layers(model):
        layer.support_avx512bf16_for_cpu = False
        if layer.in_features % quant_state_of(layer).blocksize:
            layer.forward = partial(_forward, layer)


def dequantize_in_forward(model: torch.nn.Module) -> None:
    """Make the 4-bit layers multiply by their dequantized weights, which gradient checkpointing frees. bitsandbytes'
    own product keeps the codes for the backward pass where checkpointing cannot free them."""
    for layer in _layers(model):
        layer.quant_state = None  # the weight holds it, too
        layer.forward = partial(_forward, layer)


def set_quant_storage(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Reinterpret the bytes of the 4-bit layers' codes as ``dtype``: torch does not shard integer tensors."""
    for layer in _layers(model):
        weight = layer.weight
        weight.data = weight.data.view(-1).view(dtype).unsqueeze(1)
        weight.quant_storage = layer.quant_storage = dtype


def quant_state_of(layer: Any) -> Any:
    """The QuantState of a 4-bit layer, from its weight or, once sharding has taken it from the weight, from the layer;
    None for other layers."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _layers(model: torch.nn.Module) -> Iterator[Any]:
    """The model's 4-bit layers, found by one of their attributes, to import bitsandbytes only when there are any."""
    return (module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu"))


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output from its dequantized weight, in the dtypes that bitsandbytes uses."""
    dtype = layer.compute_dtype or x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(dtype), dequantize(layer.weight.data, quant_state_of(layer)).to(dtype), bias).to(x.dtype)


def check_dora(targets: Iterable[Target], device: torch.device) -> None:
    """Raises UserError when PEFT would compute the weight norms that DoRA needs from wrongly dequantized weights."""
    wrong = [target for target in targets if target.in_features % BLOCK]
    if wrong and device.type == "cpu" and takes_wrong_scales():
        what = (
            f"adapter.use_dora: bitsandbytes {version('bitsandbytes')} dequantizes 4-bit weights wrongly on this CPU "
            f"where rows are not a multiple of {BLOCK} values: {wrong[0].name} has {wrong[0].in_features}"
        )
        raise UserError(what, hint="remove such layers from adapter.target_modules, or set adapter.use_dora to false")


def takes_wrong_scales() -> bool:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows = torch.arange(1.0, 1 + 4 * 96).view(4, 96)
    codes, state = quantize_4bit(rows, blocksize=BLOCK, quant_type="nf4")
    return not torch.equal(dequantize_4bit(codes, state), dequantize(codes, state))
