"""Signals, kills, failing writes and non-finite values: the folder stays intact and the run can be resumed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import forked
import pytest
import soak
import torch
from accelerate.tracking import TensorBoardTracker
from conftest import Run, done, edited_weights
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from lora_cli.errors import RunError, UserError
from lora_cli.training import loop
from lora_cli.training.run.checkpoint import is_complete
from lora_cli.training.run.lock import locked

ENDLESS = {"max_steps": 1_000_000, "save_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0}
RANDOM = {"adapter.lora_dropout": 0.1, "data": {"packing": True, "validation": 0.2}}


# --- signals and kills -----------------------------------------------------------------------------------------------


def test_runs_killed_at_random_instants_end_as_the_one_left_alone(write_recipe: Any, tmp_path: Path) -> None:
    steps = {"max_steps": 6, "save_steps": 1, "eval_steps": 3, "load_best_model_at_end": True}
    seen = soak.soak(write_recipe({"training": steps, **RANDOM}), tmp_path / "soak", rounds=6, seed=0)
    assert seen["kills"] == 6 and seen["runs"] > 0


def test_a_run_stopped_by_a_signal_or_a_kill_goes_on_exactly_and_its_folder_is_its_own(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    stops = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    recipe = write_recipe({"training": ENDLESS | {"load_best_model_at_end": True}, **RANDOM}, name="endless.yaml")
    runs = {kind: Run(tmp_path / kind.name) for kind in stops}
    logs = {kind: tmp_path / f"{kind.name}.log" for kind in stops}
    context = soak.forking()
    children = {kind: soak.start(context, recipe, run.folder, logs[kind]) for kind, run in runs.items()}
    before = {}
    try:
        for kind, code in stops.items():
            run, child = runs[kind], children[kind]
            until = time.monotonic() + 120
            while not run.checkpoints[-1:] > [3] and child.is_alive() and time.monotonic() < until:
                time.sleep(0.01)
            for flag in ("--resume", "--overwrite"):
                refused = lora("train", recipe, f"training.output_dir={run.folder}", flag)
                assert refused.exit_code == 2
                assert "another run is using this folder" in refused.stderr
            os.kill(child.pid, kind)
            child.join(60)
            assert child.exitcode == code, logs[kind].read_text()
            assert run.info["finished"] is None
            assert not (run.folder / "adapter").exists()
            before[kind] = run.losses
            if kind != signal.SIGKILL:
                told = logs[kind].read_text()
                assert f"stopped after step {len(run.losses)}, checkpoint written" in told
                assert "--resume" in told and "Traceback" not in told
                assert run.checkpoints[-1] == len(run.losses)
    finally:
        for child in children.values():
            child.kill()
            child.join()

    steps = f"training.max_steps={max(map(len, before.values())) + 3}"
    undisturbed = Run(tmp_path / "undisturbed")
    done(lora("train", recipe, steps, f"training.output_dir={undisturbed.folder}"))
    for kind, run in runs.items():
        done(lora("train", recipe, steps, f"training.output_dir={run.folder}", "--resume"))
        assert undisturbed.losses[: len(before[kind])] == before[kind]
        assert soak.measured(run.folder) == soak.measured(undisturbed.folder)
        assert run.adapter_bytes == undisturbed.adapter_bytes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data.validation": 0.2},
        {
            "data.validation": 0.2,
            "training": {"max_steps": 40, "eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 1.0},
        },
    ],
    ids=["plain", "validation", "early"],
)
def test_a_signal_in_the_last_step_lets_the_run_end(
    changes: dict[str, Any],
    write_recipe: Any,
    tmp_path: Path,
    lora: Any,
    no_curves: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With nothing left to compute, writing the adapter takes only a moment."""
    end_step = loop.end_step

    def signalled(trainer: Any, step: Any, progress: Any, *others: Any) -> Any:
        if step.number == trainer.total_steps or loop.has_converged(trainer, progress):
            signal.raise_signal(signal.SIGTERM)
        return end_step(trainer, step, progress, *others)

    monkeypatch.setattr(loop, "end_step", signalled)
    done(lora("train", write_recipe(changes)))
    run = Run(tmp_path / "run")
    assert run.info["finished"] and run.info["result"]["steps"] == len(run.losses) < 40 and run.adapter_bytes


IN_STEP_2 = """
import time
from pathlib import Path
from lora_cli.training import loop
take_step = loop.take_step
def endless(trainer, step, rate):
    if step.number == 2:
        Path({begun!r}).touch()
    while step.number == 2:
        time.sleep(0.01)
    return take_step(trainer, step, rate)
loop.take_step = endless
"""
"""A second step that does not end."""


def test_a_second_signal_stops_at_once_with_nothing_torn(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    run, begun, streams = Run(tmp_path / "run"), tmp_path / "begun", [tmp_path / "out", tmp_path / "err"]
    recipe = write_recipe({"training": ENDLESS | {"save_steps": 1}})
    command = (["train", str(recipe)], {}, IN_STEP_2.format(begun=str(begun)), streams)
    child = soak.forking().Process(target=forked.lora, args=command)
    child.start()
    try:
        while not begun.exists() and child.is_alive():
            time.sleep(0.01)
        until = time.monotonic() + 60
        while child.is_alive() and time.monotonic() < until:
            child.terminate()  # two in a row may arrive as one
            child.join(0.05)
        assert child.exitcode == -signal.SIGTERM, streams[1].read_text()
    finally:
        child.kill()
        child.join()
    assert run.checkpoints == [1] and is_complete(run.folder / "checkpoints" / "step-00000001")
    done(lora("train", recipe, "training.max_steps=2", "--resume"))
    assert run.column("step") == [1, 2]


@pytest.fixture
def after_preparing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Call a function once, after the checks of the next run and before it begins anything."""
    from lora_cli.training import prepare as module

    def then(do: Callable[[], object]) -> None:
        def prepare(*arguments: Any) -> Any:
            monkeypatch.setattr(module, "prepare", unchanged)
            job = unchanged(*arguments)
            do()
            return job

        unchanged = module.prepare
        monkeypatch.setattr(module, "prepare", prepare)

    return then


def test_of_two_runs_started_at_once_the_refused_one_takes_nothing_of_the_others(
    write_recipe: Any, tmp_path: Path, lora: Any, after_preparing: Any, no_curves: None
) -> None:
    recipe = write_recipe({"training": {"max_steps": 2, "warmup_steps": 0}, "quantization": {"method": "nf4"}})
    whole, run = tmp_path / "whole", tmp_path / "run"
    done(lora("train", recipe, f"training.output_dir={whole}"))
    with ExitStack() as other:

        def begin_the_other() -> None:
            shutil.copytree(whole / "cache", run / "cache")
            other.enter_context(locked(run))

        after_preparing(begin_the_other)
        refused = lora("train", recipe)
    assert refused.exit_code == 2
    assert "another run is using this folder" in refused.stderr
    kept = [
        sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (whole / "cache", run / "cache")
    ]
    assert kept[0] == kept[1] and len(kept[0]) > 2


def test_a_run_that_began_and_ended_meanwhile_is_not_replaced(
    write_recipe: Any, tmp_path: Path, lora: Any, after_preparing: Any, no_curves: None
) -> None:
    recipe, run = write_recipe({"training": {"max_steps": 2, "warmup_steps": 0}}), Run(tmp_path / "run")
    after_preparing(lambda: done(lora("train", recipe, "training.seed=7")))
    refused = lora("train", recipe)
    assert refused.exit_code == 2
    assert "another run has used this folder meanwhile" in refused.stderr
    assert run.info["seed"] == 7 and run.info["finished"]
    done(lora("train", recipe, "--overwrite"))
    assert run.info["seed"] == 42


def test_who_is_refused_leaves_the_others_folder_empty_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both runs found no folder. The one that is refused believes that it made the folder, but must not remove it."""
    folder = tmp_path / "run"
    with locked(folder) as held:
        with monkeypatch.context() as before:
            before.setattr(Path, "exists", lambda _: False)
            with pytest.raises(UserError, match="another run is using"), locked(folder):
                pass
        held.check()
    assert not folder.exists()


def test_two_processes_started_at_once(write_recipe: Any, tmp_path: Path, no_curves: None) -> None:
    recipe = write_recipe({"training": {"max_steps": 2, "warmup_steps": 0}})
    for attempt in range(3):
        run = tmp_path / f"run{attempt}"
        children = [soak.start(soak.forking(), recipe, run, tmp_path / f"log{n}") for n in range(2)]
        for child in children:
            child.join(120)
        assert sorted(child.exitcode for child in children) == [0, 2]
        assert list((run / "cache").glob("*.safetensors"))
        assert json.loads((run / "run.json").read_text())["finished"]


def test_killed_between_two_adapters_a_run_has_the_former_one(
    train: Callable[..., Run], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train({"training.max_steps": 2})
    before, replace = run.adapter_bytes, Path.replace

    def kill(*_: Any) -> Any:
        raise KeyboardInterrupt

    def full(path: Path, target: Path) -> Path:  # the former adapter, moved out of the way, is put back
        if target.name == "adapter" and path.suffix == ".draft":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        assert lora("train", run.folder / "recipe.yaml", "--resume").exit_code == 3
    assert run.adapter_bytes == before

    def killed(path: Path, target: Path) -> Path:  # it is not put back either
        return kill() if target.name == "adapter" else replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        lora("train", run.folder / "recipe.yaml", "--resume")
    assert not (run.folder / "adapter").exists()
    for adapter in (run.folder, run.folder / "adapter"):
        done(lora("adapters", "show", adapter))

    shutil.rmtree(run.folder / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", kill)
        lora("train", run.folder / "recipe.yaml", "--resume")
    assert run.adapter_bytes == before and not soak.drafts(run.folder)


@pytest.mark.parametrize("logging_steps", [1, 100])
@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_run_whose_folder_is_taken_away_writes_nothing_into_what_is_there_now(
    how: str,
    logging_steps: int,
    write_recipe: Any,
    tmp_path: Path,
    lora: Any,
    no_curves: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe({"training": ENDLESS | {"max_steps": 6, "logging_steps": logging_steps}})
    run, moved, take_step = Run(tmp_path / "run"), tmp_path / "moved", loop.take_step

    def taken_away(trainer: Any, step: Any, rate: float) -> torch.Tensor:
        if step.number == 3:
            run.folder.rename(moved)
            shutil.rmtree(moved) if how == "removed" else None
            (run.folder / "checkpoints").mkdir(parents=True) if how == "replaced" else None
        return take_step(trainer, step, rate)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", taken_away)
        result = lora("train", recipe)
    assert result.exit_code == 3
    told = {"replaced": "another folder is now in the place of the run's"}.get(
        how, "the run's folder is no longer there"
    )
    assert f"{run.folder}: {told}; nothing more was written" in result.stderr and "free disk space" not in result.stderr
    if how == "removed":
        assert "start a new run" in result.stderr and not run.folder.exists() and not moved.exists()
        return
    assert f"what the run has written is now in {moved}: move it back" in result.stderr
    assert run.folder.exists() == (how == "replaced") and not [path for path in run.folder.rglob("*") if path.is_file()]
    shutil.rmtree(run.folder, ignore_errors=True)
    moved.rename(run.folder)
    done(lora("train", recipe, "--resume"))
    whole = Run(tmp_path / "whole")
    done(lora("train", recipe, f"training.output_dir={whole.folder}"))
    assert run.adapter_bytes == whole.adapter_bytes and run.losses == whole.losses


@pytest.mark.parametrize("during", ["set_up", "prove"])
def test_a_folder_that_is_replaced_between_two_writes_is_left_alone(
    during: str, write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is replaced while the base is loaded, or while the adapter is verified."""
    run, slow = tmp_path / "run", getattr(loop, during)

    def replaced(*given: Any) -> Any:
        found = slow(*given)
        run.rename(tmp_path / "moved")
        (run / "checkpoints").mkdir(parents=True)
        return found

    monkeypatch.setattr(loop, during, replaced)
    result = lora("train", write_recipe())
    assert result.exit_code == 3
    assert f"{run}: another folder is now in the place of the run's; nothing more was written" in result.stderr
    assert list(run.rglob("*")) == [run / "checkpoints"]


def test_where_nothing_can_be_locked_or_synced_a_run_goes_on_and_says_so(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(number: int) -> Callable[..., None]:
        def refuse(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        return refuse

    run = Run(tmp_path / "runs" / "run")
    recipe = write_recipe({"training": {"output_dir": run.folder, "max_steps": 3, "save_steps": 1}})
    monkeypatch.setattr(os, "fsync", refused(errno.EINVAL))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refused(errno.EIO))
        result = lora("train", recipe)
    assert result.exit_code == 3 and f"{run.folder}: the system refused: Input/output error" in result.stderr
    assert not (tmp_path / "runs").exists()

    monkeypatch.setattr(fcntl, "flock", refused(errno.ENOLCK))
    for more in ([], ["--resume"]):
        result = done(lora("train", recipe, *more))
        assert result.stderr.count(f"warning: {run.folder} cannot be locked on this file system") == 1
    assert run.column("step") == [1, 2, 3] and run.checkpoints == [2, 3] and not soak.drafts(run.folder)


def test_the_names_of_new_folders_and_of_the_metrics_are_on_the_disk(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    synced: dict[Path, set[str]] = {}

    def noted(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_dir():
            synced[path] = {entry.name for entry in path.iterdir()}
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    run = tmp_path.resolve() / "all" / "runs" / "run"
    steps = {"output_dir": run, "max_steps": 1}
    save, seen = loop.save, []

    def saved(*arguments: Any) -> None:
        save(*arguments)
        seen.append("metrics.jsonl" in synced[run])

    monkeypatch.setattr(loop, "save", saved)
    done(lora("train", write_recipe({"training": steps})))
    assert seen == [True]
    for folder in (run, run.parent, run.parent.parent):
        assert folder.name in synced[folder.parent]


# --- failing writes --------------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: the system then fails writes as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def many_words(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """tiny_gpt2 with so many added tokens that its tokenizer is the largest file that a command writes."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.add_tokens([f"<word-{number}>" for number in range(1600)])
    shutil.copytree(tiny_gpt2, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


FAILING = {  # what cannot be written: the file that becomes too large (or a size limit), and the path reported
    "run.json": (500, "run.json"),
    "checkpoint": ("checkpoints/step-00000004/state.json", "checkpoints/step-00000004"),
    "adapter": ("adapter/tokenizer.json", "adapter"),
    "metrics.jsonl": ("metrics.jsonl", "metrics.jsonl"),
}


@pytest.mark.parametrize("what", FAILING)
def test_a_failing_write_is_told_with_the_bytes_it_needs_and_leaves_what_was_whole(
    what: str, tiny_gpt2: Path, many_words: Path, write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    too_large, place = FAILING[what]
    base = many_words if what == "adapter" else tiny_gpt2
    changes = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    changes |= {"save_steps": None, "save_total_limit": None} if what == "metrics.jsonl" else {}
    recipe = write_recipe({"model.name_or_path": base, "training": ENDLESS | changes, "adapter.r": 1})
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "run")
    steps = f"training.max_steps={120 if what == 'metrics.jsonl' else 4}"
    for command in ([steps, f"training.output_dir={whole.folder}"], []):
        done(lora("train", recipe, *command))
    limit = too_large if isinstance(too_large, int) else int(0.9 * (whole.folder / too_large).stat().st_size)
    with files_up_to(limit):
        result = lora("train", recipe, steps, "--resume")
    assert result.exit_code == 3, result.stderr
    assert f"{run.folder / place}: could not be written: " in result.stderr and "File too large" in result.stderr
    assert re.search(r"[(][1-9][0-9,]* bytes are needed, [0-9,]+ are free", result.stderr)
    assert "run the command again when it can be written" in result.stderr and "free disk space" not in result.stderr
    assert 2 in run.checkpoints and all(is_complete(path) for path in (run.folder / "checkpoints").iterdir())

    done(lora("train", recipe, steps, "--resume"))
    assert soak.measured(run.folder) == soak.measured(whole.folder)
    assert run.adapter_bytes == whole.adapter_bytes
    assert not soak.drafts(run.folder)


def test_a_tokenizer_that_quantize_cannot_write_is_no_bug(many_words: Path, tmp_path: Path, lora: Any) -> None:
    command = ("quantize", many_words, "--out", tmp_path / "out")
    with files_up_to(int(0.9 * (many_words / "tokenizer.json").stat().st_size)):
        result = lora(*command)
    assert result.exit_code == 3, result.stderr
    assert f"{tmp_path / 'out'}: could not be written: File too large" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    done(lora(*command))


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no small disk can be made here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_disk_without_room_for_a_librarys_files_is_told_with_what_is_free(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=1m,nr_inodes=7"):
        steps = ENDLESS | {
            "max_steps": 400,
            "save_steps": None,
            "output_dir": disk / "run",
            "report_to": ["tensorboard"],
        }
        result = lora("train", write_recipe({"training": steps, "adapter.r": 1}))
        assert result.exit_code == 3
        told = re.search(r"(\S+): could not be written: .*No space left .*[(].*[0-9,]+ .*are free", result.stderr)
        assert told and Path(told[1]).is_relative_to(disk / "run"), result.stderr
        assert "no more files can be made" in result.stderr and "Traceback" not in result.stderr


def test_a_folder_that_a_disk_has_no_room_for_is_told_with_what_was_free(
    tiny_gpt2: Path, tmp_path: Path, lora: Any
) -> None:
    """Not with what is free again after the partial output has been removed."""
    disk = tmp_path / "disk"
    with small_disk(disk, "size=30m,nr_inodes=4"):
        result = lora("quantize", tiny_gpt2, "--out", disk / "out")
        assert result.exit_code == 3 and "no more files can be made" in result.stderr, result.stderr
        assert not list(disk.iterdir())


def test_a_full_disk_ends_the_run_and_leaves_what_was_whole(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "size=400k"):
        run = Run(disk / "run")
        steps = ENDLESS | {"max_steps": 40, "save_total_limit": None, "output_dir": run.folder}
        result = lora("train", write_recipe({"training": steps}))
        assert result.exit_code == 3
        told = re.search(r"(\S+): could not be written: .*No space left .*[(][0-9,]+ bytes are needed", result.stderr)
        assert (
            told
            and Path(told[1]).is_relative_to(run.folder)
            and "free disk space and run the command again" in result.stderr
        )
        assert 1 < len(run.checkpoints) < 20
        assert all(is_complete(path) for path in (run.folder / "checkpoints").iterdir())
        assert not soak.drafts(run.folder)

        kept = len(run.checkpoints)
        for step in run.checkpoints[:-1]:
            shutil.rmtree(run.folder / "checkpoints" / f"step-{step:08d}")
        longer = write_recipe({"training": steps | {"max_steps": 2 * kept + 4, "save_total_limit": 1}})
        done(lora("train", longer, "--resume"))
        assert run.column("step") == list(range(1, 2 * kept + 5))


def test_what_takes_its_place_is_on_the_disk_before_and_its_name_after(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, a power failure could leave a file's name without its content."""
    fsync, replace = os.fsync, Path.replace
    synced: list[Path] = []
    placed: list[tuple[Path, int]] = []

    def noted_sync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    def noted_replace(path: Path, target: Path) -> Path:
        if not target.name.startswith("."):
            files = [file for file in (path, *path.rglob("*")) if file.is_file()]
            assert {file.resolve() for file in files} <= set(synced), f"{target} is not on the disk"
            placed.append((target, len(synced)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    done(lora("train", write_recipe({"training": {"max_steps": 2, "save_steps": 1}})))
    run = tmp_path / "run"
    steps = [run / "checkpoints" / f"step-{step:08d}" for step in (1, 2)]
    assert {*steps, run / "adapter", run / "run.json", run / "recipe.yaml"} <= {target for target, _ in placed}
    assert any(target.parent == run / "cache" for target, _ in placed)
    for target, before in placed:
        assert target.parent.resolve() in synced[before:], f"{target}: its name is not on the disk"
    assert (run / "metrics.jsonl").resolve() in synced


def test_trackers_are_closed_when_a_run_fails(write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    finish = TensorBoardTracker.finish

    def counted(tracker: TensorBoardTracker) -> None:
        closed.append(tracker.run_name)
        finish(tracker)

    def fail(*_: Any) -> None:
        raise RunError("nothing goes on from here")

    monkeypatch.setattr(TensorBoardTracker, "finish", counted)
    recipe = write_recipe({"training.report_to": ["tensorboard"]})
    with monkeypatch.context() as failing:
        failing.setattr(loop, "take_step", fail)
        assert lora("train", recipe).exit_code == 3
    assert closed == ["lora"]
    done(lora("train", recipe, "--overwrite"))
    assert closed == ["lora", "lora"]


def test_a_tracker_that_does_not_start_is_told_and_the_run_goes_on_without(
    write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    recipe = write_recipe({"training.max_steps": 2})
    done(lora("train", recipe))
    (tmp_path / "run" / "lora").touch()  # in the place of the tracker's folder
    further = (recipe, "--resume", "training.max_steps=3")
    result = lora("train", *further, "training.report_to=[tensorboard]")
    assert result.exit_code == 2 and "continue with --resume" in result.stderr
    assert "training.report_to: a tracker does not start: NotADirectoryError" in result.stderr
    done(lora("train", *further))
    assert Run(tmp_path / "run").column("step") == [1, 2, 3]


def test_a_tracker_that_fails_ends_its_reports_and_not_the_run(
    write_recipe: Any, lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []

    def fail(tracker: TensorBoardTracker, values: dict[str, Any], step: int, **_: Any) -> None:
        logged.append(step)
        raise ConnectionError("its server is gone")

    monkeypatch.setattr(TensorBoardTracker, "log", fail)
    done(result := lora("train", write_recipe({"training.report_to": ["tensorboard"]})))
    told = "warning: training.report_to: no more metrics are sent: ConnectionError: its server is gone"
    assert result.stderr.count(told) == 1 and len(logged) == 1
    assert Run(tmp_path / "run").column("step") == [1, 2, 3, 4]


# --- non-finite values -----------------------------------------------------------------------------------------------

SHORT, LONG = 30, 60  # tokens: rows up to SHORT are harmless, rows above LONG reach the positions that overflow


@pytest.fixture(scope="module")
def overflowing(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_gpt2 with position embeddings beyond SHORT that are so large that their sum overflows float32."""
    folder = shutil.copytree(tiny_gpt2, tmp_path_factory.mktemp("models") / "overflowing")
    with edited_weights(folder) as weights:
        weights["transformer.wpe.weight"][SHORT + 1 :] = 3e38
    return folder


@pytest.fixture
def rows(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """Write rows of plain text: "s" for a short one, "l" for one that overflows."""

    def write(kinds: str) -> Path:
        path = tmp_path / f"{kinds}.jsonl"
        texts = []
        for number, kind in enumerate(kinds):
            text = f"Row {kind}{kinds[:number].count(kind)}" + " of the sea" * (20 if kind == "l" else 2)
            assert (len(tokenizer(text).input_ids) > LONG) is (kind == "l")
            assert len(tokenizer(text).input_ids) < SHORT or kind == "l"
            texts.append(json.dumps({"text": text}) + "\n")
        path.write_text("".join(texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def overflow(overflowing: Path, rows: Any, write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None) -> Any:
    """Train on rows of these kinds, one per step, in the file's order. Return the command's result and the run."""

    def go(kinds: str, name: str, *overrides: str) -> tuple[Any, Run]:
        run = Run(tmp_path / name)
        recipe = write_recipe(
            {
                "model.name_or_path": overflowing,
                "data": {"train": rows(kinds), "shuffle": False},
                "training": {"output_dir": run.folder, "max_steps": len(kinds), "save_steps": 1, "warmup_steps": 0}
                | {"save_total_limit": None, "lr_scheduler_type": "constant"}
                | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1},
            },
            name=f"{name}.yaml",
        )
        return lora("train", recipe, *overrides), run

    return go


def test_a_step_that_overflows_ends_the_run_before_the_optimizer_sees_it(overflow: Any, tmp_path: Path) -> None:
    result, run = overflow("ssslss", "stop")
    assert result.exit_code == 3
    message = " ".join(result.stderr.split())
    assert "step 4 was not taken: loss is nan" in message and "; the checkpoints are kept; " in message
    assert f"its rows are {tmp_path / 'ssslss.jsonl'}:4 (Row l0 of the sea" in message
    assert "training.learning_rate is too high" in message and "training.on_nonfinite: skip" in message
    assert run.checkpoints == [1, 2, 3]
    assert run.column("step") == [1, 2, 3]
    assert not (run.folder / "adapter").exists()


def test_a_step_that_overflows_is_told_once_by_two_processes(
    overflowing: Path, rows: Any, write_recipe: Any, lora_process: Any
) -> None:
    changes = {"model.name_or_path": overflowing, "data": {"train": rows("sslsss"), "shuffle": False}}
    small = {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 1}
    result = lora_process("train", write_recipe(changes | small), "--num-processes", "2")
    assert result.exit_code == 3
    assert result.stderr.count("step 2 was not taken") == 1


def test_a_gradient_that_overflows_by_itself_ends_the_run_too(
    tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    """The loss and the gradients are about 1e20, and their squares overflow float32."""
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    with edited_weights(base) as weights:
        weights["lm_head.weight"] *= 1e20
    result = lora("train", write_recipe({"model.name_or_path": base}))
    assert result.exit_code == 3 and "step 1 was not taken: grad norm is inf;" in " ".join(result.stderr.split())


def test_rows_are_named_by_file_and_line_whatever_was_held_out_and_mixed(
    write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "First {n} of all"}}\n\n' for n in range(12)))
    (tmp_path / "b.csv").write_text("text\n" + "".join(f'"Second {n}\nof all"\n' for n in range(12)))
    (tmp_path / "c.txt").write_text("\n\n".join(f"Third {n} of all" for n in range(12)))
    where = {f"a.jsonl:{2 * n + 1} (First {n} of" for n in range(12)}
    where |= {f"b.csv:{2 * n + 2} (Second {n} of" for n in range(12)}
    where |= {f"c.txt:{2 * n + 1} (Third {n} of" for n in range(12)}
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "save_steps": None, "max_steps": 10, "on_nonfinite": "skip"}
    sources = [str(tmp_path / name) for name in ("a.jsonl", "b.csv", "c.txt")]
    result = lora("train", write_recipe({"data": {"train": sources, "validation": 0.3}, "training": wild}))
    assert result.exit_code == 3
    named = set(re.findall(rf"{tmp_path}/(\S+ [(]\w+ \d+ \w+)", result.stderr))
    assert len(named) > 10 and named <= where, named - where
    assert {name[0] for name in named} == {"a", "b", "c"}


def test_a_skipped_step_leaves_every_weight_and_moment_alone(overflow: Any) -> None:
    result, run = overflow("ssslssl", "skip", "training.on_nonfinite=skip")
    done(result)
    assert result.stderr.count("was not taken") == 2
    folders = [run.folder / "checkpoints" / f"step-{step:08d}" for step in (3, 4, 5)]
    for name in ("weights.safetensors", "optimizer.safetensors"):
        before, skipped, after = ((folder / name).read_bytes() for folder in folders)
        assert before == skipped != after
    assert [loss is None for loss in run.losses] == [kind == "l" for kind in "ssslssl"]
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text()
    assert run.info["result"]["skipped_steps"] == 2
    assert run.info["result"]["loss"] == run.losses[5]
    assert "2 steps were skipped" in result.stdout

    _, without = overflow("sssss", "without")
    assert [loss for loss in run.losses if loss is not None] == without.losses
    assert run.adapter_bytes == without.adapter_bytes


@pytest.mark.parametrize("packing", ["true", "false"])
def test_validation_rows_that_overflow_are_named_before_the_first_step(
    packing: str, overflow: Any, rows: Any, tmp_path: Path
) -> None:
    """A long text is measured in windows, of which only some overflow."""
    texts = rows("slsssl")
    options = ("training.on_nonfinite=skip", "training.per_device_train_batch_size=2", f"data.packing={packing}")
    result, run = overflow("ss", "few", f"data.validation={texts}", "data.max_length=50", *options)
    assert result.exit_code == 3 and not (run.folder / "metrics.jsonl").exists()
    told = " ".join(result.stderr.split())
    assert "step 0: loss of the base is nan because of these validation rows: " in told
    assert re.findall(rf"{tmp_path}/(\S+) \(", told) == ["slsssl.jsonl:2", "slsssl.jsonl:6"]
    assert "overflow float32: if few rows do that, remove them" in told and "float16" not in told
    result, _ = overflow("ss", "many", f"data.validation={rows('l' * 20)}", *options)
    assert "because of validation rows such as " in result.stderr


def test_a_skipped_step_is_no_better_than_the_one_before_it(overflow: Any, rows: Any) -> None:
    """Of equal losses, the first is the best; the others use up early stopping's patience."""
    watching = (f"data.validation={rows('ss')}", "training.eval_steps=1", "training.early_stopping_patience=2")
    result, run = overflow("sllss", "skip", "training.on_nonfinite=skip", *watching)
    done(result)
    losses = run.column("loss", "validation")
    assert len(losses) == 4 and losses[1] == losses[2] == losses[3]
    assert run.info["result"]["best"] == {"step": 1, "loss": losses[1]}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_steps_that_are_not_logged_are_skipped_and_told_of_all_the_same(
    optim: str, overflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "READ_EVERY", 1000.0)
    options = (f"training.optim={optim}", "training.save_steps=null", "training.logging_steps=4")
    result, run = overflow("ssslssls", "skip", "training.on_nonfinite=skip", *options)
    done(result)
    assert result.stderr.count("was not taken") == 2 and run.info["result"]["skipped_steps"] == 2
    assert run.column("step") == [4, 8]
    _, without = overflow("ssssss", "without", *options)
    assert run.adapter_bytes == without.adapter_bytes
    two_rows = ("training.gradient_accumulation_steps=2", "training.max_steps=2")
    result, run = overflow("slss", "first", "training.on_nonfinite=skip", *options, *two_rows)
    assert "got no gradient" not in done(result).stderr, "of step 1, which was skipped, no layer did"
    assert run.info["result"]["skipped_steps"] == 1


def test_a_first_row_that_overflows_does_not_keep_the_adapter_from_being_verified(overflow: Any) -> None:
    result, run = overflow("lss", "skip", "training.on_nonfinite=skip")
    assert done(result) and run.info["result"]["skipped_steps"] == 1
    _, without = overflow("ss", "without")
    assert run.adapter_bytes == without.adapter_bytes


def test_many_first_rows_that_overflow_do_not_keep_the_adapter_from_being_verified(overflow: Any) -> None:
    shuffled = ("data.shuffle=true", "training.seed=1")
    result, run = overflow("l" * 12 + "s" * 24, "skip", "training.on_nonfinite=skip", *shuffled)
    assert done(result) and run.info["result"]["skipped_steps"] == 12
    assert run.adapter_bytes


def test_a_run_whose_only_logged_step_was_skipped_tells_no_loss(overflow: Any) -> None:
    result, run = overflow("sl", "skip", "training.on_nonfinite=skip", "training.logging_steps=2")
    assert "last loss" not in done(result).stdout
    assert run.losses == [None] and run.info["result"]["loss"] is None
    told = "1 step was skipped: loss or gradient was not finite"
    assert f"\n{told}\n" in result.stdout
    assert re.search(f"<td>2 steps in [^<;]+; {told}</td>", (run.folder / "report.html").read_text())


def test_a_broken_step_that_is_not_logged_ends_the_run_before_anything_is_made_of_it(
    overflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    original = loop.take_step

    def counted(trainer: Any, step: Any, rate: float) -> torch.Tensor:
        taken.append(step.number)
        return original(trainer, step, rate)

    monkeypatch.setattr(loop, "take_step", counted)
    for name, seconds, reading, last in (("late", 1000.0, "logging_steps=5", 4), ("soon", 0.0, "logging_steps=100", 3)):
        monkeypatch.setattr(loop, "READ_EVERY", seconds)
        taken.clear()
        result, run = overflow("sslssssss", name, "training.save_steps=2", f"training.{reading}")
        assert result.exit_code == 3 and "step 3 was not taken: loss is nan" in " ".join(result.stderr.split())
        assert taken[-1] == last and run.checkpoints == [2], "what is saved is read before"


class Noted(TorchDispatchMode):
    """Records operations. One that reads a tensor's value on the host waits until the GPU has computed it. On a CPU,
    this sees ``item`` and conditions on tensors, but not ``tolist``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, operation: Any, _: Any, arguments: Any = (), others: Any = None) -> Any:
        self.operations.add(operation.name())
        return operation(*arguments, **(others or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_waits_for_the_device(
    dtype: str, tiny_llama: Path, write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, noted = loop.take_step, Noted()

    def watched(*arguments: Any) -> torch.Tensor:
        with noted:
            return original(*arguments)

    monkeypatch.setattr(loop, "take_step", watched)
    model = {"name_or_path": tiny_llama, "dtype": dtype}
    adapter = {"target_modules": "all-linear"}
    recipe = write_recipe({"model": model, "adapter": adapter, "data.packing": True, "training.max_steps": 2})
    done(lora("train", recipe))
    assert "aten::_fused_adamw_" in noted.operations
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"} & noted.operations


def test_skipping_gives_up_after_five_in_a_row_also_across_a_resume(overflow: Any, lora: Any) -> None:
    result, run = overflow("sllllsllllls", "skip", "training.on_nonfinite=skip")
    assert result.exit_code == 3
    assert "5 steps in a row were skipped" in result.stderr
    assert "too high, or one of these rows\n" in result.stderr, "float16 and on_nonfinite: stop are not in use"
    assert run.column("step")[-1] == 10, "four in a row are borne, then one is taken"
    assert run.checkpoints == list(range(1, 11))
    again = lora("train", run.folder / "recipe.yaml", "--resume")
    assert again.exit_code == 3
    assert "step 11 was not taken" in again.stderr and "5 steps in a row" in again.stderr


def test_weights_that_the_last_step_breaks_are_not_kept(write_recipe: Any, tmp_path: Path, lora: Any) -> None:
    """The step's loss and gradient are those of the weights before the step, and are finite."""
    run = Run(tmp_path / "run")
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "max_steps": 1}
    for rows, told in ((None, "weight norm is inf"), (0.2, "validation loss is nan")):
        result = lora("train", write_recipe({"training": wild, "data.validation": rows}), "--overwrite")
        assert result.exit_code == 3
        assert f"step 1: {told}" in " ".join(result.stderr.split())
        assert run.checkpoints == [] and not (run.folder / "adapter").exists()


def test_a_learning_rate_beyond_all_bounds(write_recipe: Any, tmp_path: Path, lora: Any) -> None:
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "save_steps": None, "max_steps": 10}
    for policy, told in (("stop", "was not taken: loss is"), ("skip", "5 steps in a row were skipped")):
        run = Run(tmp_path / policy)
        result = lora("train", write_recipe({"training": wild | {"on_nonfinite": policy, "output_dir": run.folder}}))
        assert result.exit_code == 3
        assert told in result.stderr and "; there was no checkpoint yet; " in result.stderr
        assert not (run.folder / "adapter").exists()


THREADS = {
    "quantize": "concurrent.futures.thread.ThreadPoolExecutor.submit",
    "tokenizer": "transformers.AutoTokenizer.from_pretrained",
    "base": "transformers.AutoModelForCausalLM.from_pretrained",
}


@pytest.mark.parametrize("place", THREADS)
def test_a_refused_thread_is_no_bug_and_no_fault_of_the_model(
    place: str, tiny_gpt2: Path, qa_file: Path, tmp_path: Path, lora: Any, monkeypatch: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("can't start new thread")  # what Python says; the limit is not for root, as tests may run

    monkeypatch.setattr(THREADS[place], refuse)
    rest = ["--out", tmp_path / "out"] if place == "quantize" else ["--data", qa_file]
    result = lora("quantize" if place == "quantize" else "eval", tiny_gpt2, *rest)
    assert result.exit_code == 3 and "refused another thread" in result.stderr and "ulimit -u" in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_folder_for_temporary_files_is_no_riddle(write_recipe: Any) -> None:
    """torch cannot be imported without one."""
    ended = subprocess.run(
        [sys.executable, "-m", "lora_cli", "train", str(write_recipe())],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)),
    )
    assert ended.returncode == 3
    assert "No usable temporary directory" in ended.stderr and "set TMPDIR to a folder" in ended.stderr
