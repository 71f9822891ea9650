"""Trouble: signals, kills, failing writes; the folder stays whole and the run can be gone on with."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Run, done


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
