"""Losses, gradients and weights that are not finite: report the likely causes, and skip the step or end the run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from lora_cli.data.batches import Step
from lora_cli.data.sources import row_places, sources_of
from lora_cli.errors import RunError
from lora_cli.model.device import dtype_name
from lora_cli.training.distributed.processes import full_tensor
from lora_cli.training.run.checkpoint import Progress, checkpoint_hint
from lora_cli.training.trainer import Trainer

GIVE_UP_AFTER = 5
ROWS_NAMED = 6
WORDS_SHOWN = 8
DIVERGED = "lower training.learning_rate, or check the rows around this step"
CAUSES = (
    "likely causes: training.learning_rate is too high, model.dtype: float16 is too narrow (bfloat16, float32), or one "
    "of these rows; training.on_nonfinite: skip would skip single steps"
)


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
    what = f"step {step.number} was not taken: {', '.join(problems)}; {_describe_rows(trainer, step)}"
    skipped = progress.skipped_in_a_row + 1
    folder = trainer.job.folder
    hint = f"this step did not change the weights; {checkpoint_hint(folder.checkpoints)}; {CAUSES}"
    if trainer.job.recipe.training.on_nonfinite == "stop":
        raise RunError(what, str(folder.root), hint)
    if skipped == GIVE_UP_AFTER:
        raise RunError(f"{skipped} steps in a row were skipped; {what}", str(folder.root), hint)
    trainer.display.note(what, warning=True)
    return replace(progress, skipped_steps=progress.skipped_steps + 1, skipped_in_a_row=skipped)


def _describe_rows(trainer: Trainer, step: Step) -> str:
    """Return the step's rows by file and line, each with its first words."""
    examples, tokenizer = trainer.job.train.examples, trainer.job.tokenizer
    rows = np.concatenate(step.micro_batches).tolist()
    shown = rows[:ROWS_NAMED]
    where = row_places(
        sources_of(trainer.job.recipe.data.train), [(examples.source[row], examples.number[row]) for row in shown]
    )
    named = []
    for place, row in zip(where, shown, strict=True):
        words = str(tokenizer.decode(examples.row(row)[0][: 4 * WORDS_SHOWN].tolist())).split()[:WORDS_SHOWN]
        named.append(f"{place} ({' '.join(words)} ...)")
    more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
    return f"its rows are {', '.join(named)}{more}"


def check_finite(trainer: Trainer, step: int, name: str, value: float) -> None:
    """Raises RunError when the value is not finite. Step 0 is before the first step."""
    if math.isfinite(value):
        return
    folder = trainer.job.folder
    overflow = f"the weights are damaged, or the activations overflow {dtype_name(trainer.dtype)}"
    hint = f"{checkpoint_hint(folder.checkpoints)}; {DIVERGED if step else overflow}"
    raise RunError(f"step {step}: {name} is {value}", str(folder.root), hint)


def weight_norm(trainer: Trainer) -> float:
    """The norm of all trained weights; infinite or NaN when one of them is."""
    return float(torch.nn.utils.get_total_norm([full_tensor(parameter).detach() for _, parameter in trainer.trained]))
