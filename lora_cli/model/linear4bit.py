"""bitsandbytes' 4-bit layers on a processor with AVX512, where release 0.50.2 computes two things wrongly in silence.

The first evaluation pass repacks the weights, after which gradients, ``dequantize_4bit`` and saving read them in the
wrong order. And where a row of a weight is no multiple of the block of numbers that share a scale, ``dequantize_4bit``
takes neighbouring blocks' scales: weights are off by more than half their size.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch.nn.functional import linear

from lora_cli.errors import UserError
from lora_cli.model.targets import Target

HAS_TRITON = find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
"""Whether there is Triton, and the compiler that it calls."""
BLOCK = 64
"""Numbers of a weight that share a scale: bitsandbytes' own choice, and Transformers'."""


def expand(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """What 4-bit codes stand for, in the shape and the type that bitsandbytes' QuantState says.

    On a processor as rows of one block each, for which bitsandbytes takes the right scales, and all cores.
    """
    from bitsandbytes.functional import dequantize_4bit

    if weight.is_cuda and HAS_TRITON:
        from lora_cli.model import expand4bit

        if expand4bit.is_expandable(weight, state):
            return expand4bit.expand(weight, state)
    if weight.is_cuda:
        return cast("torch.Tensor", dequantize_4bit(weight, state))
    blocks, rest = divmod(state.shape.numel(), state.blocksize)
    rows = copy.copy(state)
    rows.shape = torch.Size([1, state.shape.numel()] if rest else [blocks, state.blocksize])
    return cast("torch.Tensor", dequantize_4bit(weight, rows)).view(state.shape)


def compute_right(model: torch.nn.Module) -> None:
    """Keep both faults away from the model's 4-bit layers, before their first pass."""
    for layer in _layers(model):
        layer.support_avx512bf16_for_cpu = False
        if layer.in_features % state_of(layer).blocksize:
            layer.forward = partial(_forward, layer)


def expand_always(model: torch.nn.Module) -> None:
    """Have the 4-bit layers multiply by their expanded weights, which gradient checkpointing frees: bitsandbytes' own
    product holds the codes for the backward pass out of its sight."""
    for layer in _layers(model):
        layer.quant_state = None  # the weight has it
        layer.forward = partial(_forward, layer)


def store_as(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Have the 4-bit layers' codes, which are bytes, pass for numbers of ``dtype``: torch shards no integers."""
    for layer in _layers(model):
        weight = layer.weight
        weight.data = weight.data.view(-1).view(dtype).unsqueeze(1)
        weight.quant_storage = layer.quant_storage = dtype


def state_of(layer: Any) -> Any:
    """The QuantState by which a layer's codes are expanded, which its weight loses when it is sharded; None where the
    layer has no codes."""
    return getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)


def _layers(model: torch.nn.Module) -> Iterator[Any]:
    """The model's 4-bit layers, by an attribute of theirs, so as not to import bitsandbytes where there are none."""
    return (module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu"))


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's product by its expanded weight, in the types that bitsandbytes uses."""
    dtype = layer.compute_dtype or x.dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(dtype), expand(layer.weight.data, state_of(layer)).to(dtype), bias).to(x.dtype)


def check_dora(targets: Iterable[Target], device: torch.device) -> None:
    """Raises UserError for layers whose norms, which DoRA needs, PEFT would take of wrongly expanded weights."""
    wrong = [target for target in targets if target.in_features % BLOCK]
    if wrong and device.type == "cpu" and _takes_wrong_scales():
        what = (
            f"adapter.use_dora: bitsandbytes {version('bitsandbytes')} dequantizes 4-bit weights wrongly on this CPU "
            f"where rows are not a multiple of {BLOCK} values: {wrong[0].name} has {wrong[0].in_features}"
        )
        raise UserError(what, hint="remove such layers from adapter.target_modules, or set adapter.use_dora to false")


@cache
def _takes_wrong_scales() -> bool:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows = torch.arange(1.0, 1 + 4 * 96).view(4, 96)
    codes, state = quantize_4bit(rows, blocksize=BLOCK, quant_type="nf4")
    return not torch.equal(dequantize_4bit(codes, state), expand(codes, state))
