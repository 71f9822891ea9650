"""Rows -> token ids and which of them are supervised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from lora_cli.data.chat import conversation_segments, end_of_turn
from lora_cli.data.examples import Examples, Ints, Mask, Tokens, join_pieces
from lora_cli.data.formats import Message, Segment, detect, read_content
from lora_cli.data.sources import Row, read_rows
from lora_cli.errors import Fault, UserError
from lora_cli.recipe.schema import Data, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1000


def tokenize(data: Data, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Read, format and tokenize every row, whole.

    Raises UserError at the first row that cannot be read; ``check_rows`` finds these sooner, and all of them.
    """
    encoder = _Encoder(data, tokenizer)
    pieces = [(ids, mask, row.source) for row, ids, mask in encoder.encode_all(read_rows(sources))]
    return join_pieces(pieces, encoder.format)


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
