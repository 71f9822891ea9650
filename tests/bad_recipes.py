"""Recipes that are wrong by themselves or for their model. tests/test_recipe.py has many more."""

from __future__ import annotations

import json
from typing import Any

from bad_input import Arguments, World, case


@case("recipe.yaml:", "adapter.lora_alhpa", "did you mean 'lora_alpha'?")
def misspelt_key_in_a_section(w: World) -> Arguments:
    return w.train({"adapter.lora_alhpa": 8})


@case("recipe.yaml:", "optimizer")
def unknown_section(w: World) -> Arguments:
    return w.train({"optimizer": {"lr": 1}})


@case("training.learning_rat=1e-4", "did you mean 'learning_rate'?")
def misspelt_override(w: World) -> Arguments:
    return w.train({}, "training.learning_rat=1e-4")


@case("recipe.yaml:", "adapter.r", "whole number", "sixteen")
def wrong_type(w: World) -> Arguments:
    return w.train({"adapter.r": "sixteen"})


@case("recipe.yaml:", "model.name_or_path", "text", "in quotes")
def number_for_text(w: World) -> Arguments:
    return w.train({"model.name_or_path": 7})


@case("recipe.yaml:", "adapter.r", "at least 1", "0")
def rank_zero(w: World) -> Arguments:
    return w.train({"adapter.r": 0})


@case("recipe.yaml:", "data.max_length", "at least 3", "2")
def rows_of_which_only_the_first_token_predicts(w: World) -> Arguments:
    return w.train({"data.max_length": 2})


@case("training.warmup_steps: the run has one step, and its learning rate would be 0", "for more steps")
def padded_rows_for_a_single_step(w: World) -> Arguments:
    single = {"max_steps": None, "num_train_epochs": 1, "gradient_accumulation_steps": 12}
    return w.train({"training": single | {"warmup_steps": 1}})


@case("training.warmup_steps: the run has one step, and its learning rate would be 0", "for more steps")
def packed_rows_for_a_single_step(w: World) -> Arguments:
    single = {"max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": "auto"}
    return w.train({"training": single | {"gradient_accumulation_steps": 24, "warmup_steps": 1}, "data.packing": True})


@case("training.learning_rate", "above 0", "-0.001")
def negative_rate(w: World) -> Arguments:
    return w.train({"training.learning_rate": -0.001})


@case("recipe.yaml:", "training.learning_rate", "above 0", "nan")
def nan_rate(w: World) -> Arguments:
    return w.train({"training.learning_rate": float("nan")})


@case("nothing.yaml", "no such file")
def missing_recipe(w: World) -> Arguments:
    return ["train", "nothing.yaml"]


@case("learning_rate", "adapter.r", "optimizr")
def several_faults_in_a_recipe(w: World) -> Arguments:
    return w.train({"training.learning_rate": -1.0, "adapter.r": 0, "training.optimizr": "x"})


@case("recipe.yaml:2:3: adapter.a0: unknown key", "... and 240 more")
def hundreds_of_faults(w: World) -> Arguments:
    return ["train", w.file("recipe.yaml", "adapter:\n" + "".join(f"  a{n}: 1\n" for n in range(297)))]


@case(
    "recipe.yaml:1:1: base_model: unknown key; here it is model.name_or_path\n",
    "recipe.yaml:2:1: wandb_project: unknown key; leave it out: ",
    "recipe.yaml:3:1: wandb_name: unknown key; leave it out: ",
    "recipe.yaml:12:1: num_epochs: unknown key; here it is training.num_train_epochs\n",
    "recipe.yaml:44:1: key30: unknown key",
    "training: missing; it needs training.output_dir\n",
)
def configuration_of_another_tool(w: World) -> Arguments:
    keys = (
        "base_model",
        "wandb_project",
        "wandb_name",
        "load_in_4bit",
        "datasets",
        "val_set_size",
        "output_dir",
        "sequence_len",
        "lora_r",
        "lora_alpha",
    )
    others = (f"key{n}" for n in range(31))
    lines = (f"{key}: 1\n" for key in (*keys, "micro_batch_size", "num_epochs", "optimizer", *others))
    return ["train", w.file("recipe.yaml", "".join(lines))]


@case("adapter.magic: unknown key\nerror: ", "adapter.wqx: unknown key\n    known: fused, ")
def faults_of_one_hint(w: World) -> Arguments:
    return w.train({"adapter.magic": "none", "adapter.wqx": 3})


@case("recipe.yaml:1:1", r"\x1b[31mred", "unknown key")
def names_that_would_paint_the_terminal(w: World) -> Arguments:
    return ["train", w.file("recipe.yaml", '"\\e[31mred": 1\nmodel: {name_or_path: x}\ndata: {train: x}\n')]


@case("rows.jsonl:1", r"columns seen: \x1b[2J\n\n", "...")
def columns_that_would_fill_the_terminal(w: World) -> Arguments:
    columns = {"data.format": "text"}
    return w.train(columns, data=w.rows({"\x1b[2J" + "\n" * 50 + "x" * 100_000: "a"}))


@case(
    "training.report_to: wandb", "pip install wandb", "missing.jsonl", "no such data file", "nowhere", "no such model"
)
def several_faults_outside_the_recipe(w: World) -> Arguments:
    changes = {"training.report_to": ["wandb"], "model.name_or_path": "nowhere"}
    return w.train(changes, data="missing.jsonl")


@case("training.report_to: trackio is not installed", "pip install trackio")
def tracker_not_installed(w: World) -> Arguments:
    return w.train({"training.report_to": ["trackio"]})


@case("recipe.yaml:", "HF_TOKEN looks like a secret", "leave it in the environment")
def secret_in_a_recipe(w: World) -> Arguments:
    return w.train({"model.name_or_path": "https://user:${HF_TOKEN}@hub/model"})


@case("training.output_dir=${wandb_api_key:-runs} (command line)", "looks like a secret")
def secret_in_an_override(w: World) -> Arguments:
    return w.train({}, "training.output_dir=${wandb_api_key:-runs}")


@case("recipes", "this is a folder", "did you mean 'recipes/recipe.yaml'?")
def folder_as_recipe(w: World) -> Arguments:
    w.file("recipes/recipe.yaml", "")
    return ["train", "recipes"]


@case("adapter.target_modules: 'q_proj'", "c_attn", "c_proj", "c_fc")
def targets_of_another_architecture(w: World) -> Arguments:
    return w.train({"adapter.target_modules": ["q_proj"]})


@case("'c_attn,c_proj' matches no whole module name", "in brackets it is a list: [c_attn, c_proj]; linear layers here")
def targets_as_a_text_with_commas(w: World) -> Arguments:
    return w.train({"adapter.target_modules": "c_attn,c_proj"})


@case("'c_attn c_proj' matches no whole module name", "in brackets it is a list: [c_attn, c_proj]; linear layers here")
def targets_as_peft_takes_them_on_a_command_line(w: World) -> Arguments:
    return w.train({"adapter.target_modules": "c_attn c_proj"})


@case("adapter.target_modules: 'all'", "did you mean 'all-linear'? linear layers here")
def targets_in_the_word_of_another_tool(w: World) -> Arguments:
    return w.train({"adapter.target_modules": "all"})


@case("adapter.target_modules: 'c_atn'", "did you mean 'c_attn'?")
def misspelt_target(w: World) -> Arguments:
    return w.train({"adapter.target_modules": ["c_fc", "c_atn"]})


@case("adapter.target_modules: 'all-linear'", "write it without brackets", "c_attn")
def word_in_a_list(w: World) -> Arguments:
    return w.train({"adapter.target_modules": ["all-linear"]})


@case("adapter.target_modules", r".*\.query", "c_attn")
def pattern_without_match(w: World) -> Arguments:
    return w.train({"adapter.target_modules": r".*\.query"})


@case("adapter.layers_to_transform", "layer 2", "0 to 1")
def a_layer_beyond_the_last(w: World) -> Arguments:
    return w.train({"adapter.layers_to_transform": [1, 2]})


@case("adapter.target_modules", "regular expression", "(c_attn", "c_fc")
def broken_pattern(w: World) -> Arguments:
    return w.train({"adapter.target_modules": "(c_attn"})


@case("adapter.r: 100", "64")
def rank_wider_than_the_layer(w: World) -> Arguments:
    return w.train({"adapter.r": 100})


@case("training.lr_scheduler_type", "polynomial falls to 1e-7")
def rate_that_cannot_fall(w: World) -> Arguments:
    return w.train({"training.lr_scheduler_type": "polynomial", "training.learning_rate": 1e-7})


@case("training.deepspeed", "training.fsdp is set too", "keep one")
def two_ways_to_shard(w: World) -> Arguments:
    return w.train({"training.fsdp": True, "training.deepspeed": w.file("zero.json", "{}")})


@case("model.dtype: float16", "loss scaling", "use bfloat16")
def shards_in_float16_without_loss_scaling(w: World) -> Arguments:
    return w.train({"model.dtype": "float16", "training.deepspeed": w.file("zero.json", "{}")})


@case("training.optim: adamw_8bit cannot be sharded", "adamw_torch")
def sharded_8bit_optimizer(w: World) -> Arguments:
    return w.train({"training.fsdp": True, "training.optim": "adamw_8bit"})


@case("training.fsdp", "int8", "only with nf4 and fp4")
def sharded_8_bits(w: World) -> Arguments:
    return w.train({"training.fsdp": True, "quantization": {"method": "int8"}})


@case("zero.json", "training.deepspeed")
def deepspeed_file_that_is_no_json(w: World) -> Arguments:
    return w.train({"training.deepspeed": w.file("zero.json", "zero: 2")})


@case("zero.json", "training.deepspeed")
def deepspeed_file_that_is_a_list(w: World) -> Arguments:
    return w.train({"training.deepspeed": w.file("zero.json", "[]")})


@case("zero.json", "training.deepspeed", "stage")
def deepspeed_of_an_unknown_stage(w: World) -> Arguments:
    return w.train({"training.deepspeed": w.file("zero.json", json.dumps({"zero_optimization": {"stage": 7}}))})


@case("zero.json", "training.deepspeed", "stage")
def deepspeed_of_a_stage_in_words(w: World) -> Arguments:
    return w.train({"training.deepspeed": w.file("zero.json", json.dumps({"zero_optimization": {"stage": "two"}}))})


@case("zero.json", "training.deepspeed: cannot be read: No such file")
def deepspeed_of_no_file(w: World) -> Arguments:
    return w.train({"training.deepspeed": "zero.json"})


def zero_that_says(w: World, zero: Any = None, **more: Any) -> Arguments:
    config = {"zero_optimization": {"stage": 2} | (zero or {}), "bf16": {"enabled": "auto"}} | more
    return w.train({"training.deepspeed": w.file("zero.json", json.dumps(config))})


@case(
    "zero.json",
    "csv_monitor is not supported",
    "flops_profiler is not supported",
    "tensorboard is not supported",
    "remove it",
)
def deepspeed_that_writes_elsewhere(w: World) -> Arguments:
    away = {"enabled": True, "output_path": str(w.root / "elsewhere")}
    profiler = {"enabled": True, "output_file": str(w.root / "profile.txt")}
    return zero_that_says(w, csv_monitor=away, tensorboard=away, flops_profiler=profiler)


@case(
    "wandb is not supported",
    "autotuning is not supported",
    "aio is not supported",
    "checkpoint is not supported",
    "data_types",
)
def deepspeed_that_does_other_things(w: World) -> Arguments:
    names = ("wandb", "comet", "autotuning", "aio", "checkpoint", "data_types", "bfloat16", "compression_training")
    return zero_that_says(w, **{name: {"enabled": True} for name in names})


@case("offload_optimizer.nvme_path is not supported", "offload_optimizer.device is 'nvme', expected none or cpu")
def deepspeed_that_offloads_to_a_disk(w: World) -> Arguments:
    return zero_that_says(w, {"offload_optimizer": {"device": "nvme", "nvme_path": str(w.root / "elsewhere")}})


@case("zero_optimization.offload_param is 'cpu', expected an object")
def deepspeed_that_offloads_in_a_word(w: World) -> Arguments:
    return zero_that_says(w, {"offload_param": "cpu"})


@case("zero_optimization.overlap_com is not supported", "did you mean 'overlap_comm'?")
def deepspeed_key_that_is_misspelt(w: World) -> Arguments:
    return zero_that_says(w, {"overlap_com": True})


@case("zero_optimization.overlap_comm is not a number or a text")
def deepspeed_key_that_is_an_object(w: World) -> Arguments:
    return zero_that_says(w, {"overlap_comm": {"path": "elsewhere"}})


@case("zero_optimization.reduce_bucket_size is not a number or a text")
def deepspeed_key_that_is_a_list(w: World) -> Arguments:
    return zero_that_says(w, {"reduce_bucket_size": [1]})


@case("zero_optimization.offload_optimizer.pin_memory is not a number or a text", "device is [], expected none or cpu")
def deepspeed_offload_of_an_object_and_a_list(w: World) -> Arguments:
    return zero_that_says(w, {"offload_optimizer": {"device": [], "pin_memory": {"on": True}}})


@case("zero.json", "training.deepspeed: has no zero_optimization.stage")
def deepspeed_file_of_lists_in_lists(w: World) -> Arguments:
    return w.train({"training.deepspeed": w.file("zero.json", "[" * 10**5)})


@case("WANDB_API_KEY looks like a secret")
def key_in_a_recipe(w: World) -> Arguments:
    return w.train({"training.output_dir": "runs/${WANDB_API_KEY}"})


@case("the environment variable TOKENIZER_DIR is not set")
def variable_that_only_sounds_like_a_secret(w: World) -> Arguments:
    return w.train({"model.name_or_path": "${TOKENIZER_DIR}"})


@case("the environment variable MAX_TOKENS is not set", "the environment variable KEYBOARD is not set")
def two_variables_that_only_sound_like_secrets(w: World) -> Arguments:
    return w.train({"model.name_or_path": "${MAX_TOKENS}", "training.output_dir": "${KEYBOARD}"})


@case("model.attn_implementation: flash_attention_2 is not installed", "install one of flash_attn", "leave it at auto")
def attention_of_a_package_that_is_not_installed(w: World) -> Arguments:
    return w.train({"model.attn_implementation": "flash_attention_2"})


@case("model.attn_implementation: flex_attention", "leave it at auto")
def attention_that_neither_the_model_nor_a_cpu_has(w: World) -> Arguments:
    return w.train({"model.attn_implementation": "flex_attention"})
