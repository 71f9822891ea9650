"""Rows -> token ids and supervision masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from lora_cli.data.chat import conversation_segments, end_of_turn, structure_tokens
from lora_cli.data.examples import Examples, Ints, Mask, Piece, Tokens, join_pieces
from lora_cli.data.formats import Content, Segment, detect_format, read_content
from lora_cli.data.gather import gather
from lora_cli.data.parallel import in_order
from lora_cli.data.sources import Row, valid_rows
from lora_cli.data.turns import Conversation
from lora_cli.errors import UserError
from lora_cli.recipe.schema import Data, Source

ROWS_AT_ONCE = 250


@dataclass(frozen=True)
class Forged:
    """Chat rows with a turn whose text contains a special token that the chat template writes around turns: how many
    ``rows``, the index of the ``first`` of them, and the ``token`` in it."""

    rows: int = 0
    first: int = 0
    token: str = ""


@dataclass(frozen=True)
class Tokenized:
    """Tokenized rows, the number of those whose text begins with a BOS, so that the tokenizer's was removed, and those
    whose text forges the structure of a conversation."""

    examples: Examples
    bos_removed: int
    forged: Forged = Forged()


@dataclass(frozen=True)
class Chunk:
    """Rows of one source: their format, the source's index, and each row's content and place."""

    format: str
    source: int
    rows: tuple[tuple[Content, str], ...]


def tokenize(data: Data, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Read, format and tokenize every row of the sources, uncut. Raises UserError as ``tokenize_rows`` does."""
    return tokenize_rows(data, valid_rows(sources), tokenizer).examples


def tokenize_rows(
    data: Data, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
) -> Tokenized:
    """Format and tokenize every row, uncut. Many rows use all cores, and ``gather`` stores them in ``folder``.

    Raises UserError at the first invalid row. ``row_faults`` reports up to ten beforehand, without tokenizing.
    """
    check_usable(tokenizer)
    encode = partial(encode_chunk, tokenizer, data.train_on == "all")
    removed = seen = 0
    forged = Forged()

    def examples() -> Iterator[Examples]:
        nonlocal removed, seen, forged
        for part in in_order(encode, read_chunks(data, rows)):
            removed += part.bos_removed
            if part.forged.rows:
                earlier = forged if forged.rows else replace(part.forged, first=seen + part.forged.first)
                forged = replace(earlier, rows=forged.rows + part.forged.rows)
            seen += len(part.examples)
            yield part.examples

    gathered = gather(examples(), folder)
    return Tokenized(gathered, removed, forged)


def check_usable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError when the tokenizer gives no character offsets, or has no EOS token."""
    if not tokenizer.is_fast:
        raise UserError("the tokenizer gives no character offsets", hint="use a model with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token", hint="set eos_token in tokenizer_config.json")


def read_chunks(data: Data, rows: Iterable[Row]) -> Iterator[Chunk]:
    """Yield the rows' contents in order, in chunks of one source, whose first row decides the format. Raises UserError
    at the first invalid row."""
    for source, of_source in groupby(rows, lambda row: row.source):
        first = next(of_source)
        format_name = detect_format(first, data)
        read = ((read_content(row, format_name, data), row.where) for row in chain((first,), of_source))
        while chunk := tuple(islice(read, ROWS_AT_ONCE)):
            yield Chunk(format_name, source, chunk)


def _closing(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The text that ends a chat turn, or ''. Raises UserError, with the place of a row, without a chat template."""
    if not tokenizer.chat_template:
        hint = "use an instruct model, write a chat_template.jinja into the model's folder, or set another data.format"
        raise UserError("the tokenizer has no chat template, which format: chat needs", where, hint)
    return end_of_turn(tokenizer)


def encode_chunk(tokenizer: PreTrainedTokenizerBase, supervise_all: bool, chunk: Chunk) -> Tokenized:
    """Tokenize the chunk's rows into ids and masks. Raises UserError for a conversation that the template refuses."""
    is_chat = chunk.format == "chat"
    closing = _closing(tokenizer, chunk.rows[0][1]) if is_chat else ""
    batch = [
        conversation_segments(tokenizer, said, closing, where) if isinstance(said, Conversation) else said
        for said, where in chunk.rows
    ]
    if supervise_all:
        batch = [tuple((text, True) for text, _ in segments) for segments in batch]
    # A chat template writes its own special tokens; the tokenizer would add a second BOS.
    encoded = tokenizer(
        ["".join(text for text, _ in segments) for segments in batch],
        add_special_tokens=not is_chat,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    pieces: list[Piece] = []
    removed = 0
    for segments, numbers, places in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids, offsets = np.asarray(numbers, np.int32), np.asarray(places, np.int64).reshape(-1, 2)
        if _has_double_bos(tokenizer.bos_token_id, ids, offsets):
            ids, offsets = ids[1:], offsets[1:]
            removed += 1
        mask = _supervised(segments, offsets)
        if not closing:
            ids, mask = _append_eos(tokenizer.eos_token_id, ids, mask, segments)
        mask[:1] = False
        pieces.append((ids, mask, chunk.source))
    forged = _forged(tokenizer, chunk) if is_chat else Forged()
    return Tokenized(join_pieces(pieces, (chunk.format,) * (chunk.source + 1)), removed, forged)


def _forged(tokenizer: PreTrainedTokenizerBase, chunk: Chunk) -> Forged:
    tokens = structure_tokens(tokenizer)
    found = []
    for index, (said, _) in enumerate(chunk.rows):
        assert isinstance(said, Conversation)
        talk = "\n".join(turn.content for turn in said.turns)
        found += [(index, token) for token in tokens if token in talk][:1]
    return Forged(len(found), *found[0]) if found else Forged()


def _has_double_bos(bos: int | None, ids: Tokens, offsets: Ints) -> bool:
    """Whether the tokenizer added its BOS (an empty character span) before a text that begins with a BOS."""
    return bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos and not offsets[0].any()


def _append_eos(eos: int, ids: Tokens, mask: Mask, segments: tuple[Segment, ...]) -> tuple[Tokens, Mask]:
    """End the row with the EOS token, supervised when the text before it is."""
    last = next((wanted for text, wanted in reversed(segments) if wanted or text.strip()), False)
    if len(ids) and ids[-1] == eos:
        mask[-1] = last
        return ids, mask
    return np.append(ids, np.int32(eos)), np.append(mask, last)


def _supervised(segments: tuple[Segment, ...], offsets: Ints) -> Mask:
    """The mask (tokens,) of tokens that overlap a supervised segment. ``offsets`` (tokens, 2) are each token's first
    character and the one past its last.

    A token that begins in the prompt and ends in the completion is supervised: it holds the completion's first
    character. White space that a tokenizer leaves out of the offsets counts as part of the next token.
    """
    ends = offsets[:, 1]
    starts = np.minimum(offsets[:, 0], np.concatenate(([0], ends[:-1])))
    mask = np.zeros(len(ends), dtype=np.bool_)
    at = 0
    for text, wanted in segments:
        if wanted:
            mask |= (ends > at) & (starts < at + len(text))
        at += len(text)
    return mask
