"""What makes a resumed run the same run: which keys of the recipe may change, and which rows a step takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lora_cli.errors import Fault, UserError
from lora_cli.recipe.load import with_changes
from lora_cli.recipe.schema import Recipe

MAY_CHANGE = {
    f"training.{key}"
    for key in (
        "num_train_epochs",
        "max_steps",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "early_stopping_patience",
        "on_nonfinite",
        "gradient_checkpointing",
        "cache_frozen",
        "stream_base",
        "torch_compile",
        "fsdp",
        "deepspeed",
        "report_to",
        "output_dir",
    )
} | {"model.dtype"}
"""Keys that a resumed run may change; any other would make it a different run. The dtype that model.dtype resolves to
may not change, which is checked once the run is set up."""
MAY_CHANGE_TOGETHER = {"training.per_device_train_batch_size", "training.gradient_accumulation_steps"}
"""Keys that may change with the number of processes, as long as each step takes the same rows."""


def check_same_keys(before: Recipe, began_on: int, recipe: Recipe, count: int, where: str) -> None:
    """Raises UserError, with a fault per key, when ``recipe`` would make the run that ``before`` began a different one;
    ``began_on`` and ``count`` are its numbers of processes then and now."""
    same_steps = _batches(before, began_on) == _batches(recipe, count)
    hint = "undo the change, or start a new run in another folder"
    faults = [
        Fault(change, where, hint)
        for key, change in changed_keys(before, recipe).items()
        if key not in MAY_CHANGE and not (same_steps and key in MAY_CHANGE_TOGETHER)
    ]
    if began_on != count and not same_steps:
        batches = before.training.gradient_accumulation_steps * began_on
        what = f"--resume: the run began in {began_on} process(es) and has {count} now, with another step's batch"
        if batches % count == 0:
            size = f"training.per_device_train_batch_size={before.training.batch_size}"
            hint = f"{size} training.gradient_accumulation_steps={batches // count} keeps it"
        else:
            hint = f"a step takes {batches} micro-batches; choose a number of processes that divides it"
        faults = [Fault(what, where, hint)]
    if faults:
        raise UserError(faults)


def _batches(recipe: Recipe, processes: int) -> tuple[int, ...]:
    """Return what decides a step's rows: size and number of batches; padded in file order, only their product."""
    size, batches = recipe.training.batch_size, recipe.training.gradient_accumulation_steps * processes
    if recipe.data.packing or recipe.data.shuffle:
        return size, batches
    return (size * batches,)


def with_batch_size(recipe: Recipe, count: int) -> Recipe:
    """Replace an auto batch size by ``count`` rows, a divisor of the step's rows, and set the accumulation to match."""
    rows = recipe.training.gradient_accumulation_steps
    changes = {"training.per_device_train_batch_size": count, "training.gradient_accumulation_steps": rows // count}
    return with_changes(recipe, changes)


def with_resolved_batch(recipe: Recipe) -> Recipe:
    """Replace an auto batch size by 1, the smallest."""
    return with_batch_size(recipe, 1) if recipe.training.per_device_train_batch_size == "auto" else recipe


def as_begun(recipe: Recipe, before: Recipe) -> Recipe:
    """Replace an auto batch size by the greatest common divisor of the run's former one and the step's rows, and auto
    checkpointing by the run's."""
    if recipe.training.per_device_train_batch_size != "auto":
        return recipe
    found = with_batch_size(recipe, math.gcd(before.training.batch_size, recipe.training.gradient_accumulation_steps))
    if found.training.gradient_checkpointing != "auto":
        return found
    return with_changes(found, {"training.gradient_checkpointing": before.training.gradient_checkpointing})


def changed_keys(before: Recipe, now: Recipe) -> dict[str, str]:
    """Return the dotted keys whose values differ, each with a message about the change."""
    old, new = flat_keys(before.model_dump()), flat_keys(now.model_dump())
    return {
        key: f"--resume: {key} was {format_value(old.get(key))} and is now {format_value(new.get(key))}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    }


def format_value(value: Any) -> str:
    """Format a recipe's value as it is written in a recipe."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def flat_keys(dumped: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's values by their dotted keys."""
    sections = {name: section for name, section in dumped.items() if isinstance(section, dict)}
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
