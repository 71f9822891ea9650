"""The base beside its adapter on the same rows, from one loaded model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from lora_cli.evaluation.loss import Score, evaluate, evaluation_batches, packs_exactly
from lora_cli.model.base import pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_cli.data.tokenize import Examples

ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class Comparison:
    """A model's score, and for an adapter that of its base."""

    score: Score
    base: Score | None


def compare(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples, max_length: int
) -> Comparison:
    """Score the examples with the adapter on and, when there is one, off."""
    adapted = isinstance(model, PeftModel)
    device = next(model.parameters()).device
    with model.disable_adapter() if adapted else nullcontext():
        packing = packs_exactly(model, device)
        base = _score(model, tokenizer, examples, max_length, packing, device)
    if not adapted:
        return Comparison(base, None)
    return Comparison(_score(model, tokenizer, examples, max_length, packing, device), base)


def _score(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    max_length: int,
    packing: bool,
    device: torch.device,
) -> Score:
    batches = evaluation_batches(examples, ROWS_AT_ONCE, max_length, packing, pad_token_id(tokenizer))
    return evaluate(model, batches, device)
