"""Evaluate on the validation rows during a run, log the scores and record the best one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lora_cli.data.batches import Batch, Step
from lora_cli.data.examples import Ints
from lora_cli.errors import pluralize
from lora_cli.evaluation.loss import Score, mean_score, tally_loss
from lora_cli.training import hidden_states
from lora_cli.training.distributed.processes import all_reduce_max, own_share
from lora_cli.training.distributed.sharding import reshard
from lora_cli.training.interrupt import stopped_after
from lora_cli.training.metrics import Clock, log_score
from lora_cli.training.nonfinite import ROWS_NAMED, check_finite, nonfinite_start
from lora_cli.training.run.checkpoint import Progress
from lora_cli.training.trainer import Trainer, unwrap


def evaluate_start(trainer: Trainer) -> Progress:
    """Step 0: evaluate the base on the validation rows, if any, and with the adapter of ``init_from``, if any; a new
    adapter changes nothing yet. The score of the model that training begins with is logged. Raises Interrupted when a
    signal asks to stop."""
    if trainer.job.validation is None:
        return Progress()
    rows = pluralize(len(trainer.job.validation), "validation row")
    trainer.display.note(f"measuring the base on {rows}")
    with unwrap(trainer).disable_adapter():
        base = start = _score_at_start(trainer, "loss of the base")
    if trainer.job.start:
        trainer.display.note(f"measuring the adapter of init_from on {rows}")
        start = _score_at_start(trainer, "loss with the starting adapter")
    log_score(trainer, 0, 0.0, start)
    return Progress(
        evaluated_step=0,
        base_loss=base.loss,
        start_loss=start.loss if trainer.job.start else None,
        validation_loss=start.loss,
        validation_tokens=start.tokens,
    )


def _score_at_start(trainer: Trainer, name: str) -> Score:
    score = validate(trainer)
    if score is None:
        raise stopped_after(0, trainer.asked_to_stop())
    if not math.isfinite(score.loss):
        raise nonfinite_start(trainer, name, score.loss, _nonfinite_rows(trainer))
    return score


def _nonfinite_rows(trainer: Trainer) -> list[int]:
    """Return the indices of at most ROWS_NAMED validation rows whose losses are not finite, of a long text that of one
    window. Each process computes all of them, since sharded weights are gathered from all. Raises Interrupted when a
    signal asks to stop."""
    examples = trainer.job.validation
    assert examples is not None

    def overflows(rows: Ints) -> bool:
        if asked_to_stop := trainer.asked_to_stop():
            raise stopped_after(0, asked_to_stop)
        batch = hidden_states.batch_of(trainer, "validation", rows)
        tally = tally_loss(trainer.model, [(batch, 1.0)], trainer.accelerator.device, trainer.head, trainer.below)
        return bool(all_reduce_max(int(not tally.isfinite().all()), trainer.accelerator))

    found: dict[tuple[int, int], int] = {}
    groups = trainer.display.through(hidden_states.groups_of(trainer, "validation"), "looking for rows that overflow")
    for rows in groups:
        for row in rows if overflows(rows) else ():
            place = (int(examples.source[row]), int(examples.number[row]))
            if place not in found and overflows(np.array([row])):
                found[place] = int(row)
        if len(found) >= ROWS_NAMED:
            break
    reshard(trainer.model)
    return sorted(found.values())[:ROWS_NAMED]


def evaluate_step(trainer: Trainer, step: Step, progress: Progress, clock: Clock) -> Progress:
    """Evaluate on the validation rows, log the score and record whether it is the best so far. When a signal asks to
    stop meanwhile, return ``progress`` unchanged."""
    began = time.perf_counter()
    score = validate(trainer)
    clock.leave_out(time.perf_counter() - began)
    if score is None:
        return progress
    check_finite(trainer, step.number, "validation loss", score.loss)
    log_score(trainer, step.number, step.epoch, score)
    progress = replace(progress, evaluated_step=step.number, validation_loss=score.loss)
    if progress.best_loss is None or score.loss < progress.best_loss:
        return replace(progress, best_loss=score.loss, best_step=step.number, evaluations_since_best=0)
    return replace(progress, evaluations_since_best=progress.evaluations_since_best + 1)


def evaluate_last_step(trainer: Trainer, progress: Progress) -> Progress:
    """Evaluate the current step, unless that is done: a resumed run may have no step left that would do it."""
    if is_evaluated(trainer, progress):
        return progress
    progress = evaluate_step(trainer, last_step(trainer, progress), progress, Clock())
    if not is_evaluated(trainer, progress):
        raise stopped_after(progress.step, trainer.asked_to_stop())
    return progress


def validate(trainer: Trainer) -> Score | None:
    """Return the model's current loss on the validation rows, each row counted once over all processes; None when a
    signal asks to stop meanwhile."""
    groups = hidden_states.groups_of(trainer, "validation")
    asked_to_stop = 0

    def batches() -> Iterator[tuple[Batch, float]]:
        nonlocal asked_to_stop
        for rows, weight in trainer.display.through(own_share(groups, trainer.accelerator), "evaluating"):
            yield hidden_states.batch_of(trainer, "validation", rows), weight
            asked_to_stop = trainer.asked_to_stop()
            if asked_to_stop:
                return

    tally = tally_loss(trainer.model, batches(), trainer.accelerator.device, trainer.head, trainer.below)
    reshard(trainer.model)
    return None if asked_to_stop else mean_score(trainer.accelerator.reduce(tally))


def last_step(trainer: Trainer, progress: Progress) -> Step:
    """Return the last step that was taken."""
    return next(trainer.schedule.steps(progress.step - 1))


def is_evaluated(trainer: Trainer, progress: Progress) -> bool:
    """Whether the current step has been evaluated, or there is nothing to evaluate on."""
    return trainer.job.validation is None or progress.evaluated_step == progress.step
