"""Row order -> micro-batches: packed up to a budget of tokens, or padded with a fixed number of rows each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from lora_cli.data.examples import Ints

MAX_OPEN_BATCHES = 16
"""Open batches that first-fit packing searches. MedQuAD and GSM8K fill 4 x 512 tokens to 99 % (in order: 91 and 95 %).
More batches would gain little, take longer, and move rows farther from their place in the order."""
BATCHES_PER_POOL = 50
"""Batches per pool of rows that are sorted by length, as in Transformers' LengthGroupedSampler."""


def pack_in_order(order: Ints, lengths: Ints, budget: int) -> list[Ints]:
    """Next-fit: a batch takes the next rows while they fit ``budget`` tokens, as every row does. The order is kept."""
    cuts = []
    used = 0
    for index, length in enumerate(lengths[order].tolist()):
        if used + length > budget:
            cuts.append(index)
            used = 0
        used += length
    return np.split(order, cuts)


def pack_first_fit(order: Ints, lengths: Ints, budget: int) -> list[Ints]:
    """First-fit: each row goes into the first open batch, of ``budget`` tokens, that has room for it.

    A batch is closed, and is next in the result, when the shortest row no longer fits, or when it is the oldest of
    MAX_OPEN_BATCHES and another is opened. ``lengths`` (all rows,) must not exceed ``budget``.
    """
    sizes = lengths[order]
    shortest = int(sizes.min(initial=budget))
    rooms: list[int] = []
    opened: list[list[int]] = []
    closed: list[list[int]] = []
    for index, size in enumerate(sizes.tolist()):
        for slot, room in enumerate(rooms):  # noqa: B007 (the first with room is used below)
            if size <= room:
                break
        else:
            if len(rooms) == MAX_OPEN_BATCHES:
                del rooms[0]
                closed.append(opened.pop(0))
            slot, room = len(rooms), budget
            rooms.append(room)
            opened.append([])
        rooms[slot] = room - size
        opened[slot].append(index)
        if rooms[slot] < shortest:
            del rooms[slot]
            closed.append(opened.pop(slot))
    closed += opened
    places = np.fromiter(chain.from_iterable(closed), np.int64, len(order))
    return np.split(order[places], np.cumsum([len(batch) for batch in closed])[:-1])


def pad_in_order(order: Ints, batch_size: int) -> list[Ints]:
    """Batches of ``batch_size`` rows in order; the last may have fewer."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_by_length(order: Ints, lengths: Ints, batch_size: int, draw: np.random.Generator) -> list[Ints]:
    """Batches of rows of similar length, in random order, except that the batch with the longest row comes first.

    The order is cut into pools of BATCHES_PER_POOL batches, and each pool's rows are sorted by length: a batch's rows
    are near each other in the order, and every epoch has other batches. Insufficient memory shows in the first batch.
    """
    pools = np.arange(len(order)) // (BATCHES_PER_POOL * batch_size)
    batches = pad_in_order(order[np.lexsort((-lengths[order], pools))], batch_size)
    drawn = [batches[index] for index in draw.permutation(len(batches))]
    longest = max(range(len(drawn)), key=lambda index: int(lengths[drawn[index][0]]))
    drawn.insert(0, drawn.pop(longest))
    return drawn


def group_by_length_range(
    order: Ints, lengths: Ints, bounds: Sequence[int], group: Callable[[Ints], list[Ints]], in_order: bool = False
) -> list[Ints]:
    """Apply ``group`` separately to the rows on each side of the ``bounds``, in tokens, the longest rows first.
    No batch mixes rows up to a bound with longer rows. With ``in_order``, the order is kept: a batch ends where the
    next row is on another side of a bound."""
    sides = np.searchsorted(np.unique(bounds), lengths[order])  # the number of distinct bounds that each row exceeds
    if in_order:
        parts = np.split(order, np.flatnonzero(np.diff(sides)) + 1)
    else:
        parts = [order[sides == side] for side in np.unique(sides)[::-1]]
    return [batch for part in parts for batch in group(part)]
