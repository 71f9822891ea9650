"""An order of rows -> micro-batches: packed to a budget of tokens, or so many rows of like length to be padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from lora_cli.data.examples import Ints

OPEN = 16
"""Batches that first-fit packing looks through. MedQuAD and GSM8K fill 4 x 512 tokens to 99 % (in order to 91 and 95);
more batches would give little more, take longer, and move rows farther from their place in the order."""
POOL = 50
"""Batches whose rows are sorted by length together, as in Transformers' LengthGroupedSampler."""


def pack_in_order(order: Ints, lengths: Ints, budget: int) -> list[Ints]:
    """Next-fit: a batch takes the next rows as long as they fit ``budget`` tokens, as each does; the order stays."""
    cuts = []
    used = 0
    for index, length in enumerate(lengths[order].tolist()):
        if used + length > budget:
            cuts.append(index)
            used = 0
        used += length
    return np.split(order, cuts)


def pack_first_fit(order: Ints, lengths: Ints, budget: int) -> list[Ints]:
    """First-fit: a row goes into the first of the open batches that has room for it, of ``budget`` tokens.

    A batch is closed, and comes next, when no row fits it any more, or when one more than OPEN would be open and it is
    the oldest. ``lengths`` (all rows,) must be no greater than ``budget``.
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
            if len(rooms) == OPEN:
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
    """The next ``batch_size`` rows, batch after batch."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_by_length(order: Ints, lengths: Ints, batch_size: int, draw: np.random.Generator) -> list[Ints]:
    """Batches of rows of like length, in an order that is drawn; the one with the longest row is the first.

    The order is cut into pools of POOL batches, and the rows of each sorted by length: batches are near their place in
    the order, and every epoch has others. Memory that does not suffice is thus found out at once.
    """
    pools = np.arange(len(order)) // (POOL * batch_size)
    batches = pad_in_order(order[np.lexsort((-lengths[order], pools))], batch_size)
    drawn = [batches[index] for index in draw.permutation(len(batches))]
    longest = max(range(len(drawn)), key=lambda index: int(lengths[drawn[index][0]]))
    drawn.insert(0, drawn.pop(longest))
    return drawn


def apart(order: Ints, lengths: Ints, bounds: Sequence[int], group: Callable[[Ints], list[Ints]]) -> list[Ints]:
    """What ``group`` makes of the rows on each side of the ``bounds`` by themselves, those of the longest rows first:
    no batch has rows of up to so many tokens beside longer ones."""
    sides = _sides(lengths[order], bounds)
    return [batch for side in np.unique(sides)[::-1] for batch in group(order[sides == side])]


def apart_in_order(
    order: Ints, lengths: Ints, bounds: Sequence[int], group: Callable[[Ints], list[Ints]]
) -> list[Ints]:
    """The same with the order as it stands: a batch ends where the side changes."""
    changes = np.flatnonzero(np.diff(_sides(lengths[order], bounds))) + 1
    return [batch for part in np.split(order, changes) for batch in group(part)]


def _sides(lengths: Ints, bounds: Sequence[int]) -> Ints:
    """How many of the bounds each row is longer than."""
    return np.searchsorted(np.unique(bounds), lengths)
