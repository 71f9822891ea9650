"""Tokenized rows, in memory or in files: selecting them, cutting them to the maximum length or into windows."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lora_cli.errors import UserError, pluralize

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


CHUNK = 1 << 20
"""Tokens that are processed at a time."""


@dataclass
class Store:
    """The tokens of many rows: ``ids`` (tokens,) int32 and ``supervised`` (tokens,) bool, in memory or in memory-mapped
    files."""

    ids: Tokens
    supervised: Mask
    mappings: tuple[mmap.mmap, ...] = ()

    def release(self) -> None:
        """Release the pages that were read from the files, which would otherwise count as this process's memory. They
        stay in the system's page cache."""
        for mapping in self.mappings:
            mapping.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Flat:
    """Rows end to end: ``ids`` (tokens,) int32, ``supervised`` (tokens,) bool, ``offsets`` (rows + 1,) int64."""

    ids: Tokens
    supervised: Mask
    offsets: Ints


@dataclass(frozen=True)
class Examples:
    """Tokenized rows: those from ``starts`` to ``ends``, both (rows,) int64, in a store that other Examples may share.

    A row's first token is never supervised: nothing predicts it. ``source`` (rows,) int32 is the index of the row's
    source in the mixture, ``number`` (rows,) int32 the row's index in it. ``formats`` names each source's format.
    """

    store: Store
    starts: Ints
    ends: Ints
    source: Tokens
    number: Tokens
    formats: tuple[str, ...]

    @property
    def format(self) -> str:
        """The format, or all formats of a mixture, joined by '+'."""
        return "+".join(dict.fromkeys(self.formats))

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> Ints:
        return self.ends - self.starts

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def supervised_per_row(self) -> Ints:
        counts = [count_per_row(flat.supervised, flat.offsets) for flat in self.chunks()]
        return np.concatenate([np.zeros(0, np.int64), *counts])

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 over the rows' tokens, their supervision, their lengths and their sources."""
        digest = hashlib.sha256()
        for flat in self.chunks():
            digest.update(np.ascontiguousarray(flat.ids).data)
        for flat in self.chunks():
            digest.update(np.ascontiguousarray(flat.supervised).data)
        digest.update(offsets_of(self.lengths).data)
        digest.update(np.ascontiguousarray(self.source).data)
        return digest.hexdigest()

    def row(self, index: int) -> tuple[Tokens, Mask]:
        """Ids and supervision of one row."""
        span = slice(self.starts[index], self.ends[index])
        return self.store.ids[span], self.store.supervised[span]

    def select(self, rows: Sequence[int] | Ints | Mask) -> Examples:
        """Only these rows, in this order."""
        return replace(
            self,
            starts=self.starts[rows],
            ends=self.ends[rows],
            source=self.source[rows],
            number=self.number[rows],
        )

    def flat(self, first: int = 0, last: int | None = None) -> Flat:
        """The rows ``first`` to ``last`` (exclusive), end to end; copied unless they are contiguous in the store."""
        starts, ends = self.starts[first:last], self.ends[first:last]
        offsets = offsets_of(ends - starts)
        places: slice | Ints = slice(starts[0], ends[-1]) if len(starts) else slice(0)
        if (starts[1:] != ends[:-1]).any():
            places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)
        return Flat(self.store.ids[places], self.store.supervised[places], offsets)

    def chunks(self) -> Iterator[Flat]:
        """Yield all rows in order, about CHUNK tokens at a time, and release the pages read after each chunk."""
        offsets = offsets_of(self.lengths)
        first = 0
        while first < len(self):
            last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + CHUNK, side="right")) - 1)
            yield self.flat(first, last)
            self.store.release()
            first = last


def end_to_end(store: Store, offsets: Ints, source: Tokens, formats: tuple[str, ...]) -> Examples:
    """Examples of all rows of a store, in which they lie end to end, one source after the other."""
    number = (np.arange(len(source)) - np.searchsorted(source, source)).astype(np.int32)
    return Examples(store, offsets[:-1], offsets[1:], source, number, formats)


def offsets_of(lengths: Ints) -> Ints:
    """The start of each row when the rows lie end to end, and the end of the last: (rows + 1,) int64."""
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def count_per_row(flags: Mask, offsets: Ints) -> Ints:
    """The number of flagged tokens of each row, (rows,); ``flags`` is (total tokens,)."""
    running = np.concatenate(([0], np.cumsum(flags, dtype=np.int64)))
    return running[offsets[1:]] - running[offsets[:-1]]


def joined_store(ids: Sequence[Tokens], supervised: Sequence[Mask]) -> Store:
    """A store in memory with these tokens end to end."""
    return Store(np.concatenate([np.zeros(0, np.int32), *ids]), np.concatenate([np.zeros(0, np.bool_), *supervised]))


Piece = tuple[Tokens, Mask, int]
"""A row's ids, its supervision and its source."""


def join_pieces(pieces: Sequence[Piece], formats: tuple[str, ...]) -> Examples:
    """The rows, end to end."""
    store = joined_store([ids for ids, _, _ in pieces], [mask for _, mask, _ in pieces])
    offsets = offsets_of(np.asarray([len(ids) for ids, _, _ in pieces], np.int64))
    return end_to_end(store, offsets, np.asarray([source for _, _, source in pieces], np.int32), formats)


@dataclass(frozen=True)
class Fitted:
    """Examples cut to ``max_length``. Of ``rows``, ``truncated`` were too long and ``dropped`` had nothing to learn."""

    examples: Examples
    rows: int
    truncated: int
    dropped: int


def fit(examples: Examples, max_length: int, what: str) -> Fitted:
    """Keep each row's first ``max_length`` tokens; drop rows without a supervised token among these.

    Raises UserError, naming ``what``, when no row is left.
    """
    cut = replace(examples, ends=np.minimum(examples.ends, examples.starts + max_length))
    learned = cut.supervised_per_row > 0
    if not learned.any():
        raise UserError(
            f"nothing to learn or measure: none of {pluralize(len(examples), 'row')} has a supervised token among its "
            f"first {max_length}",
            what,
            "check that the rows have answers; raise data.max_length, or set data.train_on: all",
        )
    truncated = int((examples.lengths > max_length).sum())
    dropped = int((~learned).sum())
    fitted = cut.select(learned) if truncated or dropped else examples
    return Fitted(fitted, len(examples), truncated, dropped)


def sliding_windows(examples: Examples, max_length: int) -> Examples:
    """Cut long rows of plain text into windows that overlap by half. Each token is supervised once, with the preceding
    tokens as context. Rows of other formats keep their first ``max_length`` tokens, if one of these is supervised.

    This is how perplexity of plain text is measured: no text is cut off.
    """
    stride = max_length // 2
    pieces: list[Piece] = []
    numbers = []
    for index in range(len(examples)):
        ids, mask = examples.row(index)
        if examples.formats[examples.source[index]] != "text":
            ids, mask = ids[:max_length], mask[:max_length]
        scored = 0
        for start in range(0, len(ids), stride):
            end = min(start + max_length, len(ids))
            wanted = mask[start:end].copy()
            wanted[: scored - start] = False
            if wanted.any():
                pieces.append((ids[start:end], wanted, int(examples.source[index])))
                numbers.append(examples.number[index])
            scored = end
    return replace(join_pieces(pieces, examples.formats), number=np.asarray(numbers, np.int32))


def highest_id(examples: Examples) -> int:
    """The highest of the rows' token ids."""
    return max(int(flat.ids.max(initial=0)) for flat in examples.chunks())


def check_ids(examples: Examples, vocabulary: int, where: str) -> None:
    """Raises UserError when a token id is outside the model's vocabulary: the tokenizer is from another model."""
    highest = highest_id(examples)
    if highest >= vocabulary:
        what = f"the tokenizer gives ids up to {highest}, but the model's vocabulary has {vocabulary}"
        raise UserError(what, where, "the tokenizer and the weights are from different models")


def cut_for_evaluation(examples: Examples, max_length: int, what: str) -> Examples:
    """Cut plain text into sliding windows; cut other rows off, as in training. Raises UserError as ``fit`` does."""
    if "text" in examples.formats and len(windows := sliding_windows(examples, max_length)):
        return windows
    return fit(examples, max_length, what).examples  # raises when there are no windows
