"""Attention for packed rows: each row attends to its own tokens only, without a mask over the whole sequence.

Registered with Transformers as ``ROWS`` and ``ROWS_ALONE``. A forward pass gives the row boundaries in FlashAttention's
arguments. In 16 bits, a GPU from Ampere on computes all rows in one call of torch's variable-length FlashAttention. A
CPU computes bfloat16 rows by matrix products, short rows together. Otherwise (float32, dropout, sinks, heads that
FlashAttention does not support, older GPUs), rows are computed one after the other.
"""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_cli.model.device import is_from_ampere_on
from lora_cli.model.fast_paths.row_products import RowProducts

ROWS = "rows"
"""The name for a trial: its masks reveal sliding windows that a layer does not pass to its attention function."""
ROWS_ALONE = "rows_alone"
"""The name for all later batches. No mask function is registered for it, so that Transformers makes no masks: to make
them, it would inspect each batch's position ids and wait for the GPU."""
LENGTHS = "lora_row_lengths"
"""The attribute of a batch's row boundaries that holds the rows' lengths once they were read."""


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
    the sinks ``s_aux`` (heads): one more score in each head's softmax, without a value. Returns (1, tokens, heads,
    width), as Transformers expects. Without ``cu_seq_lens_q`` there is one row. With a mask, or with neither
    ``cu_seq_lens_q`` nor sinks, calls Transformers' own sdpa. Raises ValueError for arguments that change the scores
    (soft caps, position biases), for sinks with a mask, and for sliding windows that only the mask reveals.
    """
    if attention_mask is not None and attention_mask.ndim == 0:
        if sliding_window != int(attention_mask):
            raise ValueError("attention by rows does not support a sliding window that only the mask reveals")
        attention_mask = None
    needs = [name for name in ("softcap", "position_bias") if others.get(name) is not None]
    if needs:
        raise ValueError(f"attention by rows does not know {', '.join(needs)}")
    if s_aux is not None and attention_mask is not None:
        raise ValueError("attention by rows does not know sinks beside a mask")
    if (cu_seq_lens_q is None and s_aux is None) or attention_mask is not None:
        if attention_mask is None and query.shape[2] == key.shape[2]:  # a single row, for which no mask was made
            attention_mask = _window(query.shape[2], sliding_window, query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as for torch's own attention; DoRA over quantized layers returns float32
        query, key, value = (each.to(torch.get_autocast_dtype(device)) for each in (query, key, value))
    is_plain = not dropout and s_aux is None
    if cu_seq_lens_q is not None and is_plain and _has_flash(query, value):
        assert max_length_q is not None
        return _varlen_attention(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    lengths = [query.shape[2]] if cu_seq_lens_q is None else _lengths(cu_seq_lens_q)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if device == "cpu" and query.dtype == torch.bfloat16 and is_plain:
        attended = RowProducts.apply(query, key, value, tuple(lengths), scale, sliding_window)  # type: ignore[no-untyped-call]
        return cast("torch.Tensor", attended), None
    rows = zip(*(torch.split(part, lengths, dim=2) for part in (query, key, value)), strict=True)
    return torch.cat([_fused(q, k, v, scale, sliding_window, dropout, s_aux) for q, k, v in rows], dim=1), None


def _lengths(starts: torch.Tensor) -> list[int]:
    """The lengths of the rows with these boundaries. They are read once for all layers: a read waits for the GPU."""
    lengths: list[int] | None = getattr(starts, LENGTHS, None)
    if lengths is None:
        lengths = starts.diff().tolist()
        setattr(starts, LENGTHS, lengths)
    return lengths


def _has_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention supports these heads: all of one width up to 256, a multiple of 8, in 16 bits, on a GPU
    from Ampere on."""
    width = query.shape[-1]
    is_supported = width == value.shape[-1] and width <= 256 and width % 8 == 0
    return is_supported and query.is_cuda and query.itemsize == 2 and is_from_ampere_on(query.device)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
    dropout: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one row by torch's own kernel."""
    width, groups = value.shape[-1], query.shape[1] // key.shape[1]
    if sinks is not None:
        query, key, value = _after_sink(query, key, value, sinks.float() / scale)
    mask = _window(query.shape[2], window, query.device)
    if sinks is not None and mask is not None:
        mask[:, 0] = True
    # On a GPU, only FlashAttention takes groups, and it takes no mask; the kernel for the rest stores all scores.
    takes_groups = mask is None and (not query.is_cuda or _has_flash(query, value))
    if groups > 1 and not takes_groups:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=groups > 1 and takes_groups,
    )
    return (attended if sinks is None else attended[:, :, 1:, :width]).transpose(1, 2)


def _after_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prepend a token whose value is 0 and whose product with each query is the sink of the query's head.

    Two more dimensions of each head give this product; the second holds what rounding removes from the first. 8
    dimensions are added: kernels need a multiple of 8.
    """
    width, rounded = query.shape[-1], sinks.to(query.dtype)
    query, key, value = (pad(part, (0, 8, 1, 0)) for part in (query, key, value))
    query[:, :, 1:, width] = rounded[:, None]
    query[:, :, 1:, width + 1] = (sinks - rounded)[:, None]
    key[:, :, 0, width : width + 2] = 1
    return query, key, value


def _varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    starts: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    """Attention of all rows in one kernel; ``starts`` (rows + 1) are the row boundaries."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 accepts fewer key heads than query heads as they are; later releases need enable_gqa.
    grouped: dict[str, Any] = (
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
        **grouped,
    )
    assert isinstance(attended, torch.Tensor)
    return attended[None]


def _window(length: int, width: int | None, device: torch.device) -> torch.Tensor | None:
    """The causal mask (length, length) of a sliding window of ``width`` tokens; None when the window covers the row."""
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
    """For packed rows None, or the sliding window's width as a scalar tensor; otherwise sdpa's mask."""
    if batch_size == 1 and q_length == kv_length and attention_mask is None:
        return None if local_size is None else torch.tensor(local_size)
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, local_size=local_size, **others)


AttentionInterface.register(ROWS, attend_by_rows)
AttentionInterface.register(ROWS_ALONE, attend_by_rows)
AttentionMaskInterface.register(ROWS, _mask)
