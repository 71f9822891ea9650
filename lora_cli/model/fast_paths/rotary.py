"""Attention that applies rotary position embeddings to queries and keys in one autograd function.

It replaces Transformers' own module, with the same names and layers, where that module computes exactly this.
"""

from __future__ import annotations

from copy import deepcopy
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli.model.fast_paths.fused_lora import apply_layers
from lora_cli.model.trial import FORWARD_ERRORS

PROJECTIONS, NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_norm", "k_norm")
RECORDING = "lora_recorded"
"""The name in Transformers of an attention function that only records its arguments."""


class Rotate(torch.autograd.Function):
    """x cos + (-x2, x1) sin, where x1 and x2 are the halves of x: rotary position embeddings (RoFormer,
    arXiv:2104.09864, equation 34), where the two elements of a pair are half a width apart.

    x (rows, tokens, heads, width); cos and sin (rows or 1, tokens, width). The result has the dtype to which torch
    promotes theirs. When all are in 16 bits, it is rounded once less than in Transformers.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        low, high = sin.chunk(2, dim=-1)
        return _rotated(x, cos, low, high, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        low, high = sin.chunk(2, dim=-1)
        return _rotated(grad, cos, high, low, -1), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, low: torch.Tensor, high: torch.Tensor, sign: int) -> torch.Tensor:
    """x cos + sign (-x2 low, x1 high)."""
    result = x * cos[:, :, None]
    (first, second), (x1, x2) = result.chunk(2, dim=-1), x.chunk(2, dim=-1)
    first.addcmul_(x2, low[:, :, None], value=-sign)
    second.addcmul_(x1, high[:, :, None], value=sign)
    return result


class RotaryAttention(nn.Module):
    """Attention on queries and keys rotated by ``Rotate``, by the attention function that the model's configuration
    names. It has the layers and attributes of the module that it replaces.

    ``attention_kwargs`` are the arguments that this module gives to the attention function, besides ``dropout`` in
    training.
    """

    def __init__(self, original: nn.Module, dropout: float, attention_kwargs: dict[str, Any]) -> None:
        super().__init__()
        for name, value in _attributes(original).items():
            setattr(self, name, value)
        for name in (*PROJECTIONS, *NORMS):
            self.add_module(name, getattr(original, name, nn.Identity()))
        self.dropout, self.attention_kwargs = dropout, attention_kwargs

    def forward(
        self: Any,  # a trial passes another object
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        places = hidden_states.shape[:-1]
        made = apply_layers((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        query, key, value = (each.view(*places, -1, self.head_dim) for each in made)
        query = Rotate.apply(self.q_norm(query), *position_embeddings)  # type: ignore[no-untyped-call]
        key = Rotate.apply(self.k_norm(key), *position_embeddings)  # type: ignore[no-untyped-call]
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.dropout if self.training else 0.0
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, **self.attention_kwargs, **others
        )
        return self.o_proj(attended.reshape(*places, -1)), weights


def rotary_dim(model: PreTrainedModel) -> int | None:
    """How many dimensions of a head are rotated; None when the model has no rotary position embeddings."""
    frequencies = (getattr(module, "inv_freq", None) for module in model.modules())
    return next((2 * each.numel() for each in frequencies if isinstance(each, torch.Tensor)), None)


def fused_replacement(module: nn.Module, width: int) -> RotaryAttention | None:
    """The replacement of ``module``, if that computes exactly this with ``width`` rotated dimensions; else None.

    The replacement is compared with the forward pass of the module's class, in float32, and in bfloat16 with float32
    positions. The layers are small and differ; the inputs are two rows of three tokens, with values so large that
    clipping shows. A module that takes position ids is not replaced: it might use them for longer rows than these.
    """
    children = {name for name, _ in module.named_children()}
    attributes = _attributes(module)
    is_alike = set(PROJECTIONS) <= children <= {*PROJECTIONS, *NORMS} and "config" in attributes
    own = [*module.parameters(recurse=False)]
    if not is_alike or own or "position_ids" in signature(type(module).forward).parameters:
        return None
    attributes["config"] = deepcopy(attributes["config"])
    attributes["config"]._attn_implementation = RECORDING
    random = torch.Generator().manual_seed(0)
    x, *weights = (100 * torch.randn(*shape, generator=random) for shape in ((2, 3, 4), (4, 2 * width), (4, width)))
    positions = tuple(torch.randn(2, 3, width, generator=random) for _ in range(2))
    stand_in = SimpleNamespace(
        **attributes | {"training": True},
        q_proj=lambda x: x @ weights[0].to(x.dtype),
        k_proj=lambda x: x @ weights[1].to(x.dtype),
        v_proj=lambda x: 3 * x @ weights[1].to(x.dtype),
        o_proj=lambda x: 5 * x,
        **{name: (lambda x: x.cumsum(-1)) if name in children else (lambda x: x) for name in NORMS},
    )
    for dtype in (torch.float32, torch.bfloat16):
        try:
            wanted, attention_kwargs = _record(type(module).forward, stand_in, x.to(dtype), positions)
            stand_in.dropout, stand_in.attention_kwargs = attention_kwargs.pop("dropout"), attention_kwargs
            found, _ = _record(RotaryAttention.forward, stand_in, x.to(dtype), positions)
        except FORWARD_ERRORS:
            return None
        if not all(map(_agree, found, wanted)):
            return None
    return RotaryAttention(module, stand_in.dropout, stand_in.attention_kwargs)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, except its parameters, buffers, children and the ``forward`` of a hook of Accelerate's."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "forward"}


def _record(
    forward: Any, stand_in: SimpleNamespace, x: torch.Tensor, positions: Any
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The queries, keys and values passed to the attention function with the result of ``forward``, and the function's
    other arguments. Raises LookupError when the argument ``added`` is not passed on."""
    result, _ = forward(stand_in, hidden_states=x, position_embeddings=positions, attention_mask=None, added=True)
    query, key, value, attention_kwargs = stand_in.recorded
    attention_kwargs.pop("added")
    return [query, key, value, result], attention_kwargs


def _agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    alike = found.shape == wanted.shape and found.dtype == wanted.dtype
    return alike and torch.allclose(found, wanted, atol=1e-6 * float(wanted.abs().max()))


def _record_arguments(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **attention_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    module.recorded = query, key, value, attention_kwargs
    return query.transpose(1, 2), None


AttentionInterface.register(RECORDING, _record_arguments)
