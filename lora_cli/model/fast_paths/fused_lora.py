"""Plain LoRA as one autograd function: PEFT's own layers with another forward pass, the same results and names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_cli.model.fast_paths.lora_products import LayerSpec, LoraProducts
from lora_cli.model.fast_paths.rms_norm import norm_inputs_of
from lora_cli.model.fast_paths.swiglu import SwiGLU, swiglu
from lora_cli.model.layers import in_out_features
from lora_cli.model.linear4bit import quant_state_of


def apply_layers(layers: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The outputs (…, out) of several layers for one x (…, in). Uses one autograd function when all layers allow it and
    none has a forward hook, which that function would skip."""
    modules = [layer for layer in layers if isinstance(layer, nn.Module) and not _is_hooked(layer)]
    results = fused_lora_forward(modules, x) if len(modules) == len(layers) else None
    return [layer(x) for layer in layers] if results is None else results


def fused_lora_forward(
    layers: Sequence[nn.Module | Fused], x: torch.Tensor, gate: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...] | None:
    """The layers' outputs (…, out) for x (…, in) from one autograd function; None unless gradients are enabled and each
    layer is plain LoRA, or frozen and not quantized. Their dtype is autocast's where it is enabled, else x's. With a
    ``gate``, the input is silu(gate) * x."""
    if not torch.is_grad_enabled():
        return None
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    parts = [part for layer in layers if (part := _part(layer, dtype)) is not None]
    if len(parts) < len(layers):
        return None
    specs = tuple(spec for spec, _ in parts)
    tensors = (tensor for _, its in parts for tensor in its)
    places = x.shape[:-1]
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    gates = None if gate is None else gate.to(dtype).reshape(-1, gate.shape[-1])
    source = norm_inputs_of(x) if gate is None and x.dtype == dtype else None
    with torch.autocast(device, enabled=False):
        results = LoraProducts.apply(rows, gates, source, specs, *tensors)  # type: ignore[no-untyped-call]
    # Outside the function: views that an autograd function returns cannot be modified in place, as some models do.
    return tuple(y.view(*places, y.shape[1]) for y in results)


def _part(layer: Any, dtype: torch.dtype) -> tuple[LayerSpec, tuple[torch.Tensor | None, ...]] | None:
    """The layer as arguments of ``LoraProducts`` for products in ``dtype``; None when it is not supported."""
    if isinstance(layer, Fused):
        base, adapter = layer.base_layer, _adapter(layer)
    elif type(layer) in (nn.Linear, Conv1D) and (wide := in_out_features(layer)):
        base, adapter = layer, (layer.weight.new_empty(0, wide[0]), layer.weight.new_empty(wide[1], 0), 1.0)
    else:
        return None
    if adapter is None or getattr(base, "compute_dtype", None) not in (None, dtype):
        return None
    a, b, scaling = adapter
    return LayerSpec(scaling, isinstance(base, Conv1D), quant_state_of(base)), (base.weight, base.bias, a, b)


def _adapter(layer: Any) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A, B and the scaling of the layer's only active adapter. None if it is not the only one, is disabled or merged,
    or has active dropout, a bias or a variant such as DoRA."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(names) != 1:
        return None
    name = names[0]
    dropout, b = layer.lora_dropout[name], layer.lora_B[name]
    random = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
    if random or name in layer.lora_variant or b.bias is not None:
        return None
    return layer.lora_A[name].weight, b.weight, layer.scaling[name]


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_pre_hooks or layer._forward_hooks)


class Fused:
    """Mixin that fuses the forward pass of a PEFT LoRA layer. With a ``gate``, the input is silu(gate) * x."""

    base_layer: Any

    def forward(self, x: torch.Tensor, *args: Any, gate: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if gate is not None and not (x.requires_grad or gate.requires_grad):
            x, gate = swiglu(gate, x), None  # one tensor to keep instead of two
        results = None if args or kwargs else fused_lora_forward([self], x, gate)
        if results is not None:
            return results[0]
        whole = x if gate is None else SwiGLU.apply(gate, x).view(x.shape)  # type: ignore[no-untyped-call]
        return cast("torch.Tensor", super().forward(whole, *args, **kwargs))  # type: ignore[misc]


class FusedLinear(Fused, lora.Linear):
    """PEFT's LoRA layer over torch's Linear or Transformers' Conv1D."""


def register(config: LoraConfig, layers: Iterable[nn.Module]) -> None:
    """Make PEFT use fused layers for ``layers``, if all of their types are supported."""
    kinds = {type(layer) for layer in layers}
    known: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FusedLinear, Conv1D: FusedLinear}
    if any(kind.__module__.startswith("bitsandbytes") for kind in kinds):
        from bitsandbytes.nn import Linear4bit

        known = {Linear4bit: _fused_4bit(), **known}  # PEFT takes the first match; Linear4bit is a Linear
    if kinds <= known.keys():
        config._register_custom_module(known)


def _fused_4bit() -> type[nn.Module]:
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(Fused, Linear4bit):
        """PEFT's LoRA layer over bitsandbytes' 4-bit Linear."""

    return FusedLinear4bit
