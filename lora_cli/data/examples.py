"""Tokenized rows in flat arrays: selected, cut to what fits the model, laid in windows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_cli.errors import UserError

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Examples:
    """Tokenized rows, end to end.

    ``ids`` (total tokens, int32), ``supervised`` (total tokens, bool; never a row's first token, which nothing
    predicts), ``offsets`` (rows + 1, int64), ``source`` (rows, int32: the part of the mixture a row is from).
    ``format`` names the format; of a mixture of several, all of them, joined by '+'. ``fingerprint`` is a SHA-256 over
    the arrays.
    """

    ids: Tokens
    supervised: Mask
    offsets: Ints
    source: Tokens
    format: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)

    @property
    def supervised_per_row(self) -> Ints:
        return per_row(self.supervised, self.offsets)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for array in (self.ids, self.supervised, self.offsets, self.source):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def row(self, index: int) -> tuple[Tokens, Mask]:
        """Ids and supervision of one row."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.supervised[span]

    def select(self, rows: Sequence[int] | Ints) -> Examples:
        """These rows alone, in this order."""
        chosen = np.asarray(rows, np.int64)
        return _spans(self, self.offsets[:-1][chosen], self.offsets[1:][chosen], self.source[chosen])


def per_row(flags: Mask, offsets: Ints) -> Ints:
    """How many of a row's tokens are flagged; ``flags`` (total tokens,), the result (rows,)."""
    running = np.concatenate(([0], np.cumsum(flags, dtype=np.int64)))
    return running[offsets[1:]] - running[offsets[:-1]]


def _spans(examples: Examples, starts: Ints, ends: Ints, source: Tokens) -> Examples:
    """Rows made of the tokens between ``starts`` and ``ends``, all (rows,)."""
    if (starts[1:] >= ends[:-1]).all():  # in order and apart: ten times faster than slice by slice
        edges = np.zeros(len(examples.ids) + 1, np.int8)
        np.add.at(edges, starts, 1)
        np.add.at(edges, ends, -1)
        kept = np.cumsum(edges[:-1], dtype=np.int8).astype(np.bool_)
        ids, supervised = examples.ids[kept], examples.supervised[kept]
    else:
        cuts = [slice(*span) for span in zip(starts.tolist(), ends.tolist(), strict=True)]
        ids = np.concatenate([examples.ids[cut] for cut in cuts])
        supervised = np.concatenate([examples.supervised[cut] for cut in cuts])
    offsets = np.concatenate(([0], np.cumsum(ends - starts))).astype(np.int64)
    return Examples(ids, supervised, offsets, source, examples.format)


Piece = tuple[Tokens, Mask, int]
"""A row's ids, its supervision and its source."""


def join_pieces(pieces: Sequence[Piece], format_name: str) -> Examples:
    """The rows, end to end."""
    offsets = np.concatenate(([0], np.cumsum([len(ids) for ids, _, _ in pieces], dtype=np.int64)))
    return Examples(
        ids=np.concatenate([ids for ids, _, _ in pieces]) if pieces else np.zeros(0, np.int32),
        supervised=np.concatenate([mask for _, mask, _ in pieces]) if pieces else np.zeros(0, np.bool_),
        offsets=offsets.astype(np.int64),
        source=np.asarray([source for _, _, source in pieces], np.int32),
        format=format_name,
    )


def join(parts: list[Examples]) -> Examples:
    """The rows of all parts, end to end; lets go of each part once it is copied."""
    tokens, rows = sum(len(part.ids) for part in parts), sum(len(part) for part in parts)
    whole = Examples(
        ids=np.empty(tokens, np.int32),
        supervised=np.empty(tokens, np.bool_),
        offsets=np.zeros(rows + 1, np.int64),
        source=np.empty(rows, np.int32),
        format="+".join(dict.fromkeys(part.format for part in parts)),
    )
    token = row = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        whole.ids[token : token + len(part.ids)] = part.ids
        whole.supervised[token : token + len(part.ids)] = part.supervised
        whole.offsets[row + 1 : row + 1 + len(part)] = token + part.offsets[1:]
        whole.source[row : row + len(part)] = part.source
        token, row = token + len(part.ids), row + len(part)
    return whole


@dataclass(frozen=True)
class Fitted:
    """Examples that fit the model, and how many rows were cut and how many had nothing left to learn."""

    examples: Examples
    rows: int
    truncated: int
    dropped: int


def fit(examples: Examples, max_length: int, what: str) -> Fitted:
    """Keep each row's first ``max_length`` tokens; drop rows that are left with nothing supervised.

    Raises UserError, naming ``what``, when no row is left.
    """
    starts = examples.offsets[:-1]
    ends = np.minimum(examples.offsets[1:], starts + max_length)
    running = np.concatenate(([0], np.cumsum(examples.supervised, dtype=np.int64)))
    learned = running[ends] > running[starts]
    if not learned.any():
        raise UserError(
            f"nothing to learn or measure: none of {len(examples)} rows has a supervised token among its first "
            f"{max_length}",
            what,
            "raise data.max_length, or set data.train_on: all",
        )
    truncated = int((examples.lengths > max_length).sum())
    dropped = int((~learned).sum())
    fitted = examples
    if truncated or dropped:
        fitted = _spans(examples, starts[learned], ends[learned], examples.source[learned])
    return Fitted(fitted, len(examples), truncated, dropped)


def sliding_windows(examples: Examples, max_length: int) -> Examples:
    """Cut long rows into windows that overlap by half, each token supervised once, with what precedes it as context.

    This is how perplexity of plain text is measured; nothing is cut off.
    """
    stride = max(1, max_length // 2)
    pieces: list[Piece] = []
    for index in range(len(examples)):
        ids, mask = examples.row(index)
        scored = 0
        for start in range(0, len(ids), stride):
            end = min(start + max_length, len(ids))
            wanted = mask[start:end].copy()
            wanted[: max(scored - start, 1)] = False
            if wanted.any():
                pieces.append((ids[start:end], wanted, int(examples.source[index])))
            scored = end
            if end == len(ids):
                break
    return join_pieces(pieces, examples.format)


def check_ids(examples: Examples, vocabulary: int, where: str) -> None:
    """Raises UserError when a token's id is beyond the model's vocabulary: the tokenizer is another model's."""
    highest = int(examples.ids.max(initial=0))
    if highest >= vocabulary:
        what = f"the tokenizer gives ids up to {highest}, but the model's vocabulary has {vocabulary}"
        raise UserError(what, where, "tokenizer and weights are of different models")


def cut_for_evaluation(examples: Examples, max_length: int, what: str) -> Examples:
    """Plain text in sliding windows, anything else by its beginning, as in training. Raises UserError as fit does."""
    if examples.format == "text":
        return sliding_windows(examples, max_length)
    return fit(examples, max_length, what).examples
