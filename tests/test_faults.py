"""Trouble: signals, kills, failing writes; the folder stays whole and the run can be gone on with."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, done
from safetensors.torch import load_file, save_file


def test_a_signal_stops_with_a_checkpoint(write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None) -> None:
    steps = 1_000_000
    endless = {"max_steps": steps, "save_steps": None, "lr_scheduler_type": "constant"}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    children = []
    for kind, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        run = Run(tmp_path / str(code))
        recipe = write_recipe({"training": {**endless, "output_dir": run.folder}}, name=f"{code}.yaml")
        command = [sys.executable, "-m", "lora_cli", "train", str(recipe)]
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        children.append((kind, code, run, recipe, child))
    until = time.monotonic() + 120
    for kind, code, run, recipe, child in children:
        try:
            while not (run.folder / "metrics.jsonl").exists() and child.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
            child.send_signal(kind)
            stdout, stderr = child.communicate(timeout=60)
        finally:
            child.kill()
        assert child.returncode == code, stderr
        assert stdout == ""
        assert "--resume" in stderr and "Traceback" not in stderr
        before = run.losses
        stopped = len(before)
        assert run.checkpoints == [stopped] and 0 < stopped < steps
        assert run.info["finished"] is None
        assert not (run.folder / "adapter").exists()

        done(lora("train", recipe, f"training.max_steps={stopped + 2}", "--resume"))
        assert run.losses[:stopped] == before
        assert run.column("step") == list(range(1, stopped + 3))
        assert run.info["finished"] is not None
        assert (run.folder / "adapter" / "adapter_model.safetensors").is_file()


def test_a_killed_run_goes_on_exactly_and_its_folder_is_its_own(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    run = Run(tmp_path / "killed")
    changes = {"save_steps": 2, "save_total_limit": 2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    endless = {**changes, "max_steps": 1_000_000, "output_dir": run.folder}
    recipe = write_recipe({"training": endless, "adapter.lora_dropout": 0.1}, name="killed.yaml")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, "-m", "lora_cli", "train", str(recipe), "--quiet"]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while not (run.folder / "checkpoints" / "step-00000004").exists() and time.monotonic() < until:
            time.sleep(0.02)
        for flag in ("--resume", "--overwrite"):
            refused = lora("train", recipe, flag)
            assert refused.exit_code == 2
            assert "another run is at work in this folder" in refused.stderr
    finally:
        child.kill()
        child.wait()

    reached = max(run.checkpoints)
    done(lora("train", recipe, f"training.max_steps={reached + 3}", "--resume"))
    undisturbed = Run(tmp_path / "undisturbed")
    changes |= {"max_steps": reached + 3, "output_dir": undisturbed.folder}
    done(lora("train", write_recipe({"training": changes, "adapter.lora_dropout": 0.1}, name="undisturbed.yaml")))
    assert run.column("step") == list(range(1, reached + 4))
    assert run.losses == undisturbed.losses
    assert run.adapter_bytes == undisturbed.adapter_bytes


def test_a_failing_write_leaves_earlier_checkpoints_whole(
    write_recipe: Any, train: Callable[..., Run], tmp_path: Path, lora: Any, no_curves: None
) -> None:
    changes = {"max_steps": 4, "save_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = train({"training": changes})
    run = Run(tmp_path / "full")
    recipe = write_recipe({"training": changes | {"max_steps": 2, "output_dir": run.folder}}, name="full.yaml")
    done(lora("train", recipe))
    size = (run.folder / "checkpoints" / "step-00000002" / "optimizer.safetensors").stat().st_size

    command = [sys.executable, "-m", "lora_cli", "train", str(recipe), "training.max_steps=4", "--resume"]
    refused = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1)),
    )
    assert refused.returncode == 3, refused.stderr
    assert f"{run.folder / 'checkpoints' / 'step-00000004'}: could not be written" in refused.stderr
    assert run.checkpoints == [2]

    done(lora("train", recipe, "training.max_steps=4", "--resume"))
    assert run.losses == whole.losses
    assert run.adapter_bytes == whole.adapter_bytes


# --- numbers that are none -------------------------------------------------------------------------------------------

SHORT, LONG = 30, 60  # tokens: a row up to SHORT is harmless, one of LONG reaches the position that overflows


@pytest.fixture(scope="module")
def overflowing(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_gpt2 whose positions beyond SHORT are so large that their sum is no float32 any more."""
    folder = tmp_path_factory.mktemp("models") / "overflowing"
    shutil.copytree(tiny_gpt2, folder)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"][SHORT + 1 :] = 3e38
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def rows(tmp_path: Path, tokenizer: Any) -> Callable[..., Path]:
    """Writes rows of plain text, "s" for a short one and "l" for one that overflows."""

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
    """Trains one row a step, in the file's order, on rows of these kinds; gives the result and the run."""

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


def test_a_step_that_overflows_ends_the_run_before_the_optimizer_sees_it(overflow: Any) -> None:
    result, run = overflow("ssslss", "stop")
    assert result.exit_code == 3
    message = " ".join(result.stderr.split())
    assert "step 4 was not taken: loss is nan" in message
    assert "its rows are 4 (Row l0 of the sea" in message
    assert "training.learning_rate is too high" in message and "training.on_nonfinite: skip" in message
    assert run.checkpoints == [1, 2, 3]
    assert run.column("step") == [1, 2, 3]
    assert not (run.folder / "adapter").exists()


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


def test_skipping_gives_up_after_five_in_a_row_also_across_a_resume(overflow: Any, lora: Any) -> None:
    result, run = overflow("sllllsllllls", "skip", "training.on_nonfinite=skip")
    assert result.exit_code == 3
    assert "5 steps in a row were skipped" in result.stderr
    assert run.column("step")[-1] == 10, "four in a row are borne, then one is taken"
    assert run.checkpoints == list(range(1, 11))
    again = lora("train", run.folder / "recipe.yaml", "--resume")
    assert again.exit_code == 3
    assert "step 11 was not taken" in again.stderr and "5 steps in a row" in again.stderr


def test_a_learning_rate_beyond_all_bounds(write_recipe: Any, tmp_path: Path, lora: Any) -> None:
    wild = {"learning_rate": 1e30, "warmup_steps": 0, "save_steps": None, "max_steps": 10}
    for policy, told in (("stop", "was not taken: loss is"), ("skip", "5 steps in a row were skipped")):
        run = Run(tmp_path / policy)
        result = lora("train", write_recipe({"training": wild | {"on_nonfinite": policy, "output_dir": run.folder}}))
        assert result.exit_code == 3
        assert told in result.stderr
        assert not (run.folder / "adapter").exists()
