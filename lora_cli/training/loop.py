"""The training loop, on Accelerate: ``train`` reads top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel

from lora_cli.data.batches import Step
from lora_cli.data.cache import prune, publish, withdraw
from lora_cli.data.examples import Examples
from lora_cli.display import Display
from lora_cli.errors import RunError, SecondaryError, UserError, is_out_of_space, unwritable
from lora_cli.system.folders import atomic_folder
from lora_cli.system.memory import is_out_of_memory
from lora_cli.training import hidden_states
from lora_cli.training.distributed.cache_keys import publish_keys
from lora_cli.training.distributed.launch_environment import is_first_here, process_count, process_index
from lora_cli.training.distributed.processes import broadcast_from_first, is_broken_connection
from lora_cli.training.distributed.sharding import is_sharded
from lora_cli.training.interrupt import catch_signals, stopped_after
from lora_cli.training.memory.out_of_memory import out_of_memory
from lora_cli.training.metrics import Clock, finish_trackers, log_step, start_trackers
from lora_cli.training.nonfinite import check_finite, count_skipped, weight_norm
from lora_cli.training.optimizer import learning_rate_at
from lora_cli.training.prepare import Prepared
from lora_cli.training.proof import digests, missing_gradient_warning, prove
from lora_cli.training.record import report_setup, result_record, run_record, write_adapter
from lora_cli.training.resume import choose_weights, continue_run, keeps_best, restore, save
from lora_cli.training.run.checkpoint import RESUME_HINT, Progress, checkpoint_hint, host_copy
from lora_cli.training.setup import set_up
from lora_cli.training.step import take_step, waits_each_step
from lora_cli.training.trainer import Trainer, unwrap
from lora_cli.training.validation import evaluate_last_step, evaluate_start, evaluate_step, is_evaluated, last_step
from lora_cli.weights.adapter.provenance import now
from lora_cli.weights.quantized_cache import prune_cached

PROOF_TOKENS = 64
READ_EVERY = 1.0  # maximum seconds between two readings of the losses
PendingOutcomes = list[tuple[Step, torch.Tensor]]
"""Steps, each with the result of ``take_step``, which is still on the device."""


def train(job: Prepared, display: Display) -> dict[str, Any]:
    """Fine-tune the prepared job. Returns run.json's content, including the result.

    Raises UserError when stored weights turn out to be unusable, before the run's files are written; RunError when the
    run fails; Interrupted when a signal stopped it, after a checkpoint or before the first step.
    """
    began = time.perf_counter()
    with job.folder.hold() if process_index() == 0 else nullcontext() as held:
        if held is not None and not held.locked:
            what = "cannot be locked on this file system: do not start a second run in this folder"
            display.note(f"{job.folder.root} {what}", warning=True)
        return train_alone(job, display, began)


def train_alone(job: Prepared, display: Display, began: float) -> dict[str, Any]:
    """Train in a folder that no other run is using; raises what ``train`` does."""
    made = publish(job.folder.cache, job.tokenized)
    trainer = None
    try:
        store = publish_keys(job.cache_keys)
        trainer = set_up(job, display)
        del store
        trainer.hidden_states = hidden_states.plan(trainer)
        try:
            info = run(trainer, began)
        finally:
            finish_trackers(trainer)
        close_process_group(trainer)
        return info
    except UserError:
        remove_cache(job, made)
        raise
    except (RuntimeError, MemoryError, OSError) as error:
        failure = known_failure(error, job, trainer)
        if failure is None:
            raise
        raise failure from error


def remove_cache(job: Prepared, made: list[Path]) -> None:
    """Remove what a refused run has put into the cache; ``made`` is what ``publish`` has created."""
    if is_first_here() and not job.folder.holds_run:
        prune_cached(job.folder.cache, None)
    withdraw(made)
    if process_count() > 1:  # another process may have created them
        for empty in (job.folder.cache, job.folder.root):
            with suppress(OSError):  # not empty: files of others stay
                empty.rmdir()


def known_failure(error: Exception, job: Prepared, trainer: Trainer | None) -> RunError | None:
    """Return the error to report for a lack of memory or disk space or a lost connection, which libraries raise as
    errors of their own; None for any other. ``trainer`` is None until set-up is complete."""
    if is_out_of_memory(error):
        if trainer is None:
            return out_of_memory(job, error, False, job.recipe.training.stream_base is True)
        checkpointing = bool(unwrap(trainer).base_model.is_gradient_checkpointing)
        return out_of_memory(trainer.job, error, checkpointing, trainer.streams)
    if is_out_of_space(error):  # from a library's own write, such as a tracker's
        return unwritable(Path(getattr(error, "filename", None) or job.folder.root), error)
    if process_count() > 1 and isinstance(error, RuntimeError) and is_broken_connection(error):
        cause = str(error).strip().splitlines()[-1:]  # NCCL's own is the last line
        what = ": ".join(["the connection to another process of this run broke", *cause])
        return SecondaryError(what, str(job.folder.root), checkpoint_hint(job.folder.checkpoints, RESUME_HINT))
    return None


def run(trainer: Trainer, began: float) -> dict[str, Any]:
    """Run from the folder's first file to the adapter. Returns run.json's content."""
    job, folder, display = trainer.job, trainer.job.folder, trainer.display
    info = run_record(trainer)
    untrained = digests(whole_weights(trainer))
    with catch_signals(trainer.interrupt):
        if trainer.writes:
            folder.check_held()
            display.log_to(folder.log)
            if job.resume:
                continue_run(trainer, info)
            else:
                folder.begin(job.recipe, info, job.overwrite)
            prune(folder.cache, job.cache_keys)
            prune_cached(folder.cache, trainer.cached_base.name if trainer.cached_base else None)
        report_setup(trainer)
        start_trackers(trainer)
        restored = restore(trainer) if job.resume else None
        resumed_step = restored.step if restored else 0
        if restored is None or is_unfinished(trainer, restored) or not is_evaluated(trainer, restored):
            hidden_states.compute(trainer, resumed_step)
        progress = evaluate_start(trainer) if restored is None else restored
        with display.steps(progress.step, trainer.total_steps):
            progress = evaluate_last_step(trainer, run_steps(trainer, progress))

    adapter_step = choose_weights(trainer, progress)
    result = result_record(trainer, progress, adapter_step, resumed_step, time.perf_counter() - began)
    info |= {"finished": now(), "result": result}
    save_adapter(trainer, info, untrained)
    if trainer.writes:
        folder.write_info(info)
    return info


def close_process_group(trainer: Trainer) -> None:
    """Close the process group.

    DistributedDataParallel is released first. If it were the last to hold the group, it would keep the GIL while
    waiting for one of the group's threads, which may itself be waiting for the GIL.
    """
    if isinstance(trainer.model, DistributedDataParallel):
        trainer.model = unwrap(trainer)
        trainer.accelerator.free_memory()
    trainer.accelerator.end_training()


def save_adapter(trainer: Trainer, info: dict[str, Any], untrained: dict[str, str]) -> None:
    """Write the adapter's folder, in place once verified; ``untrained`` are the digests of the weights before training.

    Raises RunError when the adapter cannot be written or verified.
    """
    job, weights = trainer.job, whole_weights(trainer)
    needed = sum(weight.nbytes for weight in weights.values())
    job.folder.check_held()
    drafting: AbstractContextManager[Path | None] = follower_errors()
    if trainer.writes:
        drafting = atomic_folder(job.folder.adapter, True, needed)
    with drafting as draft:
        if draft is not None:
            write_adapter(trainer, draft, weights, info)
        written = broadcast_from_first(draft)
        if draft is not None or is_sharded(trainer.accelerator):  # a sharded model's forward pass needs all processes
            assert written is not None
            prove(written, str(job.folder.root), unwrap(trainer), weights, untrained, proof_rows(job.train.examples))
        trainer.accelerator.wait_for_everyone()
        job.folder.check_held()  # verification takes a while


def proof_rows(examples: Examples) -> Iterator[torch.Tensor]:
    """Yield the first tokens of each row: (tokens,) int64."""
    for index in range(len(examples)):
        yield torch.tensor(examples.row(index)[0][:PROOF_TOKENS], dtype=torch.long)


@contextmanager
def follower_errors() -> Iterator[None]:
    """For processes that do not write: raise SecondaryError for a failure, whose cause the first process reports."""
    try:
        yield
    except (RunError, OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "unable to open file" not in str(error):  # torch's for a removed file
            raise
        raise SecondaryError(f"the adapter could not be verified: {error}") from error


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return the complete trained weights by name, gathered from all processes."""
    return {name: host_copy(weight) for name, weight in trainer.trained}


def run_steps(trainer: Trainer, progress: Progress) -> Progress:
    """Take all remaining steps: train, log, evaluate, save."""
    training = trainer.job.recipe.training
    rate = learning_rate_at(training, trainer.optimizer, trainer.total_steps)
    clock = Clock()
    read_at = 0.0
    unread: PendingOutcomes = []
    waits = waits_each_step(trainer)
    if due(progress.step, training.eval_steps) and not is_evaluated(trainer, progress):  # as when it was stopped
        step = last_step(trainer, progress)
        progress = evaluate_step(trainer, step, progress, clock)
        progress = end_step(trainer, step, progress, unread)
    left = trainer.total_steps - progress.step if is_unfinished(trainer, progress) else 0
    for step in islice(trainer.schedule.steps(progress.step), left):
        outcome = take_step(trainer, step, rate(step.number))
        if step.number == 1:
            warn_of_missing_gradients(trainer)
        unread.append((step, outcome))
        clock.count(step)
        progress = replace(progress, step=step.number)
        last = step.number == trainer.total_steps
        evaluates = trainer.job.validation is not None and (last or due(step.number, training.eval_steps))
        may_be_last = last or (evaluates and may_converge(trainer, progress))
        logs = may_be_last or due(step.number, training.logging_steps)
        if logs or evaluates or waits or clock.seconds > read_at + READ_EVERY:
            progress, read_at = read_outcomes(trainer, unread, progress), clock.seconds
        if logs:
            log_step(trainer, step, outcome, rate(step.number), clock)
            progress = replace(progress, logged_step=step.number)
        trainer.display.advance(step.number)
        if evaluates:
            progress = evaluate_step(trainer, step, progress, clock)
        progress = end_step(trainer, step, progress, unread)
        if has_converged(trainer, progress):
            break
    return progress


def warn_of_missing_gradients(trainer: Trainer) -> None:
    """Warn, after the first step, when it gave some adapted layers no gradient."""
    message = missing_gradient_warning(trainer.trained, trainer.optimizer)
    if message:
        trainer.display.note(message, warning=True)


def end_step(trainer: Trainer, step: Step, progress: Progress, unread: PendingOutcomes) -> Progress:
    """Save a checkpoint when it is due. Raises Interrupted when a signal asks to stop and the run is not finished."""
    training = trainer.job.recipe.training
    last = step.number == trainer.total_steps
    stop_early = has_converged(trainer, progress)
    asked_to_stop = trainer.asked_to_stop()
    is_best = progress.best_step == step.number and keeps_best(training)
    if last or stop_early or asked_to_stop or is_best or due(step.number, training.save_steps):
        progress = read_outcomes(trainer, unread, progress)
        check_finite(trainer, step.number, "weight norm", weight_norm(trainer))
        save(trainer, progress)
    if asked_to_stop and not stop_early and not (last and is_evaluated(trainer, progress)):
        raise stopped_after(step.number, asked_to_stop)
    if stop_early:
        trainer.display.note(f"stopping early: best validation loss was at step {progress.best_step}")
    return progress


def read_outcomes(trainer: Trainer, unread: PendingOutcomes, progress: Progress) -> Progress:
    """Read the results in ``unread`` (a GPU must finish its work first), count skipped steps and clear the list."""
    for step, outcome in unread:
        loss, grad_norm = outcome.tolist()
        progress = count_skipped(trainer, step, loss, grad_norm, progress)
    unread.clear()
    return progress


def is_unfinished(trainer: Trainer, progress: Progress) -> bool:
    """Whether there are steps still to take; there are none after early stopping."""
    return progress.step < trainer.total_steps and not has_converged(trainer, progress)


def has_converged(trainer: Trainer, progress: Progress) -> bool:
    """Whether early stopping's patience is used up."""
    patience = trainer.job.recipe.training.early_stopping_patience
    return patience is not None and progress.evaluations_since_best >= patience


def may_converge(trainer: Trainer, progress: Progress) -> bool:
    """Whether one more evaluation that is not the best would use up early stopping's patience."""
    return has_converged(trainer, replace(progress, evaluations_since_best=progress.evaluations_since_best + 1))


def due(step: int, interval: int | None) -> bool:
    """Whether something done every ``interval`` steps is due after this step."""
    return interval is not None and step % interval == 0
