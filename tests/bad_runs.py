"""Run folders that cannot be written or resumed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from bad_input import ROW, Arguments, World, case


@case("File name too long", "choose another name")
def output_of_too_long_a_name(w: World) -> Arguments:
    return w.train({"training.output_dir": "x" * 300})


@case("training.output_dir", "taken", "is a file")
def output_is_a_file(w: World) -> Arguments:
    w.file("taken", "")
    return w.train({"training.output_dir": "taken"})


@case("taken/run", "is a file, not a folder")
def output_under_a_file(w: World) -> Arguments:
    w.file("taken", "")
    return w.train({"training.output_dir": "taken/run"})


@case("run", "already holds a run", "--resume", "--overwrite")
def output_holds_a_run(w: World) -> Arguments:
    return ["train", w.run() / "recipe.yaml"]


@case("full", "not empty", "holds no run", "choose another")
def output_holds_something_else(w: World) -> Arguments:
    w.file("full/notes.txt", "mine")
    return w.train({"training.output_dir": "full"})


@case("no run to resume", "without --resume")
def resume_of_nothing(w: World) -> Arguments:
    return w.train({}, "--resume")


@case("--resume", "--overwrite", "exclude each other")
def resume_and_overwrite(w: World) -> Arguments:
    return w.train({}, "--resume", "--overwrite")


@case("--resume", "training.learning_rate was 0.005 and is now 0.1", "undo the change")
def resume_of_another_run(w: World) -> Arguments:
    return ["train", w.run() / "recipe.yaml", "training.learning_rate=0.1", "--resume"]


@case("data.train", "adapter.r")
def resume_with_several_changes(w: World) -> Arguments:
    return ["train", w.run() / "recipe.yaml", "adapter.r=2", "data.train=other.jsonl", "--resume"]


@case("loop", "broken symbolic link", "choose another folder")
def output_is_a_link_to_itself(w: World) -> Arguments:
    (w.root / "loop").symlink_to("loop")
    return w.train({"training.output_dir": "loop"})


@case("gone is a broken symbolic link", "choose another folder")
def output_is_a_link_to_nothing(w: World) -> Arguments:
    (w.root / "gone").symlink_to("nowhere")
    return w.train({"training.output_dir": "gone"})


@case("broken symbolic link")
def output_below_a_link_to_nothing(w: World) -> Arguments:
    (w.root / "gone").symlink_to("nowhere")
    return w.train({"training.output_dir": "gone/run"})


@case("/proc/run", "no permission", loads=True)
def output_in_a_folder_that_takes_none(w: World) -> Arguments:
    if os.access("/proc", os.W_OK):
        pytest.skip("root may write everywhere")
    return w.train({"training.output_dir": "/proc/run"})


@case("no permission to write in", "run/adapter", "choose another folder")
def run_with_an_adapter_that_may_not_be_removed(w: World) -> Arguments:
    return ["train", _locked(w, "adapter") / "recipe.yaml", "--overwrite"]


@case("no permission to write in", "run/checkpoints", "choose another folder")
def run_with_checkpoints_that_may_not_be_added_to(w: World) -> Arguments:
    return ["train", _locked(w, "checkpoints") / "recipe.yaml", "training.max_steps=3", "--resume"]


@case("run/metrics.jsonl: no permission to write")
def run_with_metrics_that_may_not_be_added_to(w: World) -> Arguments:
    return ["train", _locked(w, "metrics.jsonl") / "recipe.yaml", "training.max_steps=3", "--resume"]


def _locked(w: World, part: str) -> Path:
    """A run with a part that may only be read, as one that another user has made."""
    path = w.root / w.run() / part
    path.chmod(0o555 if path.is_dir() else 0o444)
    if os.access(path, os.W_OK):
        pytest.skip("root may write everywhere")
    return Path("run")


@case("adapter.init_from is inside training.output_dir", "copy that adapter elsewhere")
def output_holds_the_adapter_to_start_from(w: World) -> Arguments:
    w.run()
    return w.train(
        {"adapter.init_from": "run/adapter", "model.name_or_path": "base", "training.output_dir": "run"}, "--overwrite"
    )


def resume(w: World, file: str, content: str | bytes) -> Arguments:
    """Resume a run whose ``file`` has been replaced by ``content``."""
    w.file(f"{w.run()}/{file}", content)
    w.rows(*[ROW] * 4)
    return ["train", "run/recipe.yaml", "--resume", "training.max_steps=3"]


@case("run/run.json", "not readable", "remove the run's folder")
def resume_with_a_torn_record(w: World) -> Arguments:
    return resume(w, "run.json", '{"started": "2026')


@case("run/run.json", "not readable", "remove the run's folder")
def resume_with_a_record_that_is_no_text(w: World) -> Arguments:
    return resume(w, "run.json", b"\xff\xfe\x00")


@case("run/run.json", "not a run's record", "remove the run's folder")
def resume_with_a_record_that_is_a_list(w: World) -> Arguments:
    return resume(w, "run.json", "[]")


@case("run/run.json", "not a run's record", "remove the run's folder")
def resume_with_a_record_of_other_kinds(w: World) -> Arguments:
    record = {"started": 5, "versions": [], "steps": "many", "processes": "two", "base": 1, "data": []}
    return resume(w, "run.json", json.dumps(record))


@case("run/recipe.yaml:1")
def resume_with_a_broken_recipe(w: World) -> Arguments:
    w.run()
    shutil.copy(w.root / "run/recipe.yaml", w.root / "recipe.yaml")
    w.file("run/recipe.yaml", "model: [")
    return ["train", "recipe.yaml", "--resume"]


@case("run/metrics.jsonl:1", "not a metrics line", "remove that line")
def resume_with_broken_metrics(w: World) -> Arguments:
    return resume(w, "metrics.jsonl", "oops\n")


@case("run/metrics.jsonl:1", "not a metrics line", "remove that line")
def resume_with_metrics_of_another_kind(w: World) -> Arguments:
    return resume(w, "metrics.jsonl", "[1, 2]\n")


@case("run/metrics.jsonl:1", "not a metrics line")
def resume_with_metrics_that_are_no_text(w: World) -> Arguments:
    return resume(w, "metrics.jsonl", b"\xff\xfe\n")


@case("run/metrics.jsonl:1", "not a metrics line")
def resume_with_metrics_without_a_loss(w: World) -> Arguments:
    return resume(w, "metrics.jsonl", '{"step": 1, "split": "train"}\n')


@case("run/metrics.jsonl:1", "not a metrics line")
def resume_with_metrics_of_no_number(w: World) -> Arguments:
    return resume(w, "metrics.jsonl", '{"step": 1, "split": "validation", "loss": NaN}\n')


@case("run/run.json", "wrong value of processes, gradient_accumulation_steps", "remove the run's folder")
def resume_with_a_record_of_numbers_that_are_none(w: World) -> Arguments:
    w.edit_json(w.run() / "run.json", processes=0, gradient_accumulation_steps=True)
    return ["train", "run/recipe.yaml", "--resume"]


@case("run/run.json", "not a run's record: wrong value of per_device_train_batch_size", "remove the run's folder")
def resume_with_a_record_of_larger_batches_than_any(w: World) -> Arguments:
    w.edit_json(w.run() / "run.json", per_device_train_batch_size=10**22)
    return ["train", "run/recipe.yaml", "--resume"]


@case("run/run.json", "not a run's record", "remove the run's folder")
def resume_with_a_record_of_other_kinds_further_down(w: World) -> Arguments:
    w.edit_json(w.run() / "run.json", data={"validation": 5})
    return ["train", "run/recipe.yaml", "--resume"]


@case("run/run.json", "not readable", "remove the run's folder")
def resume_with_a_record_nested_too_deep(w: World) -> Arguments:
    return resume(w, "run.json", "[" * 100_000)


@case("run/checkpoints/step-00000005", "a file is in the place of a folder of the run", "move it")
def resume_with_a_file_named_as_a_checkpoint(w: World) -> Arguments:
    return resume(w, "checkpoints/step-00000005", "")


@case("run/checkpoints", "a file is in the place of a folder of the run", "move it")
def resume_with_a_file_named_as_the_checkpoints(w: World) -> Arguments:
    shutil.rmtree(w.root / w.run() / "checkpoints")
    w.file("run/checkpoints", "")
    return ["train", "run/recipe.yaml", "--resume"]


@case("run/recipe.yaml", "the run's recipe.yaml is missing", "restore it from a copy", "--overwrite")
def resume_without_the_recipe(w: World) -> Arguments:
    (w.root / w.run() / "recipe.yaml").rename(w.root / "mine.yaml")
    return ["train", "mine.yaml", "--resume"]
