"""Losses, gradients and weights that are not finite: report the likely causes, and skip the step or end the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lora_cli.data.batches import Step
from lora_cli.data.examples import Examples
from lora_cli.data.sources import row_places, sources_of
from lora_cli.errors import RunError, SecondaryError
from lora_cli.model.device import dtype_name
from lora_cli.recipe.schema import Source
from lora_cli.training.distributed.processes import full_tensor
from lora_cli.training.run.checkpoint import Progress, checkpoint_hint
from lora_cli.training.trainer import Trainer

GIVE_UP_AFTER = 5
ROWS_NAMED = 6
WORDS_SHOWN = 8
DIVERGED = "lower training.learning_rate, or check the rows around this step"


def count_skipped(trainer: Trainer, step: Step, loss: float, grad_norm: float, progress: Progress) -> Progress:
    """Count a step that was not taken because its loss or gradient is not finite.

    Raises RunError when the recipe says that the run stops there, or after GIVE_UP_AFTER skipped steps in a row.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return replace(progress, skipped_in_a_row=0)
    scaler = trainer.accelerator.scaler
    if math.isfinite(loss) and scaler is not None and scaler.get_scale() >= 1:
        return progress  # the scaled loss overflowed float16's gradient; the scaler halves its scale
    values = {"loss": loss, "grad norm": grad_norm}
    problems = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    training, sources = trainer.job.recipe.training, sources_of(trainer.job.recipe.data.train)
    rows = np.concatenate(step.micro_batches).tolist()
    named = _describe_rows(trainer, trainer.job.train.examples, sources, rows)
    what = f"step {step.number} was not taken: {', '.join(problems)}; its rows are {named}"
    skipped = progress.skipped_in_a_row + 1
    folder = trainer.job.folder
    hint = f"this step did not change the weights; {checkpoint_hint(folder.checkpoints)}; {_likely_causes(trainer)}"
    if training.on_nonfinite == "stop":
        raise _failure(trainer, what, hint)
    if skipped == GIVE_UP_AFTER:
        raise _failure(trainer, f"{skipped} steps in a row were skipped; {what}", hint)
    trainer.display.note(what, warning=True)
    return replace(progress, skipped_steps=progress.skipped_steps + 1, skipped_in_a_row=skipped)


def _likely_causes(trainer: Trainer) -> str:
    training = trainer.job.recipe.training
    narrow = "model.dtype: float16 is too narrow (bfloat16, float32), " if trainer.dtype == torch.float16 else ""
    causes = f"likely causes: training.learning_rate is too high, {narrow}or one of these rows"
    can_skip = training.on_nonfinite == "stop" and training.deepspeed is None
    return f"{causes}; training.on_nonfinite: skip would skip single steps" if can_skip else causes


def _describe_rows(trainer: Trainer, examples: Examples, sources: Sequence[Source], rows: Sequence[int]) -> str:
    """Return the first of these rows by file and line, each with its first words, and the number of the others."""
    shown, named = rows[:ROWS_NAMED], []
    where = row_places(sources, [(examples.source[row], examples.number[row]) for row in shown])
    for place, row in zip(where, shown, strict=True):
        ids = examples.row(row)[0][: 4 * WORDS_SHOWN].tolist()
        words = str(trainer.job.tokenizer.decode(ids)).split()[:WORDS_SHOWN]
        named.append(f"{place} ({' '.join(words)} ...)")
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return f"{', '.join(named)}{more}"


def check_finite(trainer: Trainer, step: int, name: str, value: float) -> None:
    """Raises RunError when a value after a step is not finite."""
    if not math.isfinite(value):
        folder = trainer.job.folder
        hint = f"{checkpoint_hint(folder.checkpoints)}; {DIVERGED}"
        raise _failure(trainer, f"step {step}: {name} is {value}", hint)


def nonfinite_start(trainer: Trainer, name: str, loss: float, rows: Sequence[int]) -> RunError:
    """Return the error for a validation loss before the first step that is not finite because of these ``rows``, if
    they are known. None can be left out: perplexities are over all validation rows."""
    data, examples = trainer.job.recipe.data, trainer.job.validation
    assert examples is not None
    what = f"step 0: {name} is {loss}"
    hint = f"the weights are damaged, or the activations overflow {dtype_name(trainer.dtype)}"
    if rows:
        sources = sources_of(data.own_validation or data.train)
        these = "these validation rows:" if len(rows) < ROWS_NAMED else "validation rows such as"
        what = f"{what} because of {these} {_describe_rows(trainer, examples, sources, rows)}"
        hint = f"{hint}: if few rows do that, remove them, since training.on_nonfinite: skip skips training steps only"
    if trainer.dtype == torch.float16:
        hint = f"{hint}; try model.dtype: bfloat16 or float32"
    return _failure(trainer, what, hint)


def _failure(trainer: Trainer, what: str, hint: str) -> RunError:
    """The error for a value that is the same in all processes, of which the first reports it."""
    kind = RunError if trainer.writes else SecondaryError
    return kind(what, str(trainer.job.folder.root), hint)


def weight_norm(trainer: Trainer) -> float:
    """The norm of all trained weights; infinite or NaN when one of them is."""
    return float(torch.nn.utils.get_total_norm([full_tensor(parameter).detach() for _, parameter in trainer.trained]))
