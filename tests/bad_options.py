"""Command lines that ask for what cannot be, and places that cannot be written to."""

from __future__ import annotations

from bad_input import ROW, Arguments, World, case


@case("File name too long", "choose another name")
def merge_into_too_long_a_name(w: World) -> Arguments:
    return ["merge", w.run(), "--out", "x" * 300]


@case("out", "exists already", "choose another --out")
def merge_into_something(w: World) -> Arguments:
    w.file("out/mine", "")
    return ["merge", w.run(), "--out", "out"]


@case("out", "exists already", "choose another --out")
def quantize_into_a_file(w: World) -> Arguments:
    w.file("out", "")
    return ["quantize", w.gpt2, "--out", "out"]


@case("file is a file, not a folder", "file/out")
def merge_under_a_file(w: World) -> Arguments:
    w.file("file", "")
    return ["merge", w.run(), "--out", "file/out"]


@case("run", "adapter, not a model", "lora merge")
def quantize_of_an_adapter(w: World) -> Arguments:
    return ["quantize", w.run(), "--out", "out"]


@case("no finished run", "name a run")
def eval_of_nothing(w: World) -> Arguments:
    return ["eval", "--data", w.rows(ROW)]


@case("--hlep", "--help")
def unknown_option(w: World) -> Arguments:
    return ["train", "recipe.yaml", "--hlep"]


@case("No such command 'tarin'", "train")
def unknown_command(w: World) -> Arguments:
    return ["tarin"]


@case("Missing argument", "recipe", "lora train -h")
def missing_argument(w: World) -> Arguments:
    return ["train"]


@case("Missing option", "--out")
def missing_option(w: World) -> Arguments:
    return ["merge", "adapter"]


@case("--method", "nf3", "nf4")
def wrong_choice(w: World) -> Arguments:
    return ["quantize", "model", "--out", "out", "--method", "nf3"]


@case("nothing", "key=value")
def override_without_a_value(w: World) -> Arguments:
    return w.train({}, "nothing")


@case("no key 'adapter.rr'", "adapter.r")
def reference_of_an_unknown_key(w: World) -> Arguments:
    return ["explain", "adapter.rr"]
