"""Output of the frozen layers below the lowest adapted one: computed once per row, kept in memory or on disk.

It is computed before the first step, in batches that depend only on the rows and the recipe. A resumed run therefore
continues with the same values.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from accelerate.utils import broadcast

from lora_cli.data.batches import Batch, collate
from lora_cli.data.examples import Examples, Ints, offsets_of
from lora_cli.errors import writing
from lora_cli.evaluation.loss import evaluating, evaluation_groups, row_boundary_arguments
from lora_cli.model.base import pad_token_id
from lora_cli.model.fast_paths.frozen_layers import (
    FrozenLayers,
    can_be_skipped,
    draws_random_numbers,
    frozen_layers,
    sample_ids,
)
from lora_cli.system.disk import preallocate
from lora_cli.system.memory import free_bytes
from lora_cli.training.cached_states import CachedStates, HiddenStates, token_places
from lora_cli.training.distributed.processes import broadcast_from_first, own_share
from lora_cli.training.distributed.sharding import is_sharded
from lora_cli.training.distributed.zero import is_zero
from lora_cli.training.interrupt import stopped_after
from lora_cli.training.trainer import Trainer, unwrap

MEMORY_SHARE, DISK_SHARE = 0.2, 0.5
"""Fractions of free memory and disk for ``training.cache_frozen: auto``; activations may take 4/5 of the memory."""


def plan(trainer: Trainer) -> HiddenStates | None:
    """Decide where to keep hidden states, as ``training.cache_frozen`` says; None means nowhere.

    All processes make the same plan. With auto, a resumed run considers only the parts that it kept before.
    """
    wanted = trainer.job.recipe.training.cache_frozen
    if wanted is False:
        return None
    wanted = "auto" if wanted is True else wanted
    with evaluating(unwrap(trainer)):
        below, why = usable_layers(trainer)
        if below is None:
            note_unused(trainer, wanted, why)
            return None
        like = below.states({"input_ids": sample_ids(unwrap(trainer))})
    sizes = {part: rows.tokens * like.shape[-1] * like.itemsize for part, rows in splits(trainer).items()}
    if wanted == "auto":
        sizes = {part: size for part, size in sizes.items() if is_reused(trainer, part)}
    places = broadcast_from_first(choose_places(sizes, wanted, free_space(trainer)))
    left_out = [f"{size:,} bytes ({part})" for part, size in sizes.items() if part not in places]
    if left_out:
        trainer.display.note(f"training.cache_frozen: no room to spare for {' and '.join(left_out)}")
    return HiddenStates(below, like.shape[-1], like.dtype, places) if places else None


def note_unused(trainer: Trainer, wanted: str, why: str) -> None:
    """Report why no hidden states are kept; with auto, nothing when no layer is frozen (``why`` is empty)."""
    asked_for = wanted != "auto"
    if why or asked_for:
        why = why or "no whole layer lies below the lowest adapted one"
        trainer.display.note(f"training.cache_frozen: {wanted} -> false: {why}", warning=asked_for)


def usable_layers(trainer: Trainer) -> tuple[FrozenLayers | None, str]:
    """Return the layers whose output can be kept, or None and why not (empty if no layer is frozen)."""
    model = unwrap(trainer)
    if is_sharded(trainer.accelerator) or is_zero(trainer.accelerator):
        return None, "weights are sharded"
    below = frozen_layers(model)
    if below is None:
        return None, ""
    if draws_random_numbers(model, below):
        return None, f"below layer {below.count}, the lowest adapted one, dropout or something else is random"
    if not can_be_skipped(model, below):
        return None, "layers of this architecture get more from those below than hidden states"
    return below, ""


def splits(trainer: Trainer) -> dict[str, Examples]:
    """Return the rows that the run processes: those for training and, if there are any, those for validation."""
    validation = trainer.job.validation
    return {"train": trainer.job.train.examples} | ({} if validation is None else {"validation": validation})


def is_reused(trainer: Trainer, part: str) -> bool:
    """Whether the run uses the part's rows more than once; a resumed run: whether run.json records them as kept."""
    if trainer.job.resume:
        before = trainer.job.folder.read_info() if trainer.writes else {}
        return part in broadcast_from_first(before.get("cache_frozen", {}))
    return part == "validation" or trainer.total_steps > trainer.schedule.steps_in(0)


def free_space(trainer: Trainer) -> dict[str, int]:
    """Return the bytes that each process may take, in memory and on disk."""
    free = {
        "memory": MEMORY_SHARE * free_bytes(torch.device("cpu")),
        "disk": DISK_SHARE * shutil.disk_usage(trainer.job.folder.cache).free,
    }
    return {place: int(share / trainer.accelerator.num_processes) for place, share in free.items()}


def choose_places(sizes: Mapping[str, int], wanted: str, free: Mapping[str, int]) -> dict[str, str]:
    """Choose the place of each part, given its bytes. For auto: in memory while there is room, then on disk."""
    if wanted != "auto":
        return dict.fromkeys(sizes, wanted)
    left, places = dict(free), {}
    for part, size in sizes.items():
        fitting = [place for place in ("memory", "disk") if size <= left[place]]
        if fitting:
            places[part] = fitting[0]
            left[fitting[0]] -= size
    return places


def compute(trainer: Trainer, step: int) -> None:
    """Compute the hidden states of all rows of the planned parts; the run has reached ``step``.

    Raises Interrupted between two batches when a signal asks to stop, RunError when the disk is full.
    """
    planned = trainer.hidden_states
    if planned is None:
        return
    for part, place in planned.places.items():
        began = time.perf_counter()
        examples = splits(trainer)[part]
        states = allocate(place, (examples.tokens, planned.width), planned.dtype, trainer.job.folder.cache)
        kept = CachedStates(states, offsets_of(examples.lengths))
        with evaluating(trainer.model):
            fill(kept, trainer, part, planned.layers, step)
        planned.kept[part] = kept
        trainer.display.note(
            f"{part} rows: hidden states below layer {planned.layers.count} computed once in "
            f"{time.perf_counter() - began:.1f} s ({states.nbytes:,} bytes, {place})"
        )


def fill(kept: CachedStates, trainer: Trainer, part: str, layers: FrozenLayers, step: int) -> None:
    """Compute the hidden states of a part's rows into ``kept``: each process its share of the batches, which it
    broadcasts to the others. Raises Interrupted between two batches when a signal asks to stop."""
    accelerator, groups = trainer.accelerator, groups_of(trainer, part)
    remaining = iter(groups)
    for rows, _ in own_share(groups, accelerator):
        batch = batch_of(trainer, part, rows).to(accelerator.device)
        found = layers.states({"input_ids": batch.input_ids, **row_boundary_arguments(batch)})
        found = found[0] if batch.attention_mask is None else found[batch.attention_mask.bool()]
        for process, shared in enumerate(islice(remaining, accelerator.num_processes)):
            places = token_places(kept.offsets, shared)
            own = process == accelerator.process_index
            given = found if own else found.new_empty(len(places), found.shape[-1])
            kept.states[places] = broadcast(given, process).to("cpu")
        if asked_to_stop := trainer.asked_to_stop():
            raise stopped_after(step, asked_to_stop)


def allocate(place: str, shape: tuple[int, int], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """Return an empty tensor in memory, or in a file in ``folder``. Raises RunError when the disk is full.

    The file has no name: it disappears when the process ends, however it ends, and no other process can use it.
    """
    if place == "memory":
        return torch.empty(shape, dtype=dtype)
    size = shape[0] * shape[1] * dtype.itemsize
    with writing(folder / "hidden states", size), tempfile.TemporaryFile(dir=folder) as file:
        preallocate(file.fileno(), 0, size)  # a write to a mapped file on a full disk would kill the process
        file.truncate(size)  # if nothing was reserved, it is empty and cannot be mapped
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(shape)


def groups_of(trainer: Trainer, part: str) -> list[Ints]:
    """Return the rows of a part, grouped into the batches for evaluation."""
    order = trainer.schedule
    return evaluation_groups(splits(trainer)[part], order.batch_size, order.max_length, order.packing, order.bounds)


def batch_of(trainer: Trainer, part: str, rows: Ints) -> Batch:
    """Return rows of a part as a batch, with their hidden states if these are kept."""
    packing = trainer.schedule.packing
    batch = collate(splits(trainer)[part], rows, packing, pad_token_id(trainer.job.tokenizer))
    kept = trainer.hidden_states.kept.get(part) if trainer.hidden_states else None
    return replace(batch, hidden=kept.of(rows, packing)) if kept else batch
