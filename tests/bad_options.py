"""Command lines that ask for something impossible, and output paths that cannot be written to."""

from __future__ import annotations

import os

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


@case("--data is for verifying, which --no-verify turns off", "leave one of them out")
def merge_unverified_with_data(w: World) -> Arguments:
    return ["merge", w.run(), "--out", "out", "--no-verify", "--data", w.rows(ROW)]


@case("--skip c_atn", "did you mean 'c_attn'")
def quantize_but_for_an_unknown_layer(w: World) -> Arguments:
    return ["quantize", w.run(), "--out", "out", "--skip", "c_atn"]


@case("--base is for an adapter, and model is not one", "name a run or an adapter")
def eval_of_a_model_with_a_base(w: World) -> Arguments:
    return ["eval", w.model(), "--base", w.gpt2, "--data", w.rows(ROW)]


@case("--base is for an adapter, and model is not one", "name a run or an adapter")
def quantize_a_model_with_a_base(w: World) -> Arguments:
    return ["quantize", w.model(), "--base", w.gpt2, "--out", "out"]


@case("no such model folder", "did you mean 'model'?")
def eval_of_a_misspelt_model_with_a_base(w: World) -> Arguments:
    w.model()
    return ["eval", "modle", "--base", w.gpt2, "--data", w.rows(ROW)]


@case("the adapter belongs to another base", "run/adapter")
def eval_on_another_base(w: World) -> Arguments:
    return ["eval", w.run(), "--base", w.llama, "--data", w.rows(ROW)]


@case("no finished run", "give a run")
def eval_of_nothing(w: World) -> Arguments:
    return ["eval", "--data", w.rows(ROW)]


@case("--hlep", "--help")
def unknown_option(w: World) -> Arguments:
    return ["train", "recipe.yaml", "--hlep"]


@case("--learning-rate: no such option", "write training.learning_rate=VALUE")
def key_of_the_recipe_as_an_option(w: World) -> Arguments:
    return ["train", "recipe.yaml", "--learning-rate", "1e-4"]


@case("--template: no such option", "leave it out: a chat goes through")
def option_of_another_tool(w: World) -> Arguments:
    return ["train", "recipe.yaml", "--template", "llama3"]


@case("--adapter.r: no such option", "write adapter.r=VALUE")
def dotted_key_as_an_option(w: World) -> Arguments:
    return ["train", "recipe.yaml", "--adapter.r=4"]


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


@case("Invalid value for '--num-processes'")
def no_processes(w: World) -> Arguments:
    return w.train({}, "--num-processes", "0")


@case("Invalid value for '--num-processes'")
def fewer_processes_than_none(w: World) -> Arguments:
    return w.train({}, "--num-processes", "-1")


@case("Invalid value for '--num-processes'")
def processes_in_words(w: World) -> Arguments:
    return w.train({}, "--num-processes", "two")


@case("base/merged", "is inside", "choose another --out")
def merge_into_the_base(w: World) -> Arguments:
    return ["merge", w.run(), "--out", "base/merged"]


@case("base", "exists already")
def merge_onto_the_base(w: World) -> Arguments:
    return ["merge", w.run(), "--out", "base"]


@case("run/adapter/merged", "is inside", "choose another --out")
def merge_into_the_adapter(w: World) -> Arguments:
    return ["merge", w.run(), "--out", "run/adapter/merged"]


@case("link/merged", "is inside", "choose another --out")
def merge_into_the_base_through_a_link(w: World) -> Arguments:
    (w.root / "link").symlink_to("base")
    return ["merge", w.run(), "--out", "link/merged"]


@case("model/small", "is inside", "choose another --out")
def quantize_into_the_model(w: World) -> Arguments:
    return ["quantize", w.model(), "--out", "model/small"]


@case("run/adapter/small", "is inside", "choose another --out")
def quantize_into_the_adapter(w: World) -> Arguments:
    return ["quantize", w.run(), "--out", "run/adapter/small"]


@case("out", "exists already")
def quantize_into_something_before_the_model_is_fetched(w: World) -> Arguments:
    w.file("out", "")
    return ["quantize", "somebody/model", "--out", "out"]


@case("out", "exists already")
def merge_into_something_before_the_base_is_fetched(w: World) -> Arguments:
    w.file("out", "")
    w.edit_json(w.run() / "adapter/provenance.json", base={"name_or_path": "somebody/model"})
    return ["merge", "run", "--out", "out"]


@case("loop", "broken symbolic link")
def quantize_into_a_link_to_itself(w: World) -> Arguments:
    (w.root / "loop").symlink_to("loop")
    return ["quantize", w.gpt2, "--out", "loop"]


@case("gone", "broken symbolic link")
def merge_into_a_link_to_nothing(w: World) -> Arguments:
    (w.root / "gone").symlink_to("nowhere")
    return ["merge", w.run(), "--out", "gone/merged"]


@case("model", "no adapter here")
def merge_of_a_model(w: World) -> Arguments:
    return ["merge", w.model(), "--out", "out"]


@case("recipe.yaml", "no adapter here")
def merge_of_a_file(w: World) -> Arguments:
    return ["merge", w.file("recipe.yaml", ""), "--out", "out"]


@case("recipe.yaml", "a file, not a model folder", "a model folder holds")
def quantize_of_a_file(w: World) -> Arguments:
    return ["quantize", w.file("recipe.yaml", ""), "--out", "out"]


@case("recipe.yaml", "a file, not a model folder", "a model folder holds")
def eval_of_a_file(w: World) -> Arguments:
    return ["eval", w.file("recipe.yaml", ""), "--data", w.rows(ROW)]


@case("--data", "the name is empty")
def eval_of_rows_without_a_name(w: World) -> Arguments:
    return ["eval", w.gpt2, "--data", ""]


@case("--data", "the name is empty")
def quantize_with_rows_without_a_name(w: World) -> Arguments:
    return ["quantize", w.gpt2, "--out", "out", "--data", ""]


@case("--resume", "--overwrite", "exclude each other")
def resume_and_overwrite_with_processes(w: World) -> Arguments:
    return w.train({}, "--resume", "--overwrite", "--num-processes", "2")


@case("--seed is not for --method cat", "it is only for dare_ties, dare_linear")
def seed_of_an_exact_sum(w: World) -> Arguments:
    w.run()
    return ["adapters", "compose", "run=1", "run/adapter=1", "--seed", "0", "--out", "out"]


@case("--no-double-quant", "for --method nf4 and fp4")
def scales_of_8_bits(w: World) -> Arguments:
    return ["quantize", w.gpt2, "--method", "int8", "--no-double-quant", "--out", "out"]


@case("--data", "given more than once", "keep one")
def an_option_given_twice(w: World) -> Arguments:
    return ["eval", w.llama, "--data", w.rows(ROW), "--data", w.rows(ROW)]


@case("--rank", "given more than once", "keep one")
def an_option_of_adapters_given_twice(w: World) -> Arguments:
    return ["adapters", "resize", w.llama, "--rank", "2", "--out", w.root / "out", "--rank", "4"]


@case("data.train=rows\\udcff.jsonl", "not UTF-8", "rename")
def rows_of_a_name_that_is_not_utf8(w: World) -> Arguments:
    return [*w.train({}), "data.train=rows\udcff.jsonl"]


@case("rows\\udcff.jsonl", "not UTF-8", "rename")
def eval_of_rows_of_a_name_that_is_not_utf8(w: World) -> Arguments:
    w.run()
    return ["eval", "run", "--data", "rows\udcff.jsonl"]


@case("folder\\udcff: not UTF-8", "rename")
def working_directory_of_a_name_that_is_not_utf8(w: World) -> Arguments:
    here = w.root / "folder\udcff"
    here.mkdir()
    os.chdir(here)
    return w.train({})


@case("out\\udcff", "not UTF-8", "rename")
def merge_into_a_name_that_is_not_utf8(w: World) -> Arguments:
    w.run()
    return ["merge", "run", "--out", "out\udcff"]
