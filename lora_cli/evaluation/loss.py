"""Token-weighted loss on supervised positions, and the perplexity that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lora_cli.data.batches import Batch, collate, group

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_cli.data.examples import Examples, Ints


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood (nats) of ``tokens`` predicted tokens, and its exponential.

    The perplexity is never infinite, for which JSON has no word: e^709 is about the largest number there is.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 709.0))


def summed_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Summed negative log-likelihood (float32 scalar) of the batch's supervised tokens.

    The head runs on the positions that predict a supervised token alone: Transformers' ``logits_to_keep`` takes their
    indices, so that each architecture applies its own scaling or capping of logits.
    """
    # Padded on the right, rows need no position ids, and not every architecture takes them.
    rows_apart = (
        {"position_ids": batch.position_ids}
        if batch.attention_mask is None
        else {"attention_mask": batch.attention_mask}
    )
    output = model(input_ids=batch.input_ids, logits_to_keep=batch.predict_from, use_cache=False, **rows_apart)
    logits = output.logits
    if logits.shape[1] != len(batch.predict_from):  # an architecture that has no such argument gives them all
        logits = logits[:, batch.predict_from]
    logits = logits.float()
    return cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="sum")


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; 16 bits under autocast, as in training. Left as it was found."""
    training = model.training
    device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            yield
    finally:
        model.train(training)


def evaluate(model: torch.nn.Module, batches: Iterable[Batch], device: torch.device) -> Score:
    """Loss over all supervised tokens of all batches, each counted once; draws no random number."""
    return score(tally_loss(model, ((batch, 1.0) for batch in batches), device))


def tally_loss(model: torch.nn.Module, batches: Iterable[tuple[Batch, float]], device: torch.device) -> torch.Tensor:
    """Summed negative log-likelihood and number of supervised tokens: (2,) float64 on ``device``.

    A batch of weight 0 is gone through and not counted. Draws no random number.
    """
    tally = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(model):
        for batch, weight in batches:
            nll = summed_loss(model, batch.to(device)).double()
            tally += weight * torch.stack([nll, (batch.targets != -100).sum().to(nll)])
    return tally


def score(tally: torch.Tensor) -> Score:
    """The mean loss of what ``tally_loss`` counted."""
    total, tokens = tally.tolist()
    return Score(total / max(tokens, 1), int(tokens))


def evaluation_groups(examples: Examples, batch_size: int, max_length: int, packing: bool) -> list[Ints]:
    """The examples in their own order, cut into packed or padded batches."""
    return group(np.arange(len(examples)), examples.lengths, batch_size, max_length, packing)


def evaluation_batches(
    examples: Examples, batch_size: int, max_length: int, packing: bool, pad_token_id: int
) -> Iterable[Batch]:
    """The examples in their own order, as packed or padded batches."""
    for rows in evaluation_groups(examples, batch_size, max_length, packing):
        yield collate(examples, rows, packing, pad_token_id)


def packs_exactly(model: PreTrainedModel | PeftModel, device: torch.device) -> bool:
    """Whether two rows laid end to end give the hidden states that each gives alone.

    True for attention that masks by position ids; models with a state, a convolution over time or positions of
    another kind fail it and are padded instead.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(12, device=device) * 7919 + 3) % vocabulary
    places = torch.cat([torch.arange(7), torch.arange(5)]).to(device)
    with evaluating(model):
        try:
            packed = model(input_ids=ids[None], position_ids=places[None], use_cache=False).logits[0].float()
        except TypeError:  # the architecture takes no position ids
            return False
        parts = [model(input_ids=part[None], use_cache=False).logits[0].float() for part in (ids[:7], ids[7:])]
    alone = torch.cat(parts)
    error = float((packed - alone).norm() / alone.norm())
    return error < (1e-3 if model.dtype == torch.float32 else 0.05)
