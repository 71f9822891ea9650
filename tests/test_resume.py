"""Resuming: a run stopped anywhere and resumed ends as if it had never stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import TRAIN_KEYS, Run, check_goes_on_alike, done, edit_json, edited_weights, write_rows
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from lora_cli.display import Display
from lora_cli.errors import RunError, UserError
from lora_cli.model.device import has_units_for
from lora_cli.recipe.load import load_recipe
from lora_cli.system.folders import draft_folder
from lora_cli.training import hidden_states, loop
from lora_cli.training.run import checkpoint
from lora_cli.training.run.run_folder import RunFolder
from lora_cli.training.run.same_run import check_same_keys
from lora_cli.weights.files import shards

EVERYTHING_RANDOM = {
    "adapter.lora_dropout": 0.2,
    "data": {"packing": True, "shuffle": True, "validation": 0.2},
    "training": {"max_steps": 7, "eval_steps": 3},
}


def test_the_recipe_alone_repeats_the_run(train: Callable[..., Run], tmp_path: Path, lora: Any) -> None:
    first = train(EVERYTHING_RANDOM)
    again = train(EVERYTHING_RANDOM)
    assert first.losses == again.losses
    assert first.adapter_bytes == again.adapter_bytes

    done(lora("train", first.folder / "recipe.yaml", f"training.output_dir={tmp_path / 'repeated'}"))
    assert Run(tmp_path / "repeated").adapter_bytes == first.adapter_bytes

    other = train(EVERYTHING_RANDOM | {"training.seed": 43})
    assert other.losses != first.losses
    assert other.adapter_bytes != first.adapter_bytes


CONSTANT = {"lr_scheduler_type": "constant"}
WIDE = {"r": 32, "target_modules": "all-linear", "lora_dropout": 0.1}  # large enough for 8-bit optimizer state
EXACT: dict[str, dict[str, Any]] = {
    "adamw_torch": {"training": {"optim": "adamw_torch"}},
    "adamw_torch_fused": {"training": {"optim": "adamw_torch_fused"}},
    "adamw_8bit": {"training": {"optim": "adamw_8bit"}, "adapter": WIDE},
    "paged_adamw_8bit": {"training": {"optim": "paged_adamw_8bit"}, "adapter": WIDE},
    "DoRA": {"adapter": {"use_dora": True}},
    "NF4": {"quantization.method": "nf4", "training": {"eval_steps": 1}},
    "early stopping": {
        "training": {"early_stopping_patience": 3, "eval_steps": 1, "learning_rate": 0.2, "max_steps": 25} | CONSTANT
    },
    "best at the end": {
        "training": {"load_best_model_at_end": True, "eval_steps": 1, "learning_rate": 0.05} | CONSTANT
    },
}


@pytest.mark.parametrize("case", EXACT)
def test_resume_is_exact_from_every_step(case: str, train: Callable[..., Run], tmp_path: Path) -> None:
    changes = dict(EXACT[case])
    training = {"max_steps": 7, "save_steps": 1, "eval_steps": 2, "warmup_steps": 0, "save_total_limit": None}
    data = {"packing": True, "shuffle": True, "validation": 0.2}
    training |= changes.pop("training", {})
    if case == "best at the end":  # tokens that training makes ever less likely
        rows = [{"question": "What does the lighthouse keeper do at night?", "answer": " 7 3 9 1 8 2 6 4"}] * 3
        data["validation"] = write_rows(tmp_path / "digits.jsonl", rows)
    whole = train({"adapter.lora_dropout": 0.1, "data": data, "training": training} | changes)
    last = whole.info["result"]["steps"]
    assert whole.checkpoints == list(range(1, last + 1))
    if case == "early stopping":
        assert 3 <= last < 25
    if case == "best at the end":
        assert whole.info["result"]["adapter_step"] < last
    for stopped in {1, last // 2, last - 1, last}:
        cut = check_goes_on_alike(whole, stopped, tmp_path / f"cut{stopped}")
        for key in ("steps", "adapter_step", "validation", "best", "base"):
            assert cut.info["result"][key] == whole.info["result"][key]


def test_evaluating_and_keeping_the_best_leave_training_as_it_is(
    train: Callable[..., Run], qa_file: Path, tmp_path: Path
) -> None:
    validation = tmp_path / "validation.jsonl"
    shutil.copy(qa_file, validation)
    random = {"adapter.lora_dropout": 0.1, "data": {"packing": True, "shuffle": True}}
    watching = {"eval_steps": 1, "early_stopping_patience": 9, "load_best_model_at_end": True, "save_total_limit": 1}
    alone = train({**random, "training.max_steps": 6})
    data = random["data"] | {"validation": validation}
    watched = train(random | {"data": data, "training": {"max_steps": 6} | watching})
    assert len(watched.lines("validation")) == 7
    for column in TRAIN_KEYS[:-2]:
        assert watched.column(column) == alone.column(column), column
    for name in ("weights.safetensors", "optimizer.safetensors", "random.safetensors"):
        path = Path("checkpoints", "step-00000006", name)
        assert (watched.folder / path).read_bytes() == (alone.folder / path).read_bytes(), name


@pytest.mark.parametrize("damage", ["truncated", "one bit", "no manifest"])
def test_resume_falls_back_to_the_newest_whole_checkpoint(
    damage: str, train: Callable[..., Run], tmp_path: Path, lora: Any
) -> None:
    whole = train({"training": {"max_steps": 4, "save_steps": 1, "save_total_limit": None}})
    cut = shutil.copytree(whole.folder, tmp_path / "cut")
    for step in (3, 4):
        torn = cut / "checkpoints" / f"step-{step:08d}"
        weights = bytearray((torn / "optimizer.safetensors").read_bytes())
        if damage == "truncated":
            (torn / "optimizer.safetensors").write_bytes(weights[: len(weights) // 2])
        elif damage == "one bit":
            weights[-1] ^= 1
            (torn / "optimizer.safetensors").write_bytes(weights)
        else:
            (torn / "manifest.json").unlink()
    (cut / "checkpoints" / ".step-00000004.abcdefgh.draft").mkdir()
    result = lora("train", cut / "recipe.yaml", f"training.output_dir={cut}", "--resume")
    done(result)
    assert result.stderr.count("is damaged and ignored") == 2
    resumed = Run(cut)
    assert resumed.column("loss") == whole.column("loss")
    assert resumed.adapter_bytes == whole.adapter_bytes
    assert resumed.checkpoints == [1, 2, 3, 4]
    assert not list((cut / "checkpoints").glob(".*"))


def test_a_checkpoint_that_cannot_be_read_at_the_moment_is_not_given_up(
    train: Callable[..., Run], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, on a network drive that is unavailable for a moment."""
    run = train()
    before, opened = files_of(run), Path.open

    def failing(path: Path, *how: Any, **more: Any) -> Any:
        if path.name == "state.json":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *how, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        result = lora("train", run.folder / "recipe.yaml", "training.max_steps=5", "--resume")
    assert result.exit_code == 3
    assert "the system refused: Input/output error" in result.stderr and "starting again" not in result.stderr
    kept = {
        path: held for path, held in files_of(run).items() if "checkpoints" in path.parts or path.suffix == ".jsonl"
    }
    assert kept.items() <= before.items() and len(kept) > 4
    done(lora("train", run.folder / "recipe.yaml", "training.max_steps=5", "--resume"))
    assert run.column("step") == [1, 2, 3, 4, 5]


def learned(run: Run) -> dict[Path, bytes]:
    """The contents, by path, of the files that hold a run's weights, progress and metrics."""
    kept = ("weights.safetensors", "state.json", "adapter_model.safetensors", "metrics.jsonl")
    return {path: held for path, held in files_of(run).items() if path.name in kept}


def test_a_record_that_cannot_be_read_at_the_moment_is_not_taken_for_no_run(
    train: Callable[..., Run], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train({"training.max_steps": 2})
    before, read_text = learned(run), Path.read_text
    for failing in range(1, 100):
        left = iter(range(failing, 0, -1))

        def stale(path: Path, *how: Any, **more: Any) -> str:
            if path.name == "run.json" and next(left, None) == 1:  # noqa: B023
                raise OSError(errno.ESTALE, "Stale file handle", str(path))
            return read_text(path, *how, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", stale)
            result = lora("train", run.folder / "recipe.yaml", "--resume")
        assert learned(run) == before, failing
        if result.exit_code == 0:
            break
        assert result.exit_code == 3
        assert f"{run.folder / 'run.json'}: the system refused: Stale file handle" in result.stderr
    assert failing > 5


def test_checkpoints_that_cannot_be_listed_at_the_moment_are_not_begun_over(
    train: Callable[..., Run], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train({"training.max_steps": 2})
    before = learned(run)
    listing = {name: getattr(os, name) for name in ("listdir", "scandir")}

    def failing(name: str) -> Callable[..., Any]:
        def refused(path: Any = ".") -> Any:
            if Path(str(path)).name == "checkpoints":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return listing[name](path)

        return refused

    with monkeypatch.context() as patch:
        for name in listing:
            patch.setattr(os, name, failing(name))
        result = lora("train", run.folder / "recipe.yaml", "--resume")
    assert result.exit_code == 3 and "the system refused: Permission denied" in result.stderr
    assert learned(run) == before


@pytest.mark.parametrize("place", [shards, checkpoint])
def test_a_checkpoint_whose_tensors_cannot_be_opened_at_the_moment_is_not_given_up(
    place: ModuleType, train: Callable[..., Run], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train({"training.max_steps": 2})
    before, file = learned(run), run.folder / STEP_2 / "weights.safetensors"
    name = "safe_open" if place is shards else "load_file"
    original = getattr(place, name)
    fault = FileNotFoundError("Too many open files") if place is shards else SafetensorError("Too many open files")

    def failing(path: Path, *how: Any, **more: Any) -> Any:
        if path == file:
            raise fault
        return original(path, *how, **more)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, failing)
        result = lora("train", run.folder / "recipe.yaml", "--resume")
    assert result.exit_code == 3
    assert f"{file}: could not be read: Too many open files" in result.stderr
    assert learned(run) == before


def test_a_copy_whose_metrics_reach_less_far_than_its_checkpoint_is_told_of(
    train: Callable[..., Run], lora: Any
) -> None:
    """``cp -r`` during a run makes such a copy, since it copies one file after the other."""
    steps = {"max_steps": 5, "logging_steps": 2, "eval_steps": 2, "lr_scheduler_type": "constant"}
    run = train({"training": steps, "data.validation": 0.2})
    kept = [line for split in ("train", "validation") for line in run.lines(split) if line["step"] < 3]
    assert "are missing" not in done(lora("train", run.folder / "recipe.yaml", "--resume")).stderr
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for more, last, loss in ((), 5, None), (["training.max_steps=6"], 6, "some"):
        result = done(lora("train", run.folder / "recipe.yaml", "--resume", *more))
        for split in ("train", "validation"):
            told = f"{split} lines of steps 3 to 5 are missing, and are not measured again"
            assert f"warning: {run.folder / 'metrics.jsonl'}: the {told}" in result.stderr
        assert run.info["result"]["steps"] == last
        assert run.info["result"]["loss"] == (run.losses[-1] if loss else None)
        assert ("last loss" in result.stdout) is (loss is not None)
    assert run.column("step") == [2, 6]
    (run.folder / "metrics.jsonl").unlink()
    done(lora("train", run.folder / "recipe.yaml", "--resume"))
    assert run.info["result"]["loss"] is None


def test_nothing_learned_is_begun_over_unasked(
    train: Callable[..., Run], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the run is mistaken for one that has not begun, a last check prevents its removal."""
    run = train({"training.max_steps": 2})
    before = learned(run)
    monkeypatch.setattr(RunFolder, "is_begun", False)
    result = lora("train", run.folder / "recipe.yaml", "--resume")
    assert result.exit_code == 3
    assert f"{run.folder}: the folder already holds a run's weights; nothing was removed" in result.stderr
    assert learned(run) == before


def test_a_draft_that_another_verb_is_writing_stays(train: Callable[..., Run], lora: Any) -> None:
    run = train()
    left = run.folder / ".merged.bcdefghi.draft"
    left.mkdir()
    with draft_folder(run.folder / "merged") as draft:
        done(lora("train", run.folder / "recipe.yaml", "--resume"))
        assert draft.is_dir() and not left.exists()


def test_a_draft_that_gets_its_name_as_drafts_are_removed_is_no_fault(
    train: Callable[..., Run], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, glob = train(), Path.glob

    def listed(folder: Path, pattern: str) -> list[Path]:
        return [*glob(folder, pattern), *([folder / ".merged.abcdefgh.draft"] if pattern == ".*" else [])]

    monkeypatch.setattr(Path, "glob", listed)
    done(lora("train", run.folder / "recipe.yaml", "--resume"))


STEP_2 = "checkpoints/step-00000002"
STRAY = ["checkpoints/.DS_Store", ".adapter.x", f"{STEP_2}/.ipynb_checkpoints/", f"{STEP_2}/notes.txt"]


@pytest.mark.parametrize("name", STRAY)
def test_resume_does_not_mind_what_others_leave_beside_its_files(
    name: str, train: Callable[..., Run], lora: Any
) -> None:
    run = train({"training": {"max_steps": 2, "save_steps": 1, "warmup_steps": 0}})
    (run.folder / name).mkdir() if name.endswith("/") else (run.folder / name).write_text("not lora's")
    result = done(lora("train", run.folder / "recipe.yaml", "training.max_steps=3", "--resume"))
    assert f"resumed from {run.folder / STEP_2}" in result.stderr
    assert "Traceback" not in result.stderr and "damaged" not in result.stderr
    assert run.column("step") == [1, 2, 3]
    assert (run.folder / name).exists()


@pytest.mark.parametrize("name", ["adapter", STEP_2, "metrics.jsonl", "train.log"])
def test_a_run_does_not_write_where_its_links_lead(
    name: str, write_recipe: Any, lora: Any, no_curves: None, tmp_path: Path
) -> None:
    """Somebody else's run may hold links to anything of this user's."""
    recipe = write_recipe({"training.max_steps": 2})
    done(lora("train", recipe))
    link, own = tmp_path / "run" / name, tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("the only copy")
    target = own if link.is_dir() else own / "thesis.txt"
    shutil.rmtree(link) if link.is_dir() else link.unlink()
    link.symlink_to(target)
    result = lora("train", recipe, "--resume", "training.max_steps=3")
    assert (result.exit_code, str(link) in result.stderr) == (2, True), result.stderr
    assert "symbolic link" in result.stderr
    done(lora("train", recipe, "--overwrite"))
    assert not link.is_symlink()
    assert [file.read_text() for file in own.iterdir()] == ["the only copy"]


def test_checkpoints_may_lie_on_another_disk(train: Callable[..., Run], tmp_path: Path, lora: Any) -> None:
    run = train({"training.save_steps": 1})
    link, moved = run.folder / "checkpoints", tmp_path / "large disk"
    shutil.move(link, moved)
    link.symlink_to(moved)
    last = run.checkpoints[-1]
    done(lora("train", run.folder / "recipe.yaml", "--resume", f"training.max_steps={last + 1}"))
    assert link.is_symlink() and run.checkpoints[-1] == last + 1


@pytest.mark.parametrize("name", [".recipe.yaml.new", ".run.json.new"])
def test_a_link_in_the_place_of_a_draft_is_refused(name: str, write_recipe: Any, lora: Any, tmp_path: Path) -> None:
    """A new run may begin in a folder with these drafts, which a killed one leaves."""
    (tmp_path / "thesis.txt").write_text("the only copy")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "thesis.txt")
    result = lora("train", write_recipe({"training.max_steps": 1}))
    assert result.exit_code == 2 and f"{name}: a symbolic link" in result.stderr, result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


def test_resume_does_not_count_a_checkpoint_that_is_not_whole(train: Callable[..., Run], lora: Any) -> None:
    run = train()
    shutil.copytree(run.folder / "checkpoints/step-00000004", run.folder / "checkpoints/step-00000099")
    result = done(lora("train", run.folder / "recipe.yaml", "--resume"))
    assert f"{run.folder / 'checkpoints/step-00000099'} is damaged and ignored" in result.stderr
    assert "resumed from" in result.stderr


@pytest.mark.parametrize(
    "torn", [b"\0" * 80, b"\0" * 80 + b"\n", b'{"step": 5, "sp' + b"\0" * 9 + b"\n", b'{"step": 5']
)
def test_what_a_loss_of_power_leaves_of_a_line_is_cut(torn: bytes, train: Callable[..., Run], lora: Any) -> None:
    run = train()
    whole = run.losses
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    done(lora("train", run.folder / "recipe.yaml", "--resume"))
    assert run.losses == whole


def with_its_sum(path: Path, content: str | bytes) -> None:
    """Write a file of a checkpoint, and its size and SHA-256 to the manifest."""
    written = content.encode() if isinstance(content, str) else content
    path.write_bytes(written)
    manifest = path.with_name("manifest.json")
    listed = json.loads(manifest.read_text())
    listed[path.name] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    manifest.write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "case", ["no state", "nested manifest", "state of another step", "other optimizer", "random", "another run's"]
)
def test_resume_tells_a_checkpoint_that_is_none(case: str, train: Callable[..., Run], lora: Any) -> None:
    run = train()
    folder = run.folder / "checkpoints" / "step-00000004"
    state = json.loads((folder / "state.json").read_text())
    if case == "no state":
        with_its_sum(folder / "state.json", "{}")
    elif case == "nested manifest":
        (folder / "manifest.json").write_text("[" * 100_000)
    elif case == "state of another step":
        with_its_sum(folder / "state.json", json.dumps(state | {"progress": state["progress"] | {"step": 3}}))
    elif case == "another run's":
        shutil.rmtree(folder)
        shutil.copytree(train({"adapter.r": 2}).folder / "checkpoints" / folder.name, folder)
    elif case == "other optimizer":
        with_its_sum(folder / "state.json", json.dumps(state | {"optimizer": {"999.step": 1}}))
    else:
        state["random"][0]["python"][1] = [1, 2, 3]
        with_its_sum(folder / "state.json", json.dumps(state))
    result = lora("train", run.folder / "recipe.yaml", "--resume")
    assert "Traceback" not in result.stderr and "bug in lora" not in result.stderr
    if case in ("other optimizer", "random"):
        assert result.exit_code == 2
        assert "the checkpoint of step 4 cannot be resumed from" in result.stderr
    elif case == "another run's":
        assert result.exit_code == 2 and "has another shape in the checkpoint" in result.stderr
    else:
        done(result)
        assert f"{folder} is damaged and ignored" in result.stderr


@pytest.mark.parametrize(
    ("optim", "key", "value", "told"),
    [
        ("adamw_torch_fused", "exp_avg_sq", torch.ones(1), "is of shape [1], not [64, 64]"),
        ("adamw_torch", "exp_avg", None, "is missing"),
        ("adamw_torch", "step", torch.ones(3), "is of shape [3], not []"),
        ("adamw_8bit", "state1", torch.ones(64, 63, dtype=torch.uint8), "is of shape [64, 63], not [64, 64]"),
        ("adamw_8bit", "absmax2", torch.ones(2), "is of shape [2], not [16]"),
        ("adamw_8bit", "qmap1", None, "is missing"),
    ],
)
def test_resume_refuses_an_optimizers_state_that_is_not_its_parameters(
    optim: str, key: str, value: torch.Tensor | None, told: str, train: Callable[..., Run], lora: Any
) -> None:
    run = train({"adapter.r": 64, "training": {"optim": optim, "max_steps": 2}})
    file = run.folder / "checkpoints" / "step-00000002" / "optimizer.safetensors"
    state = load_file(file)
    del state[f"0.{key}"]
    with_its_sum(file, save(state if value is None else state | {f"0.{key}": value}))
    result = lora("train", run.folder / "recipe.yaml", "--resume", "training.max_steps=3")
    assert result.exit_code == 2, result.stderr
    assert f"the checkpoint of step 2 cannot be resumed from: the optimizer's {key} of base_model" in result.stderr
    assert told in result.stderr


def test_a_gradient_scaler_goes_on_where_it_was() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.AdamW([weight], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    state = checkpoint.capture(checkpoint.Progress(step=3), [("weight", weight)], optimizer, scaler)
    assert scaler.get_scale() == 2.0
    fresh, other = torch.amp.GradScaler("cpu", init_scale=4.0), torch.nn.Parameter(torch.zeros(3))
    fresh.scale(torch.ones(()))
    checkpoint.restore(state, [("weight", other)], torch.optim.AdamW([other], lr=0.1), fresh, process=0)
    assert fresh.state_dict() == scaler.state_dict()
    assert fresh.get_scale() == 2.0
    assert torch.equal(other, weight)


def files_of(run: Run) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


def test_resume_refuses_another_run_with_all_its_changes(
    train: Callable[..., Run], write_recipe: Any, tiny_llama: Path, qa_file: Path, lora: Any
) -> None:
    run = train()
    before = files_of(run)
    other = {
        "model.name_or_path": tiny_llama,
        "quantization.method": "nf4",
        "adapter.r": 2,
        "data": {"train": shutil.copy(qa_file, qa_file.with_name("other.jsonl")), "shuffle": False},
        "training": {"output_dir": run.folder, "learning_rate": 0.1, "seed": 7, "optim": "adamw_8bit", "max_steps": 9}
        | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1},
    }
    result = lora("train", write_recipe(other), "--resume")
    assert result.exit_code == 2
    for told in (
        f"model.name_or_path was {run.info['base']['name_or_path']!r} and is now {str(tiny_llama)!r}",
        "quantization.method was null and is now 'nf4'",
        "adapter.r was 4 and is now 2",
        "data.shuffle was true and is now false",
        f"data.train was {str(qa_file)!r} and is now {str(qa_file.with_name('other.jsonl'))!r}",
        "training.learning_rate was 0.005 and is now 0.1",
        "training.seed was 42 and is now 7",
        "training.optim was 'adamw_torch_fused' and is now 'adamw_8bit'",
        "training.per_device_train_batch_size was 2 and is now 3",
        "training.gradient_accumulation_steps was 2 and is now 1",
    ):
        assert told in result.stderr
    assert "max_steps" not in result.stderr and "loading" not in result.stderr
    assert files_of(run) == before


OTHER_STEPS = {"weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_steps": 1, "lr_scheduler_type": "'linear'"}


def test_resume_refuses_whatever_makes_other_steps_of_the_same_rows(train: Callable[..., Run], lora: Any) -> None:
    run = train({"training.max_steps": 2})
    changes = [f"training.{key}={value}" for key, value in OTHER_STEPS.items()]
    result = lora("train", run.folder / "recipe.yaml", *changes, "adapter.lora_alpha=9", "--resume")
    assert result.exit_code == 2
    told = {f"training.{key}": value for key, value in OTHER_STEPS.items()} | {"adapter.lora_alpha": 9.0}
    for key, value in told.items():
        assert re.search(rf"--resume: {re.escape(key)} was \S+ and is now {value}", result.stderr), key


def test_resume_refuses_a_base_that_is_quantized_no_more(write_recipe: Any) -> None:
    quantized, plain = (load_recipe(write_recipe({"quantization": part})) for part in ({"method": "nf4"}, ...))
    with pytest.raises(UserError) as refused:
        check_same_keys(quantized, 1, plain, 1, "recipe.yaml")
    assert "quantization.method was 'nf4' and is now null" in refused.value.faults[0].what


def test_resume_refuses_a_row_that_is_now_of_another_source(
    train: Callable[..., Run], qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    """Rows and order are the same, but one row moves to the source that is taken twice per epoch."""
    rows = qa_file.read_text().splitlines(keepends=True)
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"

    def divide(at: int) -> None:
        for file, part in zip(files, (rows[:at], rows[at:]), strict=True):
            file.write_text("".join(part))

    divide(10)
    mixture = [{"path": str(file), "weight": weight} for file, weight in zip(files, (2.0, 1.0), strict=True)]
    run = train({"data.train": mixture, "training.max_steps": 1})
    divide(11)
    result = lora("train", run.folder / "recipe.yaml", "--resume", "training.max_steps=2")
    assert result.exit_code == 2
    assert "--resume: the training rows have changed since the run began" in result.stderr
    divide(10)
    done(lora("train", run.folder / "recipe.yaml", "--resume", "training.max_steps=2"))


@pytest.mark.parametrize("data", [{"packing": False}, {"packing": True, "shuffle": False}])
def test_resume_refuses_batches_that_would_take_other_rows(
    data: dict[str, Any], train: Callable[..., Run], lora: Any
) -> None:
    run = train({"data": data})
    half = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]
    result = lora("train", run.folder / "recipe.yaml", *half, "training.max_steps=5", "--resume")
    assert result.exit_code == 2
    assert "per_device_train_batch_size was 2 and is now 1" in result.stderr


@pytest.mark.parametrize(
    ("processes", "told"),
    [(2, "gradient_accumulation_steps=3 keeps it"), (4, "6 micro-batches; choose a number of processes that divides")],
)
def test_resume_in_other_processes_is_told_how(processes: int, told: str, write_recipe: Any) -> None:
    recipe = load_recipe(write_recipe({"training.gradient_accumulation_steps": 2}))
    with pytest.raises(UserError) as refused:
        check_same_keys(recipe, 3, recipe, processes, "run")
    assert told in str(refused.value.faults)


def test_resume_takes_smaller_batches_in_the_files_order(train: Callable[..., Run], lora: Any) -> None:
    whole, run = (train({"data": {"packing": False, "shuffle": False}, "training.max_steps": n}) for n in (6, 3))
    half = ["training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"]
    done(lora("train", run.folder / "recipe.yaml", *half, "training.max_steps=6", "--resume"))
    assert run.column("tokens") == whole.column("tokens")


def test_resume_takes_over_what_it_can_and_says_so(train: Callable[..., Run], write_recipe: Any, lora: Any) -> None:
    run = train({"training": {"max_steps": None, "num_train_epochs": 1.0, "save_steps": None, "warmup_steps": 0}})
    assert run.column("step") == list(range(1, 7))
    changes = {"output_dir": run.folder, "max_steps": None, "num_train_epochs": 2.0, "warmup_steps": 0}
    changes |= {"save_steps": 2, "save_total_limit": None, "logging_steps": 3, "gradient_checkpointing": True}
    result = done(lora("train", write_recipe({"training": changes}), "--resume"))
    for told in (
        "--resume: training.num_train_epochs was 1.0 and is now 2.0",
        "--resume: training.save_steps was null and is now 2",
        "--resume: training.save_total_limit was 2 and is now null",
        "--resume: training.logging_steps was 1 and is now 3",
        "--resume: training.gradient_checkpointing was 'auto' and is now true",
        "the cosine schedule now ends at step 12, not 6: from here on the learning rate differs",
    ):
        assert told in result.stderr
        assert told in (run.folder / "train.log").read_text()
    assert "warning: the cosine schedule now ends" in result.stderr  # -q keeps warnings
    assert run.column("step") == [*range(1, 7), 9, 12]
    assert run.checkpoints == [6, 8, 10, 12]
    assert run.column("learning_rate")[-2:] == pytest.approx(
        [0.005 * (1 + math.cos(math.pi * step / 12)) / 2 for step in (8, 11)]
    )
    assert re.match(r"12 steps, the last 6 in [\d.]+ s, last loss ", result.stdout)
    again = done(lora("train", run.folder / "recipe.yaml", "--resume"))
    assert "was" not in again.stderr and again.stdout.startswith("12 steps, all taken before, last loss ")
    assert "<td>12 steps, all taken before</td>" in (run.folder / "report.html").read_text()


def test_resume_refuses_fewer_steps_than_were_taken(train: Callable[..., Run], lora: Any) -> None:
    run = train()
    before = files_of(run)
    result = lora("train", run.folder / "recipe.yaml", "training.max_steps=3", "--resume")
    assert result.exit_code == 2
    assert "the run has taken 4 steps already, and 3 are asked for" in result.stderr
    assert files_of(run) == before


def test_resume_computes_in_the_type_it_began_in(train: Callable[..., Run], lora: Any) -> None:
    run = train()
    refused = lora("train", run.folder / "recipe.yaml", "--resume", "training.max_steps=6", "model.dtype=bfloat16")
    assert refused.exit_code == 2
    assert "began in float32, but would continue in bfloat16" in refused.stderr and "loading" not in refused.stderr
    assert "model.dtype=float32" in refused.stderr
    told = lora("train", run.folder / "recipe.yaml", "--resume", "training.max_steps=6", "model.dtype=auto")
    assert told.exit_code == (2 if has_units_for(torch.bfloat16, torch.device("cpu")) else 0), told.stderr


def test_resume_refuses_changed_rows_and_another_base_before_loading_it(
    train: Callable[..., Run], tiny_gpt2: Path, qa_file: Path, tmp_path: Path, lora: Any
) -> None:
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    validation = tmp_path / "validation.jsonl"
    shutil.copy(qa_file, validation)
    run = train({"model.name_or_path": base, "data.validation": validation})
    before = files_of(run)
    with edited_weights(base) as weights:
        weights["transformer.h.1.attn.c_attn.weight"][0, 0] += 1
    for file in (qa_file, validation):
        file.write_text(file.read_text().replace("lamp", "lamb", 1))
    result = lora("train", run.folder / "recipe.yaml", "--resume")
    assert result.exit_code == 2
    for what in ("the base model's weights or config.json have", "the training rows have", "the validation rows have"):
        assert f"--resume: {what} changed since the run began" in result.stderr
    assert "loading" not in result.stderr
    assert files_of(run) == before


def test_a_run_knows_the_adapter_that_it_began_with(
    train: Callable[..., Run], write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    """Records, model card and ``adapters show`` name it, and a run that was stopped goes on from no other."""
    start = shutil.copytree(train({"training.max_steps": 1}).folder / "adapter", tmp_path / "start")
    run = train({"adapter.init_from": start, "training.max_steps": 1})
    file = start / "adapter_model.safetensors"
    known = {"name_or_path": str(start), "fingerprint": hashlib.sha256(file.read_bytes()).hexdigest()}
    record = json.loads((run.folder / "adapter" / "provenance.json").read_text())
    assert run.info["init_from"] == record["init_from"] == known
    told = f"Training began with the adapter `{start.name}` (SHA-256 `{known['fingerprint'][:16]}`)."
    card = (run.folder / "adapter" / "README.md").read_text()
    assert told in card and str(tmp_path) not in card
    assert re.search(rf"^began with: +{start}$", done(lora("adapters", "show", run.folder)).stdout, re.MULTILINE)

    shutil.rmtree(run.folder / "checkpoints")
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    before = files_of(run)
    result = lora("train", run.folder / "recipe.yaml", "--resume")
    assert result.exit_code == 2 and "loading" not in result.stderr
    assert "--resume: the adapter of init_from has changed since the run began" in result.stderr
    assert files_of(run) == before


def test_a_continued_run_begins_where_the_first_ended(
    train: Callable[..., Run], write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    """Step 0 is what training begins with; the base's score is told beside it, also after a resume."""
    changes = {"data.validation": 0.3, "training.learning_rate": 0.01, "training.save_steps": 1}
    first = train(changes)
    folder = tmp_path / "second"
    recipe = write_recipe(changes | {"adapter.init_from": first.folder, "training.output_dir": folder})
    outcome = done(lora("train", recipe))
    second, before = Run(folder), first.info["result"]
    result = second.info["result"]
    assert before["start"] is None and before["base"]["loss"] > before["validation"]["loss"] + 0.05
    assert result["start"] == pytest.approx(before["validation"], rel=1e-6)
    assert result["base"] == before["base"]
    assert second.column("loss", "validation")[0] == result["start"]["loss"]
    base, start, tuned = (f"{result[name]['perplexity']:.2f}" for name in ("base", "start", "validation"))
    assert f"validation perplexity {start} -> {tuned} (base {base})" in outcome.stdout
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"Training began with the adapter `{first.folder.name}` (" in card and str(tmp_path) not in card
    assert re.search(rf"\| with the adapter of init_from \| [\d.]+ \| {start} \|", card)
    assert re.search(rf"<td>with the adapter of init_from</td>.*{start}</td>", (folder / "report.html").read_text())

    shown = done(lora("adapters", "show", folder)).stdout
    assert re.search(rf"^validation loss: .*, start {result['start']['loss']:.4f}, best", shown, re.MULTILINE)
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    done(lora("train", recipe, "--resume"))
    assert second.info["result"]["start"] == result["start"]


def one_number(base: Path) -> None:
    """Change a single element of the embedding."""
    with edited_weights(base) as weights:
        weights["transformer.wte.weight"][100, 7] = 0


def in_other_files(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    names = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(weights)}
    for file in set(names.values()):
        save_file({name: weights[name] for name in names if names[name] == file}, base / file, {"format": "pt"})
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


OTHER_BASES: dict[str, Callable[[Path], None]] = {
    "another epsilon": lambda base: edit_json(base / "config.json", layer_norm_epsilon=0.5),
    "other heads": lambda base: edit_json(base / "config.json", n_head=2),
    "one number": one_number,
}
SAME_BASES: dict[str, Callable[[Path], None]] = {
    "notes": lambda base: edit_json(
        base / "config.json",
        use_cache=False,
        transformers_version="4.0",
        _name_or_path="x",
        torch_dtype="float32",
        task_specific_params={"dtype": "float32"},
    ),
    "files": in_other_files,
}


@pytest.mark.parametrize("change", [*OTHER_BASES, *SAME_BASES])
def test_the_base_is_known_by_all_its_numbers(
    change: str, train: Callable[..., Run], tiny_gpt2: Path, tmp_path: Path, lora: Any
) -> None:
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    edit_json(base / "config.json", task_specific_params={})
    run = train({"model.name_or_path": base, "training.max_steps": 2})
    (OTHER_BASES | SAME_BASES)[change](base)
    resumed = lora("train", run.folder / "recipe.yaml", "--resume", "training.max_steps=3")
    merged = lora("merge", run.folder, "--out", tmp_path / "merged", "--no-verify")
    if change in SAME_BASES:
        assert done(resumed) and done(merged)
        return
    assert resumed.exit_code == merged.exit_code == 2
    assert "the base model's weights or config.json have changed since the run began" in resumed.stderr
    assert "weights or config.json" in merged.stderr and "not those it was trained on" in merged.stderr
    assert run.column("step") == [1, 2]


@pytest.mark.parametrize("left", ["a draft", "a record", "another run's checkpoints"])
def test_resume_begins_where_a_run_was_killed_before_it_began(
    left: str, train: Callable[..., Run], write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    whole = train()
    killed = Run(tmp_path / "killed")
    shutil.copytree(whole.folder, killed.folder)
    for path in killed.folder.iterdir():
        if left == "a draft" or (left == "a record" and path.name != "run.json") or path.name == "recipe.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (killed.folder / ".run.json.new").write_text("{")
    (killed.folder / ".recipe.yaml.new").touch()
    done(lora("train", write_recipe({"training": {"output_dir": killed.folder, "seed": 7}}), "--resume"))
    anew = train({"training.seed": 7})
    assert killed.losses == anew.losses != whole.losses
    assert killed.adapter_bytes == anew.adapter_bytes
    assert not list(killed.folder.glob(".*"))


def test_killed_between_record_and_recipe(
    train: Callable[..., Run], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with four batches per step was to resume on two processes: run.json says so, recipe.yaml does not yet."""
    run = train({"training": {"gradient_accumulation_steps": 4, "max_steps": 2}})
    whole = train({"training": {"gradient_accumulation_steps": 4, "max_steps": 3}})
    edit_json(run.folder / "run.json", processes=2, gradient_accumulation_steps=2, finished=None)
    recipe, more = run.folder / "recipe.yaml", ["--resume", "training.max_steps=3", "training.lr_scheduler_type=cosine"]

    def checked(accumulation: int, processes: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        RunFolder(run.folder).check(
            load_recipe(recipe, [f"training.gradient_accumulation_steps={accumulation}"]), True, False
        )

    checked(2, processes=2)
    checked(4, processes=1)
    for accumulation, processes in ((4, 2), (2, 1)):
        with pytest.raises(UserError, match="gradient_accumulation_steps"):
            checked(accumulation, processes)
    monkeypatch.delenv("WORLD_SIZE")
    done(lora("train", recipe, *more))
    assert run.column("tokens") == whole.column("tokens")
    assert run.info["processes"] == 1 and run.info["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize(
    "killed_in", ["RunFolder.write_info", "mark_for_removal", "clear_drafts", "RunFolder.write_recipe", "sync"]
)
def test_a_run_killed_as_it_replaces_another_begins_again(
    killed_in: str, train: Callable[..., Run], write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train()
    recipe = write_recipe({"training": {"output_dir": run.folder, "seed": 7, "max_steps": 2}})

    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killing:
        killing.setattr(f"lora_cli.training.run.run_folder.{killed_in}", kill)
        lora("train", recipe, "--overwrite")
    assert not ((run.folder / "report.html").exists() and killed_in == "RunFolder.write_recipe")
    again = lora("train", recipe, "--resume")
    if killed_in == "clear_drafts":  # called first: the former run is unchanged
        assert again.exit_code == 2 and "training.seed was 42 and is now 7" in again.stderr
    else:
        done(again)
        assert run.info["seed"] == 7 and len(run.losses) == 2
        assert not list(run.folder.rglob(".*"))


@pytest.mark.parametrize("left", ["checkpoints", "adapter"])
def test_resume_leaves_a_run_alone_that_lost_its_recipe(
    left: str, train: Callable[..., Run], write_recipe: Any, lora: Any
) -> None:
    run = train()
    shutil.rmtree(run.folder / ("adapter" if left == "checkpoints" else "checkpoints"))
    (run.folder / "recipe.yaml").unlink()
    before = files_of(run)
    recipe = write_recipe({"training.output_dir": run.folder})
    refused = lora("train", recipe, "--resume")
    assert refused.exit_code == 2
    assert f"{run.folder / 'recipe.yaml'}: --resume: the run's recipe.yaml is missing" in refused.stderr
    assert "restore it from a copy" in refused.stderr and "--overwrite" in refused.stderr
    assert files_of(run) == before
    done(lora("train", recipe, "--overwrite"))


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_only_names_of_the_tools_own_are_cleared_away(
    how: str, train: Callable[..., Run], write_recipe: Any, lora: Any
) -> None:
    run = train()
    own = [".adapter.abcdefgh.draft", ".adapter.abcdefgh.draft.former", "checkpoints/.step-00000001.old.draft"]
    others = [".adapter.backup", ".adapter.original", "checkpoints/.step-00000004.mine"]
    for name in own + (others if how == "--resume" else others[:2]):
        (run.folder / name).mkdir()
    (run.folder / ".adapter.x").write_text("mine")
    done(lora("train", write_recipe({"training.output_dir": run.folder}), how))
    left = {str(path.relative_to(run.folder)) for path in run.folder.rglob(".*")}
    assert left == {".adapter.x", *(others if how == "--resume" else others[:2])}


# --- the best step ---------------------------------------------------------------------------------------------------


@pytest.fixture
def worsening(tmp_path: Path) -> dict[str, Any]:
    """Changes for a run that is best at step 7 of 12 on any CPU: what it learns later is wrong on validation rows."""
    rows = [{"question": "Who mends the nets?", "answer": f" {n}{n + 1}{n + 2}"} for n in range(6)]
    file = write_rows(tmp_path / "numbers.jsonl", rows)
    steps = {"max_steps": 12, "eval_steps": 1, "learning_rate": 0.03, "save_steps": None, "warmup_steps": 0}
    return {"data.validation": file, "training": steps | CONSTANT}


def changed(changes: dict[str, Any], **training: Any) -> dict[str, Any]:
    return changes | {"training": changes["training"] | training}


Twice = Callable[[dict[str, Any]], tuple[Run, Run, Path]]


@pytest.fixture
def twice(train: Callable[..., Run], write_recipe: Any, tmp_path: Path) -> Twice:
    """Trains an undisturbed run, and returns it with the folder and the recipe for a second run of the same."""

    def make(changes: dict[str, Any]) -> tuple[Run, Run, Path]:
        run = Run(tmp_path / "stopped")
        return train(changes), run, write_recipe(changed(changes, output_dir=run.folder), name="stopped.yaml")

    return make


def assert_same_end(run: Run, whole: Run) -> None:
    assert run.lines("validation") == whole.lines("validation")
    assert run.info["result"]["best"] == whole.info["result"]["best"]
    assert run.adapter_bytes == whole.adapter_bytes


def checkpoint_weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    stored = load_file(run.folder / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")
    return {name.replace(".default.", "."): tensor for name, tensor in stored.items()}


def test_the_best_steps_weights_are_taken_when_asked(
    worsening: dict[str, Any], train: Callable[..., Run], lora: Any
) -> None:
    last = train(worsening)
    best = train(changed(worsening, load_best_model_at_end=True, save_total_limit=1))
    scores = best.column("loss", "validation")
    assert last.column("loss", "validation") == scores
    at = scores.index(min(scores[1:]))
    assert at < 12, "the run has to get worse"
    assert best.checkpoints == [at, 12], "the newest and the best"
    assert best.tensors.keys() == checkpoint_weights(best, at).keys()
    assert all(torch.equal(best.tensors[name], weight) for name, weight in checkpoint_weights(best, at).items())
    told = done(lora("train", best.folder / "recipe.yaml", "--resume")).stdout
    assert f"the adapter has the weights of step {at}, the best\n" in told
    assert all(torch.equal(last.tensors[name], weight) for name, weight in checkpoint_weights(best, 12).items())
    result, other = best.info["result"], last.info["result"]
    assert (result["adapter_step"], result["validation"]["loss"]) == (at, scores[at])
    assert (other["adapter_step"], other["validation"]["loss"]) == (12, scores[12])
    assert f"step {at:,}, which had the lowest validation loss" in (best.folder / "adapter" / "README.md").read_text()
    assert f"weights of step {at}" in (best.folder / "report.html").read_text()


def test_the_best_survives_a_stop(
    worsening: dict[str, Any], train: Callable[..., Run], write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    changes = changed(worsening, load_best_model_at_end=True, save_total_limit=1)
    whole = train(changes)
    best = whole.info["result"]["adapter_step"]
    assert best < 10, "the run has to get worse"
    stopped = Run(tmp_path / "stopped")
    recipe = write_recipe(changed(changes, output_dir=stopped.folder, max_steps=best + 2), name="stopped.yaml")
    done(lora("train", recipe))
    done(lora("train", recipe, "training.max_steps=12", "--resume"))
    assert stopped.info["result"]["best"] == whole.info["result"]["best"]
    assert stopped.adapter_bytes == whole.adapter_bytes
    assert stopped.checkpoints == [best, 12]


@pytest.mark.parametrize(
    ("stop", "end", "further"),
    [
        (3, "training.max_steps=3", "training.max_steps=12"),
        (11, "training.early_stopping_patience=1", "training.early_stopping_patience=null"),
    ],
)
def test_a_step_that_turns_out_to_be_the_last_is_evaluated(
    stop: int,
    end: str,
    further: str,
    worsening: dict[str, Any],
    twice: Twice,
    lora: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run stops at a step without an evaluation, is resumed with this step as its last, and then resumed further."""
    changes = changed(worsening, eval_steps=2)
    whole, run, recipe = twice(changes)

    def advance(_: Any, step: int) -> None:
        if step == stop:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "advance", advance)
        assert lora("train", recipe).exit_code == 130
    assert run.checkpoints == [stop]
    evaluated, batch_of = run.column("step", "validation"), hidden_states.batch_of
    with monkeypatch.context() as patch:
        patch.setattr(
            hidden_states, "batch_of", lambda *given: (signal.raise_signal(signal.SIGTERM), batch_of(*given))[1]
        )
        assert lora("train", recipe, end, "--resume").exit_code == 143, "stopped again, as it evaluates"
    for _ in range(2):
        done(lora("train", recipe, end, "--resume"))
        assert run.column("step", "validation") == [*evaluated, stop]
        measured = done(lora("eval", run.folder, "--data", changes["data.validation"], "--json")).json["loss"]
        told = run.info["result"]["validation"]["loss"]
        assert told == run.column("loss", "validation")[-1] == pytest.approx(measured, rel=1e-5)
        assert f"| with adapter | {told:.4f} |" in (run.folder / "adapter" / "README.md").read_text()

    done(lora("train", run.folder / "recipe.yaml", further, "--resume"))
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    ("stop", "number"), [(0, signal.SIGTERM), (2, signal.SIGHUP), (4, signal.SIGINT), (6, signal.SIGTERM)]
)
def test_an_evaluation_stops_and_is_made_again(
    stop: int,
    number: int,
    worsening: dict[str, Any],
    twice: Twice,
    lora: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An evaluation may take longer than the sender of the signal waits. Step 6 is the last."""
    steps = {"max_steps": 6, "eval_steps": 2, "per_device_train_batch_size": 1, "load_best_model_at_end": True}
    whole, run, recipe = twice(changed(worsening, **steps))
    batch_of, seen = hidden_states.batch_of, []

    def batch(trainer: Any, part: str, rows: Any) -> Any:
        seen.append(part)
        if part == "validation" and seen.count("train") == 2 * stop and seen[-2:-1] != ["validation"]:
            signal.raise_signal(number)
            if number == signal.SIGHUP:  # sent by a shell that ends, and again by the system
                signal.raise_signal(number)
        return batch_of(trainer, part, rows)

    with monkeypatch.context() as patch:
        patch.setattr(hidden_states, "batch_of", batch)
        result = lora("train", recipe)
    assert result.exit_code == 128 + number, result.stderr
    assert ("stopped before the first step" if stop == 0 else f"stopped after step {stop}, checkpoint") in result.stderr
    assert seen[-2:] == (["train", "validation"] if stop else ["validation"])
    assert stop == 0 or run.column("step", "validation") == list(range(0, stop, 2))
    done(lora("train", recipe, "--resume"))
    assert_same_end(run, whole)


def test_a_damaged_best_checkpoint_writes_no_adapter(
    worsening: dict[str, Any], train: Callable[..., Run], lora: Any
) -> None:
    run = train(changed(worsening, load_best_model_at_end=True))
    best = run.info["result"]["adapter_step"]
    path = run.folder / "checkpoints" / f"step-{best:08d}"
    (path / "weights.safetensors").write_bytes(b"")
    shutil.rmtree(run.folder / "adapter")
    result = lora("train", run.folder / "recipe.yaml", "--resume")
    assert result.exit_code == 3
    assert f"{path}, the best so far, is missing or damaged" in result.stderr
    assert f"{path}: the best step's checkpoint is missing or damaged" in result.stderr
    assert not (run.folder / "adapter").exists()
    assert run.checkpoints == [best, 12]

    done(lora("train", run.folder / "recipe.yaml", "training.load_best_model_at_end=false", "--resume"))
    assert run.info["result"]["adapter_step"] == 12
    assert all(torch.equal(run.tensors[name], weight) for name, weight in checkpoint_weights(run, 12).items())


def test_early_stopping(train: Callable[..., Run]) -> None:
    run = train(
        {
            "data.validation": 0.2,
            "training": {"max_steps": 40, "eval_steps": 1, "early_stopping_patience": 3, "learning_rate": 1.0},
        }
    )
    scores = run.column("loss", "validation")[1:]
    best = scores.index(min(scores))
    assert len(scores) == best + 1 + 3 < 40
    assert run.info["result"]["best"] == {"step": best + 1, "loss": min(scores)}
    assert run.info["result"]["steps"] == len(scores)
    assert run.checkpoints[-1] == len(scores)


def test_the_step_at_which_early_stopping_ends_a_run_is_logged(train: Callable[..., Run]) -> None:
    patient = {"max_steps": 40, "eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 1.0}
    every = train({"data.validation": 0.2, "training": patient})
    seldom = train({"data.validation": 0.2, "training": patient | {"logging_steps": 100}})
    steps = seldom.info["result"]["steps"]
    assert 2 < steps < 40
    assert seldom.column("step")[-1] == steps and 1 not in seldom.column("step")
    assert seldom.info["result"]["loss"] == seldom.losses[-1] == every.losses[-1] == every.info["result"]["loss"]


def test_an_early_stop_stays_stopped(train: Callable[..., Run], lora: Any) -> None:
    patient = {"max_steps": 40, "eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 1.0}
    run = train({"data.validation": 0.2, "training": patient})
    before, losses = run.adapter_bytes, run.losses
    done(lora("train", run.folder / "recipe.yaml", "--resume"))
    assert (run.adapter_bytes, run.losses) == (before, losses)


def test_early_stopping_keeps_the_last_weights_says_so_and_gives_the_best_when_asked(
    worsening: dict[str, Any], write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    run = Run(tmp_path / "run")
    recipe = write_recipe(changed(worsening, max_steps=40, early_stopping_patience=3, save_total_limit=1))
    result = done(lora("train", recipe))
    scores = run.column("loss", "validation")
    best = scores.index(min(scores[1:]))
    assert run.info["result"]["adapter_step"] == best + 3 == len(scores) - 1
    assert run.checkpoints == [best, best + 3]
    hint = f"--resume training.load_best_model_at_end=true takes those of step {best}, the best"
    assert f"the adapter has the weights of step {best + 3}, the last; {hint}" in result.stderr

    done(lora("train", recipe, "training.load_best_model_at_end=true", "--resume"))
    assert run.info["result"]["validation"]["loss"] == scores[best]
    assert all(torch.equal(run.tensors[name], weight) for name, weight in checkpoint_weights(run, best).items())


def test_a_best_needs_validation_rows(write_recipe: Any, lora: Any) -> None:
    result = lora("train", write_recipe({"training.load_best_model_at_end": True}))
    assert result.exit_code == 2
    assert "load_best_model_at_end: needs data.validation" in result.stderr


def test_a_finished_run_that_is_resumed_keeps_as_many_checkpoints_as_asked_for_now(
    train: Callable[..., Run], lora: Any
) -> None:
    run = train({"training": {"save_steps": 1, "save_total_limit": None}})
    done(lora("train", run.folder / "recipe.yaml", "training.save_total_limit=1", "--resume"))
    assert run.checkpoints == [4]


def test_a_damaged_checkpoint_takes_no_whole_ones_place(
    train: Callable[..., Run], lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train({"training": {"save_steps": 1, "save_total_limit": 3}})
    (run.folder / "checkpoints/step-00000004/manifest.json").unlink()

    def fail(*_: Any) -> None:
        raise RunError("the power is gone")

    monkeypatch.setattr(loop, "take_step", fail)
    assert lora("train", run.folder / "recipe.yaml", "training.save_total_limit=2", "--resume").exit_code == 3
    assert run.checkpoints == [2, 3]


def test_a_run_gone_on_with_began_when_it_began(train: Callable[..., Run], lora: Any) -> None:
    run = train({"training.max_steps": 1, "training.lr_scheduler_type": "constant"})
    began = "2020-02-02T20:20:20+00:00"
    edit_json(run.folder / "run.json", started=began)
    done(lora("train", run.folder / "recipe.yaml", "--resume", "training.max_steps=2"))
    assert run.info["started"] == began < run.info["finished"] and run.info["steps"] == 2
