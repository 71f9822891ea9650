"""Run folders that cannot be written, or gone on with."""

from __future__ import annotations

from bad_input import Arguments, World, case


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


@case("no run to resume", "leave --resume out")
def resume_of_nothing(w: World) -> Arguments:
    return w.train({}, "--resume")


@case("--resume", "--overwrite", "exclude each other")
def resume_and_overwrite(w: World) -> Arguments:
    return w.train({}, "--resume", "--overwrite")


@case("--resume", "training.learning_rate was 0.005 and is now 0.1", "set it back")
def resume_of_another_run(w: World) -> Arguments:
    return ["train", w.run() / "recipe.yaml", "training.learning_rate=0.1", "--resume"]


@case("data.train", "adapter.r")
def resume_with_several_changes(w: World) -> Arguments:
    return ["train", w.run() / "recipe.yaml", "adapter.r=2", "data.train=other.jsonl", "--resume"]
