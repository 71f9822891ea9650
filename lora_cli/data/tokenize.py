"""Rows -> token ids and which of them are supervised, held in flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from lora_cli.data.chat import conversation_segments, end_of_turn
from lora_cli.data.formats import Message, Segment, detect, read_content
from lora_cli.data.sources import Row, read_rows
from lora_cli.errors import Fault, UserError
from lora_cli.recipe.schema import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]
ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Examples:
    """Tokenized rows, end to end.

    ``ids`` (total tokens, int32), ``supervised`` (total tokens, bool; never a row's first token, which nothing
    predicts), ``offsets`` (rows + 1, int64), ``source`` (rows, int32: the part of the mixture a row is from).
    ``fingerprint`` is a SHA-256 over ids and supervision.
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
        running = np.concatenate(([0], np.cumsum(self.supervised, dtype=np.int64)))
        return running[self.offsets[1:]] - running[self.offsets[:-1]]

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
        pieces = [(*self.row(int(index)), int(self.source[index])) for index in rows]
        return _examples(pieces, self.format)


Piece = tuple[Tokens, Mask, int]
"""A row's ids, its supervision and its source."""


def _examples(pieces: Sequence[Piece], format_name: str) -> Examples:
    offsets = np.concatenate(([0], np.cumsum([len(ids) for ids, _, _ in pieces], dtype=np.int64)))
    return Examples(
        ids=np.concatenate([ids for ids, _, _ in pieces]) if pieces else np.zeros(0, np.int32),
        supervised=np.concatenate([mask for _, mask, _ in pieces]) if pieces else np.zeros(0, np.bool_),
        offsets=offsets.astype(np.int64),
        source=np.asarray([source for _, _, source in pieces], np.int32),
        format=format_name,
    )


def tokenize(data: Data, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Read, format and tokenize every row, whole.

    Raises UserError at the first row that cannot be read; ``check_rows`` finds these sooner, and all of them.
    """
    encoder = _Encoder(data, tokenizer)
    pieces = [(ids, mask, row.source) for row, ids, mask in encoder.encode_all(read_rows(sources))]
    return _examples(pieces, encoder.format)


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
    pieces = [
        (ids[:max_length], mask[:max_length], int(source))
        for (ids, mask), source in zip(map(examples.row, range(len(examples))), examples.source, strict=True)
        if mask[:max_length].any()
    ]
    if not pieces:
        raise UserError(
            f"nothing to learn or measure: none of {len(examples)} rows has a supervised token among its first "
            f"{max_length}",
            what,
            "raise data.max_length, or set data.train_on: all",
        )
    truncated = int((examples.lengths > max_length).sum())
    fitted = examples if len(pieces) == len(examples) and not truncated else _examples(pieces, examples.format)
    return Fitted(fitted, len(examples), truncated, len(examples) - len(pieces))


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
    return _examples(pieces, examples.format)


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


class _Encoder:
    """Turns rows into ids and masks, many at a time; holds what is found out once about format and tokenizer."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise UserError("the tokenizer gives no character offsets", hint="use a model with a tokenizer.json")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token", hint="set eos_token in tokenizer_config.json")
        self.data = data
        self.tokenizer = tokenizer
        self.format: str = data.format
        self.closing = ""

    def encode_all(self, items: Iterable[Row | Fault]) -> Iterator[tuple[Row, Tokens, Mask]]:
        """Each row with its ids and its supervision."""
        rows = self._rows_and_segments(items)
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            for (row, _), (ids, mask) in zip(chunk, self._encode([segments for _, segments in chunk]), strict=True):
                yield row, ids, mask

    def _rows_and_segments(self, items: Iterable[Row | Fault]) -> Iterator[tuple[Row, tuple[Segment, ...]]]:
        settled = False
        for item in items:
            if isinstance(item, Fault):
                raise UserError([item])
            if not settled:
                self._settle(item)
                settled = True
            yield item, self._segments(item)

    def _settle(self, first: Row) -> None:
        """Find out, at the first row, which format this is and how the chat template ends a turn."""
        if self.format == "auto":
            self.format = detect(first, self.data)
        if self.format == "chat":
            if not self.tokenizer.chat_template:
                hint = "use an instruct model, or another data.format (template lays a row out as you say)"
                raise UserError("the tokenizer has no chat template, which format: chat needs", first.where, hint)
            self.closing = end_of_turn(self.tokenizer)

    def _segments(self, row: Row) -> tuple[Segment, ...]:
        content = read_content(row, self.format, self.data)
        if self.format == "chat":
            turns = [turn for turn in content if isinstance(turn, Message)]
            segments = conversation_segments(self.tokenizer, turns, self.closing, row.where)
        else:
            segments = tuple(segment for segment in content if not isinstance(segment, Message))
        return tuple((text, True) for text, _ in segments) if self.data.train_on == "all" else segments

    def _encode(self, batch: Sequence[tuple[Segment, ...]]) -> Iterator[tuple[Tokens, Mask]]:
        texts = ["".join(text for text, _ in segments) for segments in batch]
        # A chat template writes its own special tokens; asked again, the tokenizer would add a second BOS.
        encoded = self.tokenizer(
            texts,
            add_special_tokens=self.format != "chat",
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for segments, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            mask = _supervised(segments, np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
            tokens, mask = self._close(np.asarray(ids, dtype=np.int32), mask, segments)
            mask[:1] = False
            yield tokens, mask

    def _close(self, ids: Tokens, mask: Mask, segments: tuple[Segment, ...]) -> tuple[Tokens, Mask]:
        """End the row with the end-of-text token, supervised when what stands before it is; a chat template that ends
        its turns has done so."""
        if self.closing:
            return ids, mask
        last = segments[-1][1]
        if len(ids) and ids[-1] == self.tokenizer.eos_token_id:
            mask[-1] = last
            return ids, mask
        return np.append(ids, np.int32(self.tokenizer.eos_token_id)), np.append(mask, last)


def _supervised(segments: tuple[Segment, ...], offsets: Ints) -> Mask:
    """Which tokens reach into a supervised segment; ``offsets`` (tokens, 2) are each token's first
    character and the one past its last.

    A token that begins in the prompt and ends in the completion holds the completion's first character: it is
    supervised. Tokenizers may leave white space out of a token's offsets; it counts to the token that follows.
    """
    ends = offsets[:, 1]
    starts = np.minimum(offsets[:, 0], np.concatenate(([0], ends[:-1]))) if len(ends) else ends
    mask = np.zeros(len(ends), dtype=np.bool_)
    at = 0
    for text, wanted in segments:
        if wanted:
            mask |= (ends > at) & (starts < at + len(text))
        at += len(text)
    return mask
