"""Checkpoints during a run: write them, resume from them, and choose the weights at the end."""

from __future__ import annotations

from typing import Any

from lora_cli.errors import RunError, UserError
from lora_cli.recipe.schema import Training
from lora_cli.training.distributed.processes import broadcast_from_first
from lora_cli.training.run import checkpoint
from lora_cli.training.run.checkpoint import Progress, State
from lora_cli.training.trainer import Trainer

TAKE_THE_LAST = "--resume training.load_best_model_at_end=false takes the last step's weights instead"


def keeps_best(training: Training) -> bool:
    """Whether each best evaluation so far gets a checkpoint, which rotation does not remove."""
    return training.load_best_model_at_end or training.early_stopping_patience is not None


def continue_run(trainer: Trainer, info: dict[str, Any]) -> None:
    """Continue the folder's run with the record ``info``, given its original start time; report changed recipe keys.

    Raises UserError when the run has already taken more steps than are asked for.
    """
    folder = trainer.job.folder
    steps = {checkpoint.step_of(path): path for path in checkpoint.checkpoints(folder.checkpoints)}
    reached = [step for step, path in steps.items() if step > trainer.total_steps and checkpoint.is_complete(path)]
    if reached:
        what = f"--resume: the run has taken {reached[-1]:,} steps already, and {trainer.total_steps:,} are asked for"
        hint = "raise training.max_steps or training.num_train_epochs, or begin a new run"
        raise UserError(what, str(folder.root), hint)
    before = folder.read_info()
    info["started"] = before["started"]
    for change in folder.continue_run(trainer.job.recipe, info):
        trainer.display.note(change)
    course = trainer.job.recipe.training.lr_scheduler_type
    if before["steps"] != info["steps"] and course != "constant":
        what = f"the {course} schedule now ends at step {info['steps']:,}, not {before['steps']:,}"
        message = f"{what}: from here on the learning rate differs from that of a run never interrupted"
        trainer.display.note(message, warning=True)


def save(trainer: Trainer, progress: Progress) -> None:
    """Write a checkpoint, and only then remove older ones. Raises RunError when it cannot be written."""
    state = checkpoint.capture(progress, trainer.trained, trainer.optimizer, trainer.accelerator.scaler)
    if trainer.writes:
        trainer.job.folder.check_held()
        trainer.job.folder.sync_metrics()
        checkpoint.write(trainer.job.folder.checkpoints, state)
        _rotate(trainer, progress)
    trainer.accelerator.wait_for_everyone()


def _rotate(trainer: Trainer, progress: Progress) -> None:
    """Remove the checkpoints that are no longer needed, since this step's is complete."""
    training = trainer.job.recipe.training
    best = progress.best_step if keeps_best(training) else None
    checkpoint.rotate(trainer.job.folder.checkpoints, progress.step, training.save_total_limit, best)


def restore(trainer: Trainer) -> Progress | None:
    """Restore the newest complete checkpoint and remove later metrics; return None when there is no checkpoint."""
    folder = trainer.job.folder
    state = broadcast_from_first(_newest_complete(trainer) if trainer.writes else None)
    if state is None:
        if trainer.writes:
            folder.cut_metrics(-1, -1)
        return None
    accelerator = trainer.accelerator
    progress = checkpoint.restore(
        state, trainer.trained, trainer.optimizer, accelerator.scaler, accelerator.process_index
    )
    if trainer.writes:
        evaluated = progress.step if progress.evaluated_step is None else progress.evaluated_step
        folder.cut_metrics(progress.step, evaluated)
        _warn_of_missing_metrics(trainer, progress)
        _rotate(trainer, progress)  # a killed process may not have done so
    return progress


def _warn_of_missing_metrics(trainer: Trainer, progress: Progress) -> None:
    """Warn when the checkpoint is newer than the metrics, as in a folder that was copied during a run."""
    folder = trainer.job.folder
    lasts = {line["split"]: line["step"] for line in folder.read_metrics()}
    for split, reached in (("train", progress.logged_step), ("validation", progress.evaluated_step)):
        last = lasts.get(split, -1)
        if reached is not None and last < reached:
            what = f"the {split} lines of steps {last + 1:,} to {reached:,} are missing, and are not measured again"
            trainer.display.note(f"{folder.metrics}: {what}", warning=True)


def _newest_complete(trainer: Trainer) -> State | None:
    """Return the newest complete checkpoint; report which it is, and which were ignored."""
    for path in reversed(checkpoint.checkpoints(trainer.job.folder.checkpoints)):
        if checkpoint.is_complete(path):
            trainer.display.note(f"resumed from {path}")
            state = checkpoint.read(path)
            _warn_without_best(trainer, state.document.progress)
            return state
        trainer.display.note(f"{path} is damaged and ignored", warning=True)
    trainer.display.note("no complete checkpoint: starting again", warning=True)
    return None


def _warn_without_best(trainer: Trainer, progress: Progress) -> None:
    best = progress.best_step
    if best is None or not trainer.job.recipe.training.load_best_model_at_end:
        return
    path = checkpoint.path_of(trainer.job.folder.checkpoints, best)
    if not checkpoint.is_complete(path):
        what = f"{path}, the best so far, is missing or damaged: the run will fail unless it finds a better one"
        trainer.display.note(f"{what}; {TAKE_THE_LAST}", warning=True)


def choose_weights(trainer: Trainer, progress: Progress) -> int:
    """Keep the last step's weights in the model or load the best step's, as the recipe says; return that step.

    Raises RunError when the best step's checkpoint is missing or damaged.
    """
    best, training = progress.best_step, trainer.job.recipe.training
    if best is None or best == progress.step:
        return progress.step
    if not training.load_best_model_at_end:
        if keeps_best(training):
            hint = f"--resume training.load_best_model_at_end=true takes those of step {best}, the best"
            trainer.display.note(f"the adapter has the weights of step {progress.step}, the last; {hint}")
        return progress.step
    path = checkpoint.path_of(trainer.job.folder.checkpoints, best)
    state = broadcast_from_first(checkpoint.read(path) if trainer.writes and checkpoint.is_complete(path) else None)
    if state is None:
        what = "the best step's checkpoint is missing or damaged; no adapter was written, the others are kept"
        raise RunError(what, str(path), TAKE_THE_LAST)
    checkpoint.restore_weights(state, trainer.trained)
    trainer.display.note(f"the adapter has the weights of step {best}, the best")
    return best
