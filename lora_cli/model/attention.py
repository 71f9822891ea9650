"""Attention for rows laid end to end: each row among its own tokens alone, without a mask over the whole line.

Registered with Transformers under the name ``ROWS``; a forward pass says where rows begin and end by the arguments that
FlashAttention has there. On a GPU, in 16 bits, the rows go through torch's variable-length FlashAttention together;
elsewhere one after the other, on a processor in 16 bits by products of matrices, which take about half the time of
torch's own kernel there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ROWS = "rows"

BLOCK = 256
"""Tokens of a row whose scores are made at a time, at most: later tokens than the last one's are left out."""
SHORT = 1024
"""Tokens of a row, at most, whose weights are kept for the backward pass; those of a longer one are made again."""
SCORES = 2**24
"""Scores that are made at a time, at most, over all heads; but never those of fewer queries than LEAST tokens'."""
LEAST = 16


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
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row.

    query (1, heads, tokens, width); key and value (1, key heads, tokens, width); ``cu_seq_lens_q`` (rows + 1) int32.
    Returns (1, tokens, heads, width), as Transformers wants it. Without ``cu_seq_lens_q``, or where a mask says more,
    this is Transformers' own sdpa. Raises ValueError for what needs the scores themselves (soft caps, sinks, biases),
    and for layers whose window is told by their mask alone.
    """
    if attention_mask is not None and attention_mask.ndim == 0:
        if sliding_window != int(attention_mask):
            raise ValueError("attention by rows does not know a window that only the mask tells of")
        attention_mask = None
    needs = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if needs:
        raise ValueError(f"attention by rows does not know {', '.join(needs)}")
    if cu_seq_lens_q is None or attention_mask is not None:
        if attention_mask is None and query.shape[2] == key.shape[2]:  # a row alone, for which there is no mask
            attention_mask = _window(query.shape[2], sliding_window, query.device)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    if query.is_cuda and query.dtype != torch.float32 and not dropout:
        assert max_length_q is not None
        return _together(query, key, value, scaling, sliding_window, cu_seq_lens_q, max_length_q), None
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(torch.split(part, lengths, dim=2) for part in (query, key, value)), strict=True)
    by_products = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = [
        _by_products(q, k, v, scale, sliding_window) if by_products else _fused(q, k, v, scale, sliding_window, dropout)
        for q, k, v in rows
    ]
    return torch.cat(attended, dim=1), None


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None, dropout: float
) -> torch.Tensor:
    """One row by torch's own kernel."""
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_window(query.shape[2], window, query.device),
        dropout_p=dropout,
        is_causal=window is None or query.shape[2] <= window,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    ).transpose(1, 2)


def _by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> torch.Tensor:
    """One row, softmax(scale q k^T) v, a block of queries at a time.

    The queries that share a key's head are laid together, token by token, so that each product has one matrix a head.
    """
    heads, tokens, width = key.shape[1:]
    group = query.shape[1] // heads
    queries = query[0].view(heads, group, tokens, width).transpose(1, 2).reshape(heads, tokens * group, width)
    if tokens > SHORT:
        attended = Recomputed.apply(queries, key[0], value[0], scale, window)  # type: ignore[no-untyped-call]
    else:
        blocks = _blocks(group, key[0], window)
        parts = [_weights(queries, key[0], each, scale, window) @ value[0, :, each.seen] for each in blocks]
        attended = torch.cat(parts, dim=1)
    laid: torch.Tensor = attended.view(heads, tokens, group, -1).transpose(0, 1)
    return laid.reshape(1, tokens, heads * group, -1)


class Recomputed(torch.autograd.Function):
    """softmax(scale q k^T) v as ``_by_products`` has it, whose weights are made again in the backward pass, as in
    FlashAttention (arXiv:2205.14135, section 3.1).

    q (heads, tokens * group, width), k (heads, tokens, width), v (heads, tokens, its own width).
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.window = scale, window
        attended = q.new_empty(*q.shape[:2], v.shape[-1])
        for block in _blocks(q.shape[1] // k.shape[1], k, window):
            torch.bmm(_long_weights(q, k, block, scale, window), v[:, block.seen], out=attended[:, block.queries])
        return attended

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (
            torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in (k, v)
        )
        for block in _blocks(q.shape[1] // k.shape[1], k, ctx.window):
            weights, g = _long_weights(q, k, block, ctx.scale, ctx.window), grad[:, block.queries]
            grad_v[:, block.seen] += weights.transpose(1, 2) @ g
            slope = torch._softmax_backward_data(g @ v[:, block.seen].transpose(1, 2), weights, -1, weights.dtype)
            torch.bmm(slope, k[:, block.seen], out=grad_q[:, block.queries])
            grad_k[:, block.seen] += slope.transpose(1, 2) @ q[:, block.queries]
        return grad_q.mul_(ctx.scale), grad_k.mul_(ctx.scale).to(k.dtype), grad_v.to(v.dtype), None, None


@dataclass(frozen=True)
class Block:
    """Tokens ``start`` to ``end`` of a row: where their ``queries`` lie, and the tokens that some of them see."""

    start: int
    end: int
    queries: slice
    seen: slice


def _blocks(group: int, key: torch.Tensor, window: int | None) -> Iterator[Block]:
    """The blocks of a row with key (heads, tokens, width), each of whose heads serves ``group`` queries a token."""
    heads, tokens, _ = key.shape
    most = max(LEAST, min(BLOCK, SCORES // (heads * group * min(tokens, (window or tokens) + BLOCK))))
    for start in range(0, tokens, most):
        end = min(tokens, start + most)
        first = 0 if window is None else max(0, start - window + 1)
        yield Block(start, end, slice(start * group, end * group), slice(first, end))


def _weights(q: torch.Tensor, k: torch.Tensor, block: Block, scale: float, window: int | None) -> torch.Tensor:
    """softmax(scale q k^T) of a block's queries over what it sees (heads, its queries, tokens seen), of a SHORT row."""
    own, group = q[:, block.queries], q.shape[1] // k.shape[1]
    here = slice(SHORT - block.start + block.seen.start, SHORT - block.start + block.end)
    mask = _unseen(group, window, q.dtype)[: own.shape[1], here]
    return torch.baddbmm(mask, own, k[:, block.seen].transpose(1, 2), alpha=scale).softmax(-1)


def _long_weights(q: torch.Tensor, k: torch.Tensor, block: Block, scale: float, window: int | None) -> torch.Tensor:
    """The same of a row of any length, whose mask is laid over the two corners that have one, in place: autograd would
    make that costly."""
    keys, group = k[:, block.seen].transpose(1, 2), q.shape[1] // k.shape[1]
    scores = torch.baddbmm(q.new_zeros(()), q[:, block.queries], keys, beta=0, alpha=scale)
    size, before = block.end - block.start, block.start - block.seen.start
    scores[:, :, before:] += _unseen(group, None, q.dtype)[: size * group, SHORT : SHORT + size]
    near = size if window is None else window - before
    if near < size:  # the queries from here on do not see the first tokens that others of the block do
        corner = _outside(group, q.dtype)[: (size - near) * group, : size - near]
        scores[:, near * group :, : size - near] += corner
    return scores.softmax(-1)


@lru_cache(maxsize=4)
def _unseen(group: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """-inf where a key is not seen, else 0 (BLOCK * group, SHORT + BLOCK): query i is the key in column SHORT + i."""
    distance = torch.arange(SHORT, SHORT + BLOCK)[:, None] - torch.arange(SHORT + BLOCK)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    mask = torch.zeros(distance.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return mask.repeat_interleave(group, dim=0)


@lru_cache(maxsize=4)
def _outside(group: int, dtype: torch.dtype) -> torch.Tensor:
    """-inf for query i and the keys up to the i-th, which its window has left behind, else 0 (BLOCK * group, BLOCK)."""
    hidden = torch.ones(BLOCK, BLOCK, dtype=torch.bool).tril()
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf).repeat_interleave(group, dim=0)


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
AttentionMaskInterface.register(ROWS, _mask)


def knows_rows(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the architecture's attention takes rows by FlashAttention's arguments."""
    return bool(model._supports_flash_attn)
