"""Token-weighted loss on supervised positions, and the perplexity that follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, pad

from lora_cli.data.batches import Batch
from lora_cli.data.examples import Examples, Ints
from lora_cli.data.grouping import group_by_length_range, pack_first_fit, pad_in_order
from lora_cli.evaluation.head import Head
from lora_cli.model.fast_paths.frozen_layers import FrozenLayers
from lora_cli.model.fast_paths.shapes import rounded_size


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood (nats) of ``tokens`` predicted tokens, and its exponential, the perplexity.

    The perplexity is capped at e^709, about the largest float, since JSON cannot represent infinity.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 709.0))


def summed_loss(
    model: torch.nn.Module, batch: Batch, head: Head | None = None, below: FrozenLayers | None = None
) -> torch.Tensor:
    """Summed negative log-likelihood (float32 scalar) of the batch's supervised tokens.

    The head runs only on positions that predict a supervised token: Transformers' ``logits_to_keep`` takes their
    indices, so that each architecture applies its own scaling or capping of logits. With a ``head`` from
    ``frozen_head``, the loss is computed in chunks and no logits are kept. If the batch has ``hidden``, the layers
    ``below`` that computed it are not run again.
    """
    if batch.input_ids.device.type == "cpu" and next(model.parameters()).dtype == torch.bfloat16:
        batch = _lengthened(batch)
    losses: list[torch.Tensor] = []
    aside: AbstractContextManager[object] = nullcontext()
    if head is not None:

        def keep_loss(hidden: torch.Tensor) -> torch.Tensor:
            losses.append(head.summed_loss(_predicting(batch, hidden), batch.targets))
            return losses[0]

        aside = head.intercept_input(keep_loss)
    skipping: AbstractContextManager[object] = nullcontext()
    if below is not None and batch.hidden is not None:
        skipping = below.skipped_with(batch.hidden)
    with aside, skipping:
        output = model(
            input_ids=batch.input_ids,
            logits_to_keep=batch.predict_from,
            use_cache=False,
            **row_boundary_arguments(batch),
        )
    if losses:  # empty logits sum to 0, but let the backward pass start at them, as sharded weights expect it to
        loss: torch.Tensor = losses[0] + output.logits.sum()
        return loss
    return cross_entropy(_predicting(batch, output.logits).float(), batch.targets, reduction="sum")


def _predicting(batch: Batch, outputs: torch.Tensor) -> torch.Tensor:
    """The outputs (targets, n), of (rows, positions, n), that predict a supervised token."""
    if outputs.shape[1] != len(batch.predict_from):  # an architecture without logits_to_keep returns all positions
        outputs = outputs[:, batch.predict_from]
    outputs = outputs.flatten(0, 1)
    return outputs if len(outputs) == len(batch.supervised) else outputs[batch.supervised]


def _lengthened(batch: Batch) -> Batch:
    """The batch; a packed one gets an unsupervised row at the end, up to a rounded number of tokens."""
    tokens = batch.input_ids.shape[1]
    more = rounded_size(tokens) - tokens
    if batch.cu_seq_lens is None or not more:
        return batch
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, more)),
        position_ids=torch.cat((batch.position_ids, torch.arange(more)[None]), dim=1),
        cu_seq_lens=pad(batch.cu_seq_lens, (0, 1), value=tokens + more),
        longest=max(batch.longest, more),
        hidden=None if batch.hidden is None else pad(batch.hidden, (0, 0, 0, more)),
    )


def row_boundary_arguments(batch: Batch) -> dict[str, Any]:
    """The arguments that keep the batch's rows apart: a mask for padded rows, FlashAttention's for packed ones."""
    if batch.cu_seq_lens is None:  # rows padded on the right need no position ids, which not every model takes
        return {"attention_mask": batch.attention_mask}
    return packed_row_arguments(batch.position_ids, batch.cu_seq_lens, batch.longest)


def packed_row_arguments(position_ids: torch.Tensor, starts: torch.Tensor, longest: int) -> dict[str, Any]:
    """FlashAttention's arguments for packed rows; see the fields of ``Batch``."""
    lengths = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    return {"position_ids": position_ids, **lengths}


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """A context for evaluation: no gradients, and autocast for 16 bits as in training. Restores the model's mode."""
    training = model.training
    device, dtype = next((p.device, p.dtype) for p in model.parameters() if p.is_floating_point())
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            yield
    finally:
        model.train(training)


def tally_loss(
    model: torch.nn.Module,
    batches: Iterable[tuple[Batch, float]],
    device: torch.device,
    head: Head | None = None,
    below: FrozenLayers | None = None,
) -> torch.Tensor:
    """Summed negative log-likelihood and number of supervised tokens: (2,) float64 on ``device``.

    A batch of weight 0 is run but not counted. Draws no random numbers.
    """
    tally = torch.zeros(2, dtype=torch.float64, device=device)
    with evaluating(model):
        for batch, weight in batches:
            nll = summed_loss(model, batch.to(device), head, below).double()
            tally += weight * torch.stack([nll, torch.full_like(nll, len(batch.targets))])
    return tally


def mean_score(tally: torch.Tensor) -> Score:
    """The score for a tally of ``tally_loss``."""
    total, tokens = tally.tolist()
    return Score(total / max(tokens, 1), int(tokens))


def evaluation_groups(
    examples: Examples, batch_size: int, max_length: int, packing: bool, bounds: Sequence[int]
) -> list[Ints]:
    """The examples in packed batches, or in padded batches of similar lengths; the loss does not depend on the choice.
    No batch mixes rows of up to one of the ``bounds``, in tokens, with longer rows."""
    lengths = examples.lengths
    order = np.arange(len(examples)) if packing else np.argsort(-lengths, kind="stable")

    def group(rows: Ints) -> list[Ints]:
        return pack_first_fit(rows, lengths, batch_size * max_length) if packing else pad_in_order(rows, batch_size)

    return group_by_length_range(order, lengths, bounds, group)
