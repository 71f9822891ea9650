"""What a run reports about its steps and evaluations: in metrics.jsonl, on the display and to trackers."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from typing import Any

import torch

from lora_cli.data.batches import Step
from lora_cli.errors import UserError, is_out_of_space
from lora_cli.evaluation.loss import Score
from lora_cli.training.run.same_run import flat_keys
from lora_cli.training.trainer import Trainer

RUN_NAME = {"wandb": "name", "mlflow": "run_name", "trackio": "name", "swanlab": "experiment_name"}
"""The keyword with which each tracker takes a run's name."""


class Clock:
    """Seconds and real (non-padding) tokens since the process's first step; the rate leaves out evaluations."""

    def __init__(self) -> None:
        self.began = self._mark = time.perf_counter()
        self._tokens = 0
        self._steps = 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def count(self, step: Step) -> None:
        """Add a step and its real tokens."""
        self._steps += 1
        self._tokens += step.tokens

    def seconds_for(self, steps: int) -> float:
        """Return how long ``steps`` steps take at the average pace of those counted so far."""
        return self.seconds / self._steps * steps

    def leave_out(self, seconds: float) -> None:
        """Do not count this time in the next rate."""
        self._mark += seconds

    def rate(self) -> float:
        """Real tokens a second since the last call."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._mark, 1e-9)
        self._mark, self._tokens = now, 0
        return rate


def start_trackers(trainer: Trainer) -> None:
    """Start the trackers of ``report_to`` with the run's name and the recipe's values by dotted key.

    Raises UserError when one cannot start, for example because it needs a login or has no server.
    """
    recipe = trainer.job.recipe
    if not recipe.training.report_to:
        return
    sections = recipe.model_dump(mode="json", exclude_none=True)
    config = {key: str(value) for key, value in flat_keys(sections).items()}
    names = {tracker: {key: trainer.job.folder.root.resolve().name} for tracker, key in RUN_NAME.items()}
    try:
        trainer.accelerator.init_trackers(os.environ.get("WANDB_PROJECT") or "lora", config, names)
    except Exception as error:
        if is_out_of_space(error):
            raise
        hint = "do as it says, or remove the tracker, and continue with --resume"
        raise UserError(
            f"training.report_to: a tracker does not start: {_kind_and_first_line(error)}", hint=hint
        ) from error


def finish_trackers(trainer: Trainer) -> None:
    """Let the trackers finish their reports; an error of theirs must not fail the run."""
    for tracker in trainer.accelerator.trackers:
        with suppress(Exception):
            tracker.finish()
    trainer.accelerator.trackers.clear()


def log_step(trainer: Trainer, step: Step, outcome: torch.Tensor, learning_rate: float, clock: Clock) -> None:
    """Write a training line for the result of ``take_step``; values that are not finite become null."""
    loss, grad_norm = outcome.tolist()
    line = {
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "split": "train",
        "loss": loss if math.isfinite(loss) else None,
        "tokens": step.supervised,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "tokens_per_second": round(clock.rate(), 1),
        "seconds": round(clock.seconds, 3),
    }
    _log(trainer, line, seconds_left=clock.seconds_for(trainer.total_steps - step.number))


def log_score(trainer: Trainer, step: int, epoch: float, score: Score) -> None:
    """Write an evaluation line."""
    line = {"step": step, "epoch": round(epoch, 6), "split": "validation", "loss": score.loss}
    _log(trainer, line | {"perplexity": score.perplexity, "tokens": score.tokens})


def _log(trainer: Trainer, line: dict[str, Any], seconds_left: float | None = None) -> None:
    """Write a line to metrics.jsonl, the display and the trackers."""
    if trainer.writes:
        trainer.job.folder.append_metrics(line)
    trainer.display.metrics(line, seconds_left)
    if trainer.accelerator.trackers:
        _send(trainer, line)


def _send(trainer: Trainer, line: dict[str, Any]) -> None:
    """Send a line's values to the trackers. If that fails, they are finished, and the run goes on without them."""
    numbers = {key: value for key, value in line.items() if key not in ("step", "split") and value is not None}
    values = {f"{line['split']}/{key}": value for key, value in numbers.items()}
    try:
        trainer.accelerator.log(values, step=line["step"])
    except Exception as error:
        if is_out_of_space(error):
            raise
        what = f"no more metrics are sent: {_kind_and_first_line(error)}; metrics.jsonl still gets them"
        trainer.display.note(f"training.report_to: {what}", warning=True)
        finish_trackers(trainer)


def _kind_and_first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
