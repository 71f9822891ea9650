"""Rows -> token ids and which of them are supervised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np

from lora_cli.data.chat import conversation_segments, end_of_turn
from lora_cli.data.examples import Examples, Ints, Mask, Piece, Tokens, join_pieces
from lora_cli.data.formats import Message, Segment, detect, read_content
from lora_cli.data.sources import Row, whole_rows
from lora_cli.errors import UserError
from lora_cli.recipe.schema import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Tokenized:
    """Tokenized rows, and in how many of them the tokenizer's BOS was left out because the text began with one."""

    examples: Examples
    bos_removed: int


def tokenize(data: Data, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Read, format and tokenize every row of the sources, whole. Raises UserError as ``tokenize_rows`` does."""
    return tokenize_rows(data, whole_rows(sources), tokenizer).examples


def tokenize_rows(data: Data, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Tokenized:
    """Format and tokenize every row, whole.

    Raises UserError at the first row that is wrong; ``check_rows`` finds these sooner, and all of them.
    """
    check_usable(tokenizer)
    encoder = _Encoder(data, tokenizer)
    pieces = list(encoder.encode_all(rows))
    formats = "+".join(dict.fromkeys(encoder.formats.values()))
    return Tokenized(join_pieces(pieces, formats), encoder.bos_removed)


def check_usable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError when the tokenizer does not say which characters a token stands for, or has no end-of-text."""
    if not tokenizer.is_fast:
        raise UserError("the tokenizer gives no character offsets", hint="use a model with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token", hint="set eos_token in tokenizer_config.json")


class _Encoder:
    """Turns rows into ids and masks, many at a time; holds what is found out once about formats and tokenizer."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data = data
        self.tokenizer = tokenizer
        self.formats: dict[int, str] = {}  # by source
        self.closing = ""  # how the chat template ends a turn
        self.bos_removed = 0

    def encode_all(self, rows: Iterable[Row]) -> Iterator[Piece]:
        """Each row's ids, its supervision and its source, in order."""
        for format_name, alike in groupby(rows, self._format_of):
            segments = ((row.source, self._segments(row, format_name)) for row in alike)
            while chunk := list(islice(segments, ROWS_AT_ONCE)):
                encoded = self._encode([parts for _, parts in chunk], format_name)
                for (source, _), (ids, mask) in zip(chunk, encoded, strict=True):
                    yield ids, mask, source

    def _format_of(self, row: Row) -> str:
        """The format of the row's source, found out at the source's first row."""
        if row.source not in self.formats:
            self.formats[row.source] = detect(row, self.data)
            if self.formats[row.source] == "chat":
                self._settle_chat(row.where)
        return self.formats[row.source]

    def _settle_chat(self, where: str) -> None:
        if not self.tokenizer.chat_template:
            hint = "use an instruct model, or another data.format (template lays a row out as you say)"
            raise UserError("the tokenizer has no chat template, which format: chat needs", where, hint)
        self.closing = end_of_turn(self.tokenizer)

    def _segments(self, row: Row, format_name: str) -> tuple[Segment, ...]:
        content = read_content(row, format_name, self.data)
        if format_name == "chat":
            turns = [turn for turn in content if isinstance(turn, Message)]
            segments = conversation_segments(self.tokenizer, turns, self.closing, row.where)
        else:
            segments = tuple(segment for segment in content if not isinstance(segment, Message))
        return tuple((text, True) for text, _ in segments) if self.data.train_on == "all" else segments

    def _encode(self, batch: Sequence[tuple[Segment, ...]], format_name: str) -> Iterator[tuple[Tokens, Mask]]:
        texts = ["".join(text for text, _ in segments) for segments in batch]
        # A chat template writes its own special tokens; asked again, the tokenizer would add a second BOS.
        encoded = self.tokenizer(
            texts,
            add_special_tokens=format_name != "chat",
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for segments, numbers, places in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            ids, offsets = np.asarray(numbers, np.int32), np.asarray(places, np.int64).reshape(-1, 2)
            if self._doubles_bos(ids, offsets):
                ids, offsets = ids[1:], offsets[1:]
                self.bos_removed += 1
            mask = _supervised(segments, offsets)
            if format_name != "chat" or not self.closing:
                ids, mask = self._close(ids, mask, segments)
            mask[:1] = False
            yield ids, mask

    def _doubles_bos(self, ids: Tokens, offsets: Ints) -> bool:
        """Whether the tokenizer put its BOS (which stands for no character) before a text that begins with one."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos and not offsets[0].any()

    def _close(self, ids: Tokens, mask: Mask, segments: tuple[Segment, ...]) -> tuple[Tokens, Mask]:
        """End the row with the end-of-text token, supervised when what stands before it is."""
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
