"""Attention of packed rows by matrix products, for bfloat16 on a CPU.

Forward and backward together take about half the time of torch's own kernel. Forward alone, that kernel is faster: it
computes rows whose weights are not kept, if no window cuts them and keys and values have one width. Short rows of
similar length go through one product together, since a call costs as much as a small product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from lora_cli.model.fast_paths.shapes import rounded_size

BLOCK_TOKENS = 256
"""Most tokens of a long row whose scores are computed at a time. Keys after the last of these tokens are left out."""
MAX_UNBLOCKED_TOKENS = 512
"""Rows of at most this many tokens are one block."""
MAX_SAVED_TOKENS = 1024
"""Rows of at most this many tokens keep their attention weights for the backward pass; longer rows recompute them."""
MAX_SCORES = 2**24
"""Most scores computed at a time, over all heads. It never limits a block to fewer than MIN_BLOCK_TOKENS tokens."""
MIN_BLOCK_TOKENS = 16
PAD_MULTIPLE = 32
"""Rows are padded to multiples of this many tokens, so that more rows are alike and products have few shapes: each
shape takes up to half a megabyte (``shapes``)."""
MAX_SHARED_SCORES = 2**22
"""Most scores of several rows computed at a time, over all heads."""
MAX_PADDING_SCORES = 2**17
"""About how many scores, over all heads, take as long to compute as the calls that a separate row needs."""


class RowProducts(torch.autograd.Function):
    """softmax(scale q k^T) v within each row, causal, and within a sliding ``window`` of tokens unless that is None.

    q (1, heads, tokens, width), k (1, key heads, tokens, width), v (1, key heads, tokens, v's width). The rows'
    ``lengths`` sum to all tokens. Returns (1, tokens, heads, v's width). The backward pass recomputes the attention
    weights of long rows, as in FlashAttention (arXiv:2205.14135, section 3.1).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        group = query.shape[1] // key.shape[1]
        queries, keys = _layouts(lengths, key.shape[1], group)
        q = queries.gather(query.transpose(1, 2))
        k, v = (keys.gather(each.transpose(1, 2)) for each in (key, value))
        attended = v.new_empty(len(q), v.shape[-1])
        kept: list[torch.Tensor] = []
        for own, seen in zip(queries.rows, keys.rows, strict=True):
            q_row, k_row, v_row, out = _matrices((q, own), (k, seen), (v, seen), (attended, own))
            keeps = own.tokens <= MAX_SAVED_TOKENS and any(ctx.needs_input_grad)
            if not keeps and (window is None or window >= own.tokens) and q.shape[-1] == v.shape[-1]:
                _attend(q_row, k_row, v_row, out, scale)
                continue
            for block in _blocks(own.tokens, own.matrices, group, window):
                weights = _weights(q_row, k_row, block, scale, window)
                torch.bmm(weights, v_row[:, block.seen], out=out[:, block.queries])
                if keeps:
                    kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.layouts, ctx.scale, ctx.window, ctx.group = (queries, keys), scale, window, group
        return queries.ungather(attended)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        (queries, keys), group, scale = ctx.layouts, ctx.group, ctx.scale
        g = queries.gather(grad).index_fill_(0, queries.padding, 0)  # so that padding adds nothing to a gradient
        grads = [torch.empty_like(each) for each in (q, k, v)]
        known = iter(kept)
        for own, seen in zip(queries.rows, keys.rows, strict=True):
            q_row, k_row, v_row, g_row = _matrices((q, own), (k, seen), (v, seen), (g, own))
            grad_q, *others = _matrices((grads[0], own), (grads[1], seen), (grads[2], seen))
            blocks = list(_blocks(own.tokens, own.matrices, group, ctx.window))
            sums = [_Sum(each, len(blocks)) for each in others]
            for block in blocks:
                weights = (
                    next(known) if own.tokens <= MAX_SAVED_TOKENS else _weights(q_row, k_row, block, scale, ctx.window)
                )
                by_weights = torch.bmm(g_row[:, block.queries], v_row[:, block.seen].transpose(1, 2))
                slope = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
                _product(slope, k_row[:, block.seen], scale, grad_q[:, block.queries])
                sums[0].add(block.seen, slope.transpose(1, 2), q_row[:, block.queries], scale)
                sums[1].add(block.seen, weights.transpose(1, 2), g_row[:, block.queries], 1)
            for total in sums:
                total.end()
        taken = (layout.ungather(each) for layout, each in zip((queries, keys, keys), grads, strict=True))
        return *(each.transpose(1, 2) for each in taken), None, None, None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """Causal attention within rows by torch's own kernel, which is faster in the forward pass."""
    matrices, tokens, width = k.shape
    queries, places = (each.view(matrices, tokens, -1, width).transpose(1, 2) for each in (q, out))
    keys, values = (each[:, None].expand_as(queries) for each in (k, v))  # one for each query head that shares them
    places.copy_(scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale))


class _Sum:
    """Sums matrix products into ``out`` (matrices, tokens, width), in float32 when there are several."""

    def __init__(self, out: torch.Tensor, count: int) -> None:
        self.out = out
        wide = torch.promote_types(out.dtype, torch.float32)
        self.exact = None if count == 1 else torch.zeros_like(out, dtype=wide)

    def add(self, place: slice, one: torch.Tensor, other: torch.Tensor, factor: float) -> None:
        if self.exact is None:
            _product(one, other, factor, self.out[:, place])
        else:
            self.exact[:, place].add_(torch.bmm(one, other), alpha=factor)

    def end(self) -> None:
        if self.exact is not None:
            self.out.copy_(self.exact)


@dataclass(frozen=True)
class Rows:
    """Rows that share products: their vectors' place, the padded tokens of each, and a matrix per row and key head."""

    place: slice
    tokens: int
    matrices: int


@dataclass(frozen=True)
class Layout:
    """How all tokens' and heads' vectors are laid out: row by row, shortest first, (key heads, tokens * group, width).

    The ``group`` of queries that share a key head lie together, token by token, so that each product has one matrix per
    key head. Rows are padded to a rounded number of tokens, so that products have few shapes. The padding, in the
    places ``padding``, repeats a row's last token; the row's own tokens come before it and do not see it.
    """

    rows: tuple[Rows, ...]
    sources: torch.Tensor
    places: torch.Tensor
    padding: torch.Tensor
    heads: int

    def gather(self, line: torch.Tensor) -> torch.Tensor:
        """Lay out ``line`` (1, tokens, all heads, width) as (vectors, width)."""
        return line[0].flatten(0, 1).index_select(0, self.sources)

    def ungather(self, laid: torch.Tensor) -> torch.Tensor:
        """The reverse of ``gather``."""
        return laid.index_select(0, self.places).view(1, -1, self.heads, laid.shape[-1])


@lru_cache(maxsize=4)
def _layouts(lengths: tuple[int, ...], heads: int, group: int) -> tuple[Layout, Layout]:
    """The layouts of queries, ``group`` per key head, and of keys, with ``heads`` key heads."""
    together: list[list[slice]] = []
    for length, end in sorted(zip(lengths, accumulate(lengths), strict=True)):
        row = slice(end - length, end)
        if together and _go_together(together[-1], row, heads * group):
            together[-1].append(row)
        else:
            together.append([row])
    keys = _layout(together, heads, 1)
    queries = keys if group == 1 else _layout(together, heads, group)
    return queries, keys


def _go_together(rows: list[slice], row: slice, heads: int) -> bool:
    """Whether ``row`` shares products with ``rows``, none of which is longer: if all their scores are few, and those
    added by padding ``rows`` to its length take less time than separate calls."""
    tokens = _tokens(row)
    added = heads * len(rows) * (tokens**2 - _tokens(rows[-1]) ** 2)
    return added < MAX_PADDING_SCORES and heads * (len(rows) + 1) * tokens * _block(tokens) <= MAX_SHARED_SCORES


def _tokens(row: slice) -> int:
    """The number of tokens to which a row is padded by itself."""
    length: int = row.stop - row.start
    return max(rounded_size(length), -(-length // PAD_MULTIPLE) * PAD_MULTIPLE)


def _block(tokens: int) -> int:
    """The most tokens whose scores are computed at a time, for a row padded to ``tokens``."""
    return tokens if tokens <= MAX_UNBLOCKED_TOKENS else BLOCK_TOKENS


def _layout(together: list[list[slice]], heads: int, group: int) -> Layout:
    """The layout of lists of rows. The rows of a list are padded like its last row, the longest."""
    laid, sources, beyond = [], [], []
    places = torch.empty(sum(row.stop - row.start for rows in together for row in rows), heads * group).long()
    head = torch.arange(heads * group).view(heads, 1, group)
    end = 0
    for rows in together:
        tokens = _tokens(rows[-1])
        vectors = torch.arange(end, end + len(rows) * heads * tokens * group).view(-1, heads, tokens, group)
        for row, own in zip(rows, vectors, strict=True):
            length = row.stop - row.start
            token = row.start + torch.arange(tokens).clamp(max=length - 1)
            sources.append((token[:, None] * heads * group + head).flatten())
            places[row] = own[:, :length].transpose(0, 1).flatten(1)
            beyond.append(own[:, length:].flatten())
        laid.append(Rows(slice(end, end + vectors.numel()), tokens, len(rows) * heads))
        end += vectors.numel()
    return Layout(tuple(laid), torch.cat(sources), places.flatten(), torch.cat(beyond), heads * group)


def _matrices(*parts: tuple[torch.Tensor, Rows]) -> list[torch.Tensor]:
    """For each pair of laid-out vectors and rows, the rows' vectors as (matrices, tokens * group, width)."""
    return [laid[rows.place].view(rows.matrices, -1, laid.shape[-1]) for laid, rows in parts]


@dataclass(frozen=True)
class Block:
    """``size`` successive tokens of a row: the place of their ``queries``, and the tokens ``seen`` by some of them,
    which are ``before`` tokens before the block and the block's own."""

    queries: slice
    seen: slice
    size: int
    before: int


def _blocks(tokens: int, matrices: int, group: int, window: int | None) -> Iterator[Block]:
    """The blocks of rows that share products, with this many ``matrices`` and ``group`` queries per key."""
    most = _block(tokens)
    most = max(MIN_BLOCK_TOKENS, min(most, MAX_SCORES // (matrices * group * min(tokens, (window or tokens) + most))))
    for start in range(0, tokens, most):
        size = min(most, tokens - start)
        before = start if window is None else min(start, window - 1)
        queries = slice(start * group, (start + size) * group)
        yield Block(queries, slice(start - before, start + size), size, before)


def _weights(q: torch.Tensor, k: torch.Tensor, block: Block, scale: float, window: int | None) -> torch.Tensor:
    """softmax(scale q k^T) of a block's queries over the tokens they see: (matrices, the block's queries, tokens seen).
    Masks are added only to the two corners that need one."""
    keys, group = k[:, block.seen].transpose(1, 2), q.shape[1] // k.shape[1]
    size, queries = block.size, q[:, block.queries]
    later = _mask(group, q.dtype, later=True)[: size * group, :size]
    if block.before:
        scores = _product(queries, keys, scale)
        scores[:, :, block.before :].add_(later)
    else:  # the corner is the whole block, and the product adds the mask in less time
        scores = torch.baddbmm(later, queries, keys, alpha=scale)
    near = size if window is None else window - block.before
    if near < size:  # later queries of the block no longer see the first tokens
        corner = _mask(group, q.dtype, later=False)[: (size - near) * group, : size - near]
        scores[:, near * group :, : size - near] += corner
    return scores.softmax(-1)


def _product(x: torch.Tensor, y: torch.Tensor, factor: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """factor * (x @ y), matrix by matrix, in one operation."""
    return torch.baddbmm(x.new_empty(()), x, y, beta=0, alpha=factor, out=out)


@lru_cache(maxsize=8)
def _mask(group: int, dtype: torch.dtype, later: bool) -> torch.Tensor:
    """The mask (n * group, n) for n = MAX_UNBLOCKED_TOKENS that is -inf, else 0, for query i and the ``later`` keys,
    which are after the i-th, or else for the keys up to the i-th, which are outside its window."""
    every = torch.ones(MAX_UNBLOCKED_TOKENS, MAX_UNBLOCKED_TOKENS, dtype=torch.bool)
    hidden = every.triu(1) if later else every.tril()
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf).repeat_interleave(group, dim=0)
