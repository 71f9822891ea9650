"""Counts over the tokenized rows, made before training: duplicates, validation leaks, supervised ends, BOS tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from lora_cli.data.chat import (
    TEMPLATE_DATE,
    end_of_turn,
    generation_marked_text,
    generation_prompt_extra,
    special_tokens,
    text_after_content,
    turn_endings,
)
from lora_cli.data.examples import Examples, Fitted, Mask, count_per_row
from lora_cli.data.tokenize import Forged, Tokenized
from lora_cli.errors import UserError


@dataclass(frozen=True)
class Report:
    """Counts of rows.

    Over the rows before any is cut or dropped: ``duplicates`` repeat an earlier training row's ids and supervision;
    ``validation_in_train`` are validation rows with the ids of a training row; ``ends_masked`` have an answer (or text)
    whose end is not supervised; ``empty_answers`` have only that end supervised. Over the rows that are kept:
    ``ends_supervised`` have the end of their last answer supervised; ``bos_per_row`` is the fewest and the most BOS in
    a row; ``bos_doubled`` begin with two. ``bos_removed`` counts rows of ``data.train``, those held out too, that begin
    with their own BOS, so that the tokenizer's was removed; ``forged`` describes those whose text has special tokens of
    the chat template. ``template_notes`` describe the chat template.
    """

    duplicates: int
    validation_in_train: int
    ends_supervised: int
    ends_masked: int
    empty_answers: int
    bos_per_row: tuple[int, int]
    bos_doubled: int
    bos_removed: int
    forged: Forged
    template_notes: tuple[str, ...]


def audit(
    whole: Examples, fitted: Fitted, held_out: Examples | None, tokenizer: PreTrainedTokenizerBase, made: Tokenized
) -> Report:
    """Count over the training rows, ``whole`` and ``fitted`` to the model, and over the uncut validation rows. ``made``
    are the rows of ``data.train`` before any were held out."""
    kept = fitted.examples
    learned = _digests(whole, supervision=True)
    leaked = 0
    if held_out is not None:
        leaked = int(np.isin(_digests(held_out, supervision=False), _digests(whole, supervision=False)).sum())
    fewest, most, doubled = _bos_counts(kept, tokenizer)
    answers, ended = whole.supervised_per_row, _ends_supervised(whole, tokenizer)
    return Report(
        duplicates=len(learned) - len(np.unique(learned)),
        validation_in_train=leaked,
        ends_supervised=int(_ends_supervised(kept, tokenizer).sum()),
        ends_masked=int(((answers > 0) & ~ended).sum()),
        empty_answers=int(((answers == 1) & ended).sum()),
        bos_per_row=(fewest, most),
        bos_doubled=doubled,
        bos_removed=made.bos_removed,
        forged=made.forged,
        template_notes=_template_notes(tokenizer) if "chat" in whole.formats else (),
    )


def ends_without_stop(
    tokenizer: PreTrainedTokenizerBase, formats: Collection[str], stops: Collection[int]
) -> list[tuple[str, int]]:
    """The special tokens, with their ids, that end the answers of rows of these formats, where none of those that end
    such an answer is in ``stops``."""
    special, found = special_tokens(tokenizer), []
    for is_chat in sorted({each == "chat" for each in formats}):
        written = _ids(tokenizer, end_of_turn(tokenizer)) if is_chat else []
        ends = [each for each in written or [tokenizer.eos_token_id] if each in special]
        if ends and not set(ends).intersection(stops):
            found.append((special[ends[0]], ends[0]))
    return found


def check_supervised(fitted: Fitted, least: float, max_length: int) -> None:
    """Raises UserError when less than the share ``least`` of the rows has a supervised token after cutting."""
    kept = len(fitted.examples)
    if kept < least * fitted.rows:
        raise UserError(
            f"only {kept:,} of {fitted.rows:,} rows ({kept / fitted.rows:.1%}) have a supervised token among their "
            f"first {max_length}; data.min_supervised_rows asks for {least:.1%}",
            "data.train",
            "raise data.max_length, set data.train_on: all, or lower data.min_supervised_rows",
        )


def _digests(examples: Examples, supervision: bool) -> npt.NDArray[np.uint64]:
    """A 64-bit BLAKE2 digest of each row's ids and, with ``supervision``, of its mask: (rows,) uint64."""
    found = []
    for flat in examples.chunks():
        ids, mask = np.ascontiguousarray(flat.ids).data, np.ascontiguousarray(flat.supervised).data
        for start, end in pairwise(flat.offsets.tolist()):
            digest = hashlib.blake2b(ids[start:end], digest_size=8)
            if supervision:
                digest.update(mask[start:end])
            found.append(digest.digest())
    return np.frombuffer(b"".join(found), np.uint64)


def _bos_counts(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """The fewest and the most BOS in a row, and the number of rows that begin with two."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return 0, 0, 0
    counts, doubled = [], 0
    for flat in examples.chunks():
        starts, ends = flat.offsets[:-1], flat.offsets[1:]
        is_bos = flat.ids == bos
        if bos == tokenizer.eos_token_id:
            is_bos[ends - 1] = False  # the last token is the EOS
        counts.append(count_per_row(is_bos, flat.offsets))
        second = np.minimum(starts + 1, len(flat.ids) - 1)
        doubled += int((is_bos[starts] & is_bos[second] & (ends - starts > 1)).sum())
    return min(int(each.min()) for each in counts), max(int(each.max()) for each in counts), doubled


def _ends_supervised(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> Mask:
    """Whether each row's last supervised token is the end of the text or of a turn: (rows,) bool.

    With ``train_on: all``, what the chat template writes after a turn's end is supervised too, and skipped here. A turn
    that calls tools may end in any special token.
    """
    ends, behind = [tokenizer.eos_token_id], 0
    if "chat" in examples.formats and (closing := end_of_turn(tokenizer)):
        ends += special_tokens(tokenizer)
        ends += [_ids(tokenizer, each)[-1] for each in turn_endings(tokenizer, closing)]
        behind = len(_ids(tokenizer, text_after_content(tokenizer).partition(closing)[2]))
    ended = []
    for flat in examples.chunks():
        supervised = np.flatnonzero(flat.supervised)
        found = np.zeros(len(flat.offsets) - 1, np.bool_)
        ended.append(found)
        if not len(supervised):
            continue
        last = supervised[np.maximum(np.searchsorted(supervised, flat.offsets[1:]) - 1, 0)]
        for at in {0, behind}:
            before = last - at
            inside = (before >= flat.offsets[:-1]) & (before < flat.offsets[1:])
            found |= inside & flat.supervised[before] & np.isin(flat.ids[before], ends)
    return np.concatenate(ended)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _template_notes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What the chat template lacks or does unexpectedly, and how training deals with that."""
    closing, answer, extra = (
        end_of_turn(tokenizer),
        generation_marked_text(tokenizer),
        generation_prompt_extra(tokenizer),
    )
    notes = []
    if not closing:
        notes.append("the chat template writes no end of turn: the end-of-text token is added after the last turn")
    if answer is None:
        notes.append("the chat template has no {% generation %} marks: renderings are compared to find what to learn")
    elif closing not in answer:
        notes.append(f"the chat template's {{% generation %}} marks leave out {closing}: it is supervised anyway")
    if extra:
        notes.append(f"the chat template ends a prompt in {extra!r}, but does not write it before given answers")
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        message = (
            f"{TEMPLATE_DATE} here"
            if "date_string" in template
            else "the same rows give different tokens on another day"
        )
        notes.append(f"the chat template writes today's date: {message}")
    return tuple(notes)
