"""How closely two models agree: their logits, predictions and perplexity on a few rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from lora_cli.evaluation.loss import evaluating


@dataclass(frozen=True)
class Agreement:
    """How a model's logits z' compare with a reference's, z, on the same tokens.

    ``largest`` is the largest absolute difference of a logit; ``relative`` is |z' - z| / |z| over all logits. Both are
    taken after subtracting each position's mean logit, on which no prediction depends. ``kl`` is KL(reference || model)
    in nats, the mean over positions. ``perplexity`` is the model's.
    """

    largest: float
    relative: float
    kl: float
    perplexity: float


def logits_of(model: PeftModel | PreTrainedModel, rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each row's logits, (tokens, vocabulary) float32 in host memory; ``rows`` are token ids (tokens,)."""
    device = next(model.parameters()).device
    with evaluating(model):
        return [model(input_ids=row[None].to(device), use_cache=False).logits[0].float().cpu() for row in rows]


def agreement(
    reference: Sequence[torch.Tensor], found: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]
) -> Agreement:
    """Compare the logits ``found`` with those of the ``reference``, both from ``logits_of``."""
    both = (torch.cat(list(logits)) for logits in (reference, found))
    wanted, got = (logits - logits.mean(dim=-1, keepdim=True) for logits in both)
    apart = got - wanted
    kl = kl_div(log_softmax(got, -1), log_softmax(wanted, -1), reduction="batchmean", log_target=True)
    size = float(wanted.norm())
    relative = float(apart.norm()) / size if size else float(apart.norm())
    return Agreement(float(apart.abs().max()), relative, max(float(kl), 0.0), perplexity(found, rows))


def perplexity(logits: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> float:
    """The perplexity of all tokens except each row's first."""
    losses = [cross_entropy(each[:-1], row[1:], reduction="sum") for each, row in zip(logits, rows, strict=True)]
    mean = sum(map(float, losses)) / max(sum(len(row) - 1 for row in rows), 1)
    return math.exp(min(mean, 709.0)) if math.isfinite(mean) else math.inf
