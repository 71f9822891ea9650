"""Attention for rows laid end to end: each row among its own tokens alone, without a mask over the whole line.

Registered with Transformers under the names ``ROWS`` and ``ROWS_ALONE``; a forward pass says where rows begin and end
by the arguments that FlashAttention has there. On a GPU that has it, in 16 bits, the rows go through torch's variable-
length FlashAttention together; on a processor in 16 bits by products of matrices, short ones together; elsewhere, and
where a model has sinks, one after the other.
"""

from __future__ import annotations

from functools import lru_cache
from inspect import signature
from typing import Any, cast

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_cli.model.row_products import RowProducts

ROWS = "rows"
"""For a trial: its masks tell of windows that a layer may not tell its attention of."""
ROWS_ALONE = "rows_alone"
"""For all batches after it. Transformers has not been told of masks for this name and makes none; else it would look
through each batch's positions for them, and wait until a GPU has come to these."""


def attend_by_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row.

    query (1, heads, tokens, width); key and value (1, key heads, tokens, width); ``cu_seq_lens_q`` (rows + 1) int32;
    ``s_aux`` (heads), the sinks: a score beside a token's own in each head, for which no value stands. Returns (1,
    tokens, heads, width), as Transformers wants it. Without ``cu_seq_lens_q`` there is one row; without it and sinks,
    or where a mask says more, this is Transformers' own sdpa. Raises ValueError for what needs the scores themselves
    (soft caps, biases), for sinks beside a mask, and for layers whose window is told by their mask alone.
    """
    if attention_mask is not None and attention_mask.ndim == 0:
        if sliding_window != int(attention_mask):
            raise ValueError("attention by rows does not know a window that only the mask tells of")
        attention_mask = None
    needs = [name for name in ("softcap", "position_bias") if others.get(name) is not None]
    if needs:
        raise ValueError(f"attention by rows does not know {', '.join(needs)}")
    if s_aux is not None and attention_mask is not None:
        raise ValueError("attention by rows does not know sinks beside a mask")
    if (cu_seq_lens_q is None and s_aux is None) or attention_mask is not None:
        if attention_mask is None and query.shape[2] == key.shape[2]:  # a row alone, for which there is no mask
            attention_mask = _window(query.shape[2], sliding_window, query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    plain_16_bits = query.dtype != torch.float32 and not dropout and s_aux is None
    if cu_seq_lens_q is not None and plain_16_bits and query.is_cuda and _has_flash(query.device):
        assert max_length_q is not None
        return _together(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    lengths = [query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and plain_16_bits:
        attended = RowProducts.apply(query, key, value, tuple(lengths), scale, sliding_window)  # type: ignore[no-untyped-call]
        return cast("torch.Tensor", attended), None
    rows = zip(*(torch.split(part, lengths, dim=2) for part in (query, key, value)), strict=True)
    return torch.cat([_fused(q, k, v, scale, sliding_window, dropout, s_aux) for q, k, v in rows], dim=1), None


@lru_cache
def _has_flash(device: torch.device) -> bool:
    """Whether the GPU is of those for which FlashAttention is written: from Ampere on, unlike a T4 or a V100."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    dropout: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One row by torch's own kernel."""
    width, groups = value.shape[-1], query.shape[1] // key.shape[1]
    if sinks is not None:
        query, key, value = _after_sink(query, key, value, sinks.float() / scale)
    mask = _window(query.shape[2], window, query.device)
    if sinks is not None and mask is not None:
        mask[:, 0] = True
    if mask is not None and groups > 1:  # a GPU's kernel for masks knows no groups, and that for both holds every score
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=mask is None and groups > 1,
    )
    return (attended if sinks is None else attended[:, :, 1:, :width]).transpose(1, 2)


def _after_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three with a token before theirs, whose value is nothing and whose product with a query is its head's sink.

    It is made by two numbers more of each head, the second what rounding takes of the first; kernels want their number
    to be a multiple of 8.
    """
    width, rounded = query.shape[-1], sinks.to(query.dtype)
    query, key, value = (pad(part, (0, 8, 1, 0)) for part in (query, key, value))
    query[:, :, 1:, width] = rounded[:, None]
    query[:, :, 1:, width + 1] = (sinks - rounded)[:, None]
    key[:, :, 0, width : width + 2] = 1
    return query, key, value


def _together(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    starts: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """All rows in one kernel."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 takes fewer key heads as they come; later releases want to be told.
    told: dict[str, Any] = (
        {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in signature(varlen_attn).parameters else {}
    )
    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **told,
    )
    assert isinstance(attended, torch.Tensor)
    return attended[None]


def _window(length: int, width: int | None, device: torch.device) -> torch.Tensor | None:
    """Which of ``length`` tokens each sees (length, length) when it sees ``width`` at most; None when it sees all."""
    if width is None or length <= width:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - width)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """For a line of rows None, or the width of a window as a tensor of no dimension; else sdpa's mask."""
    if batch_size == 1 and q_length == kv_length and attention_mask is None:
        return None if local_size is None else torch.tensor(local_size)
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, local_size=local_size, **others)


AttentionInterface.register(ROWS, attend_by_rows)
AttentionInterface.register(ROWS_ALONE, attend_by_rows)
AttentionMaskInterface.register(ROWS, _mask)
