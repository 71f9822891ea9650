"""Examples -> optimizer steps of micro-batches, in a reproducible order, and micro-batches as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lora_cli.data.examples import Examples, Ints, offsets_of
from lora_cli.data.grouping import (
    group_by_length_range,
    pack_first_fit,
    pack_in_order,
    pad_by_length,
    pad_in_order,
)
from lora_cli.errors import Fault, UserError, pluralize
from lora_cli.recipe.schema import Source


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    ``input_ids`` and ``position_ids`` (rows, tokens) int64; packing concatenates the rows into (1, tokens). Padded rows
    have ``attention_mask`` (rows, tokens) int64; packed rows have ``cu_seq_lens`` (rows + 1,) int32, the start of each
    row and the end of the last; the other one is None. ``longest`` is the length of the longest row. ``predict_from``
    (k,) int64 are the positions whose next token is supervised in at least one row. ``supervised`` (n,) int64 indexes
    the flattened predictions (rows * k), and selects those with a supervised next token; ``targets`` (n,) int64 are
    these tokens. ``hidden`` (rows, tokens, width) is the cached output of the frozen layers below all adapted ones.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    cu_seq_lens: torch.Tensor | None
    longest: int
    predict_from: torch.Tensor
    supervised: torch.Tensor
    targets: torch.Tensor
    hidden: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to ``device``. A copy to a GPU is asynchronous, from pinned memory."""

        def moved(part: Any) -> Any:
            if not isinstance(part, torch.Tensor):
                return part
            return (part.pin_memory() if device.type == "cuda" else part).to(device, non_blocking=True)

        return Batch(*map(moved, vars(self).values()))


def epoch_order(
    source: npt.NDArray[np.int32], weights: Sequence[float], seed: int, epoch: int, shuffle: bool
) -> npt.NDArray[np.int64]:
    """Row indices in the order of epoch ``epoch``; they depend on these arguments alone.

    A source of weight w contributes all its rows floor(w) times, and the remaining fraction of its rows once more. With
    ``shuffle`` these are drawn anew in each epoch; otherwise they are its first rows.
    """
    draw = np.random.default_rng([seed, epoch])
    parts = []
    for index, weight in enumerate(weights):
        rows = np.flatnonzero(source == index)
        times, extra = _passes(weight, len(rows))
        chosen = np.sort(draw.choice(rows, extra, replace=False)) if shuffle else rows[:extra]
        parts += [rows] * times + [chosen]
    order = np.concatenate(parts).astype(np.int64)
    return draw.permutation(order) if shuffle else order


def _passes(weight: float, rows: int) -> tuple[int, int]:
    """How many times an epoch takes all rows of a source, and how many of them it takes once more."""
    times = int(weight)
    return times, round((weight - times) * rows)


def check_drawn(source: npt.NDArray[np.int32], parts: Sequence[Source]) -> None:
    """Raises UserError when an epoch takes no row of a source: no row is left, or the source's weight is too small."""
    faults = []
    for part, count in zip(parts, np.bincount(source, minlength=len(parts)).tolist(), strict=True):
        if not count:
            message = f"{part.path}: none of its rows is left to train on"
            hint = "all were held out for validation, or have no supervised token within data.max_length"
            faults.append(Fault(message, "data.train", hint))
        elif not any(_passes(part.weight, count)):
            message = f"{part.path}: with weight {part.weight:g} an epoch takes none of its {pluralize(count, 'row')}"
            hint = f"raise the weight to {math.ceil(1000 / count) / 1000:g}, or leave it out"
            faults.append(Fault(message, "data.train", hint))
    if faults:
        raise UserError(faults)


def collate(examples: Examples, rows: Sequence[int] | Ints, packing: bool, pad_token_id: int) -> Batch:
    """The rows as tensors: concatenated with ``packing``, otherwise padded on the right."""
    pairs = [examples.row(int(index)) for index in rows]
    lengths = np.array([len(ids) for ids, _ in pairs])
    longest = int(lengths.max())
    mask = starts = None
    if packing:
        ids = np.concatenate([ids for ids, _ in pairs])[None]
        wanted = np.concatenate([mask for _, mask in pairs])[None]
        positions = np.concatenate([np.arange(length) for length in lengths])[None]
        starts = torch.from_numpy(offsets_of(lengths).astype(np.int32))
    else:
        ids = np.full((len(pairs), longest), pad_token_id, dtype=np.int64)
        wanted = np.zeros((len(pairs), longest), dtype=np.bool_)
        for index, (row_ids, row_wanted) in enumerate(pairs):
            ids[index, : len(row_ids)] = row_ids
            wanted[index, : len(row_ids)] = row_wanted
        positions = np.tile(np.arange(longest), (len(pairs), 1))
        mask = torch.from_numpy((positions < lengths[:, None]).astype(np.int64))
    next_wanted = wanted[:, 1:]
    predict_from = np.flatnonzero(next_wanted.any(axis=0))
    next_wanted = next_wanted[:, predict_from]
    numbers = (ids, positions, predict_from, np.flatnonzero(next_wanted), ids[:, 1:][:, predict_from][next_wanted])
    input_ids, position_ids, *rest = (torch.from_numpy(each.astype(np.int64)) for each in numbers)
    examples.store.release()
    return Batch(input_ids, position_ids, mask, starts, longest, *rest)


@dataclass(frozen=True)
class Step:
    """One optimizer step: its micro-batches (row indices) and its counts.

    ``supervised`` and ``tokens`` count the step's supervised and non-padding tokens. ``epoch`` is the
    fractional number of passes over the data that are complete after the step.
    """

    number: int
    epoch: float
    micro_batches: tuple[Ints, ...]
    supervised: int
    tokens: int


@dataclass(frozen=True)
class Schedule:
    """Which rows each step takes. This depends on the fields alone, so any step can be reconstructed.

    ``bounds`` are lengths in tokens; no batch mixes rows up to a bound with longer rows.
    """

    lengths: Ints
    supervised: Ints
    source: npt.NDArray[np.int32]
    weights: tuple[float, ...]
    seed: int
    shuffle: bool
    batch_size: int
    max_length: int
    packing: bool
    accumulation: int
    bounds: tuple[int, ...] = ()

    _counts: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def epoch_batches(self, epoch: int) -> list[Ints]:
        """The micro-batches of one epoch, in order. A million rows take a second or two.

        With ``shuffle``, rows also move to fill packed batches, or so that padded batches have rows of similar length.
        """
        order = epoch_order(self.source, self.weights, self.seed, epoch, self.shuffle)
        draw = np.random.default_rng([self.seed, epoch, 1])

        def group(rows: Ints) -> list[Ints]:
            if self.packing:
                pack = pack_first_fit if self.shuffle else pack_in_order
                return pack(rows, self.lengths, self.batch_size * self.max_length)
            if self.shuffle:
                return pad_by_length(rows, self.lengths, self.batch_size, draw)
            return pad_in_order(rows, self.batch_size)

        batches = group_by_length_range(order, self.lengths, self.bounds, group, in_order=not self.shuffle)
        if self.shuffle and self.bounds:  # otherwise all long rows would come first
            batches = [batches[0], *(batches[1 + index] for index in draw.permutation(len(batches) - 1))]
        self._counts[epoch] = len(batches)
        return batches

    def total_steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the run. An epoch's incomplete last window is a step; part of an epoch is rounded up."""
        if max_steps is not None:
            return max_steps
        whole = int(epochs)
        total = sum(self.steps_in(epoch) for epoch in range(whole))
        if epochs > whole:
            total += math.ceil(round((epochs - whole) * self.steps_in(whole), 6))  # in floats 1.1 - 1 > 0.1
        return max(1, total)

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of this epoch."""
        count = self._counts[epoch] if epoch in self._counts else len(self.epoch_batches(epoch))
        return -(-count // self.accumulation)

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Yield the steps after step ``start``, endlessly."""
        number = epoch = 0
        while start >= number + self.steps_in(epoch):
            number += self.steps_in(epoch)
            epoch += 1
        while True:
            batches = self.epoch_batches(epoch)
            for at in range(0, len(batches), self.accumulation):
                number += 1
                if number <= start:
                    continue
                window = tuple(batches[at : at + self.accumulation])
                rows = np.concatenate(window)
                done = epoch + (at + len(window)) / len(batches)
                yield Step(number, done, window, int(self.supervised[rows].sum()), int(self.lengths[rows].sum()))
            epoch += 1


def split_validation(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Hold out ``share`` of the rows (at least one, never all), drawn with ``seed``. Return (train, validation)."""
    count = min(max(1, round(share * len(examples))), len(examples) - 1)
    order = np.random.default_rng(seed).permutation(len(examples))
    return examples.select(np.sort(order[count:])), examples.select(np.sort(order[:count]))
