"""Recipes: what is read, what is refused, and which place each fault reports."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import TrainingArguments

from lora_cli.errors import Fault, UserError
from lora_cli.recipe.explain import dotted_keys, expected, explain, json_schema, schema_at
from lora_cli.recipe.load import dump_recipe, load_recipe
from lora_cli.recipe.peers import EQUIVALENTS
from lora_cli.recipe.schema import Data, Recipe, Section
from lora_cli.recipe.yaml12 import Place, plain_scalar

MINIMAL = """\
model:
  name_or_path: tiny
data:
  train: rows.jsonl
training:
  output_dir: runs/x
"""

Load = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str | bytes, *overrides: str) -> Recipe:
    Path("r.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe("r.yaml", overrides)


def faults(text: str | bytes, *overrides: str) -> tuple[Fault, ...]:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return caught.value.faults


def fault(text: str | bytes, *overrides: str) -> Fault:
    found = faults(text, *overrides)
    assert len(found) == 1, [str(each) for each in found]
    return found[0]


def with_key(section: str, line: str) -> str:
    """The minimal recipe with ``line`` first in ``section``, which is added if missing."""
    if f"{section}:\n" in MINIMAL:
        return MINIMAL.replace(f"{section}:\n", f"{section}:\n  {line}\n")
    return f"{MINIMAL}{section}:\n  {line}\n"


# Scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("2.0e-4", 2e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3.5", -3.5),
        ("010", 10),
        ("-7", -7),
        ("+7", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("22:22", "22:22"),
        ("2024-01-02", "2024-01-02"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("tRue", "tRue"),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("null", None),
        ("NULL", None),
        ("nULL", "nULL"),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("inf", "inf"),
        ("nan", "nan"),
        ("e5", "e5"),
        ("1e", "1e"),
        (".", "."),
        ("=", "="),
        ("٣", "٣"),
        ("9" * 5000, math.inf),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    found = plain_scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(plain_scalar(".nan"))  # type: ignore[arg-type]


def test_scalars_reach_the_recipe() -> None:
    recipe = load(
        with_key("training", "learning_rate: 1e-4\n  seed: 010\n  max_steps: 0x1F\n  eval_steps: ~")
        + "adapter:\n  init_from: yes\n  lora_alpha: 8\n"
    )
    assert recipe.training.learning_rate == 1e-4
    assert (recipe.training.seed, recipe.training.max_steps, recipe.training.eval_steps) == (10, 31, None)
    assert recipe.adapter.init_from == "yes"
    assert recipe.adapter.lora_alpha == 8


def test_quotes_make_text() -> None:
    assert load(with_key("adapter", "init_from: '010'")).adapter.init_from == "010"
    assert load(with_key("adapter", 'init_from: "null"')).adapter.init_from == "null"


def test_sequences_anchors_and_flow() -> None:
    recipe = load(MINIMAL + "adapter: {target_modules: &m [q_proj, v_proj]}\n")
    assert recipe.adapter.target_modules == ("q_proj", "v_proj")
    text = MINIMAL.replace("train: rows.jsonl", "train: &t [a.jsonl, {path: b.jsonl, weight: 2}]\n  validation: *t")
    data = load(text).data
    assert data.validation == data.train
    assert isinstance(data.train, tuple)
    assert data.train[0] == "a.jsonl"
    wanted = {"path": "b.jsonl", "weight": 2.0, "name": None, "split": "train", "streaming": False}
    assert data.train[1].model_dump() == wanted  # type: ignore[union-attr]


def test_byte_order_mark_and_crlf_are_fine() -> None:
    assert load(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()) == load(MINIMAL)
    assert fault(b"\xef\xbb\xbf" + f"modle: 1\n{MINIMAL}".encode()).where == "r.yaml:1:1"


def test_a_null_section_counts_as_left_out() -> None:
    assert load(MINIMAL + "adapter:\nquantization:\n") == load(MINIMAL)


# YAML that cannot be read


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "1:1", "the recipe is empty"),
        ("# nothing\n", "1:1", "the recipe is empty"),
        ("---\n", "1:1", "the recipe is empty"),
        ("- a\n", "1:1", "expected a recipe's sections (model, data, …), found a list"),
        ("\n  hello\n", "2:3", "found the text 'hello'"),
        ("model:\n\tname_or_path: x\n", "2:1", "a tab"),
        ("model:\n  a: 1\n  \tb: 2\n", "3:3", "a tab"),
        (MINIMAL + "---\n" + MINIMAL, "7:1", "a second document"),
        ("model: x: y\n", "1:9", "a ':' that is not allowed here"),
        ("model:\n  a: 1\n b: 2\n", "3:2", "does not fit"),
        ("model: [a, b\ndata: x\n", "1:8", "'[' is not closed"),
        ("model: {a: b\ndata: x\n", "1:8", "'{' is not closed"),
        ("model: 'abc\n", "1:8", "this quote is never closed"),
        ("model: @x\n", "1:8", "cannot begin a value"),
        ('model: "\\q"\n', "1:10", "backslash"),
        ('model: "\\UFFFFFFFF"\n', "1:11", "stands for no character"),
        ("model: |x\n", "1:9", "begins on the next line"),
        ("a: 1\nmodel\n", "2:1", "found no ':'"),
        ("model: *x\n", "1:8", "no anchor &x"),
        ("model: &x {a: *x}\n", "1:15", "would contain itself"),
        ("a: \x07\n", "1:4", "U+0007"),
        ("%YAML 9.9\n---\na: 1\n", "1:1", "not valid YAML"),
        ("a:\n  b: " + "[" * 200 + "]" * 200, "2:37", "levels deep"),
        (b"model:\n  name_or_path: \xc3\xa9\xff\n", "2:18", "the byte 0xFF is not UTF-8"),
        ("é: 1".encode("utf-16"), "1:1", "is not UTF-8"),
    ],
)
def test_unreadable_yaml_is_one_fault_with_its_place(text: str | bytes, where: str, what: str) -> None:
    found = fault(text)
    assert what in found.what
    assert found.where == f"r.yaml:{where}"


def test_an_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    start = time.process_time()
    assert "that aliases repeat" in fault("\n".join(lines)).what
    assert time.process_time() - start < 2


def test_many_wrong_items_are_told_in_time() -> None:
    start = time.process_time()
    found = faults(with_key("adapter", f"target_modules: [{', '.join(['1'] * 3000)}]"))
    assert len(found) == 3000
    assert time.process_time() - start < 10


def test_duplicate_keys_name_both_places() -> None:
    found = fault(with_key("adapter", "r: 8\n  lora_alpha: 1\n  r: 9"))
    assert (found.where, found.what) == ("r.yaml:10:3", "duplicate key 'r': it is already at r.yaml:8:3")


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!str", "!!binary", "!x", "!"])
def test_tags_are_refused(tag: str) -> None:
    found = fault(with_key("adapter", f"init_from: {tag} x"))
    assert found.where == "r.yaml:8:14"
    assert found.what == f"tags such as '{tag}' are not allowed"


def test_lone_surrogates_are_refused() -> None:
    assert "is not valid Unicode" in fault(with_key("adapter", 'init_from: "\\ud800"')).what


def test_a_key_must_be_a_plain_word() -> None:
    assert fault(MINIMAL + "? [a]\n: 3\n").where == "r.yaml:7:3"


def test_merge_keys_are_unknown_keys() -> None:
    found = fault(with_key("adapter", "<<: {r: 3}"))
    assert (found.where, found.what) == ("r.yaml:8:3", "adapter.<<: unknown key")


def test_a_missing_file_names_the_nearest() -> None:
    Path("medical.yaml").write_text(MINIMAL)
    with pytest.raises(UserError) as caught:
        load_recipe("./medcal.yaml")
    assert caught.value.faults == (Fault("no such file", "./medcal.yaml", "did you mean 'medical.yaml'?"),)
    Path("sub").mkdir()
    Path("sub/medical.yaml").write_text(MINIMAL)
    with pytest.raises(UserError) as caught:
        load_recipe("./sub/medcal.yaml")
    assert caught.value.faults == (Fault("no such file", "./sub/medcal.yaml", "did you mean 'sub/medical.yaml'?"),)


def test_a_folder_is_not_a_recipe() -> None:
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(MINIMAL)
    with pytest.raises(UserError) as caught:
        load_recipe(Path("run"))
    assert caught.value.faults[0].where == "run"
    assert caught.value.faults[0].hint == "did you mean 'run/recipe.yaml'?"
    Path("run/recipe.yaml").unlink()
    with pytest.raises(UserError) as caught:
        load_recipe(Path("run"))
    assert caught.value.faults[0].hint is None


def test_a_data_file_given_as_recipe_is_refused_unread() -> None:
    assert "1 MiB" in fault(b"x" * (1 << 21)).what
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        Path(name).write_text('{"text": "a"}\n')
        with pytest.raises(UserError) as caught:
            load_recipe(name)
        (told,) = caught.value.faults
        assert (told.where, told.what) == (name, "this is a data file; a recipe is a YAML file")
        assert told.hint == "name the rows in the recipe, under data.train"
    assert fault('[{"text": "a"}]').hint == "name the rows in the recipe, under data.train"


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_impossible_file_names(name: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file() -> None:
    Path("r.yaml").write_text(MINIMAL)
    Path("r.yaml").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        load_recipe("r.yaml")


# Keys and values


@pytest.mark.parametrize(
    ("section", "line", "where", "what", "hint"),
    [
        ("model", "base: x", "2:3", "model.base: unknown key", ...),
        (
            "training",
            "warmup_steps: 1.5",
            "6:17",
            "training.warmup_steps: expected a whole number of at least 0 or null, found the number 1.5",
            None,
        ),
        (
            "training",
            "warmup_steps: -1",
            "6:17",
            "training.warmup_steps: expected a whole number of at least 0, found the number -1",
            ...,
        ),
        (
            "training",
            "learning_rate: .inf",
            "6:18",
            "training.learning_rate: expected a number above 0, found the number inf",
            None,
        ),
        (
            "training",
            "fsdp: '1'",
            "6:9",
            "training.fsdp: expected true or false, found the text '1'",
            None,
        ),
        ("adapter", "rr: 3", "8:3", "adapter.rr: unknown key", "did you mean 'r'?"),
        ("adapter", "lora_alfa: 3", "8:3", "adapter.lora_alfa: unknown key", "did you mean 'lora_alpha'?"),
        ("adapter", "target: x", "8:3", "adapter.target: unknown key", "did you mean 'target_modules'?"),
        (
            "adapter",
            "lora_rnak: 3",
            "8:3",
            "adapter.lora_rnak: unknown key",
            "did you mean 'lora_rank'? here it is adapter.r",
        ),
        ("training", "data_seed: 3", "6:3", "training.data_seed: unknown key", "here it is training.seed"),
        (
            "training",
            "tf_32: true",
            "6:3",
            "training.tf_32: unknown key",
            "did you mean 'tf32'? leave it out: nothing here needs it",
        ),
        (
            "training",
            "r: 3",
            "6:3",
            "training.r: unknown key",
            "r belongs in adapter: write adapter.r",
        ),
        (
            "model",
            "method: nf4",
            "2:3",
            "model.method: unknown key",
            "method belongs in quantization or adapter: write quantization.method or adapter.method",
        ),
        ("data", "lerning_rate: 1", "4:3", "data.lerning_rate: unknown key", "did you mean 'training.learning_rate'?"),
        ("adapter", "'': 1", "8:3", "adapter.'': unknown key", None),
        ("adapter", "r: true", "8:6", "adapter.r: expected a whole number of at least 1, found true", None),
        ("adapter", "r: 0", "8:6", "adapter.r: expected a whole number of at least 1, found the number 0", None),
        (
            "adapter",
            "r: 16.0",
            "8:6",
            "adapter.r: expected a whole number of at least 1, found the number 16.0",
            "write 16",
        ),
        (
            "adapter",
            "r: '16'",
            "8:6",
            "adapter.r: expected a whole number of at least 1, found the text '16'",
            "without quotes it is a number: 16",
        ),
        (
            "adapter",
            "r:",
            "8:5",
            "adapter.r: expected a whole number of at least 1, found nothing (null)",
            "leave it out for its default, 16",
        ),
        ("adapter", "r: [1]", "8:6", "adapter.r: expected a whole number of at least 1, found a list", None),
        ("adapter", "r: {a: 1}", "8:6", "adapter.r: expected a whole number of at least 1, found a mapping", None),
        (
            "adapter",
            "lora_dropout: 1",
            "8:17",
            "adapter.lora_dropout: expected a number of at least 0 and below 1, found the number 1",
            None,
        ),
        (
            "adapter",
            "lora_alpha: .nan",
            "8:15",
            "adapter.lora_alpha: expected a number above 0 and up to 1000000, found the number nan",
            None,
        ),
        (
            "adapter",
            "lora_alpha: .inf",
            "8:15",
            "adapter.lora_alpha: expected a number above 0 and up to 1000000, found the number inf",
            None,
        ),
        (
            "adapter",
            "lora_alpha: 1e300",
            "8:15",
            "adapter.lora_alpha: expected a number above 0 and up to 1000000, found the number 1e+300",
            None,
        ),
        (
            "adapter",
            "lora_alpha: yes",
            "8:15",
            "adapter.lora_alpha: expected a number above 0 and up to 1000000, found the text 'yes'",
            None,
        ),
        ("adapter", "use_dora: yes", "8:13", "adapter.use_dora: expected true or false, found the text 'yes'", None),
        ("adapter", "use_dora: 1", "8:13", "adapter.use_dora: expected true or false, found the number 1", None),
        ("adapter", "init_from: ''", "8:14", "adapter.init_from: expected text or null, found empty text", None),
        (
            "adapter",
            "target_modules: 3",
            "8:19",
            "adapter.target_modules: expected text or a list of text, found the number 3",
            "in quotes it is text",
        ),
        (
            "adapter",
            "target_modules: [a, 3]",
            "8:23",
            "adapter.target_modules[1]: expected text, found the number 3",
            "in quotes it is text",
        ),
        (
            "adapter",
            "target_modules: []",
            "8:19",
            "adapter.target_modules: expected a list of text, found an empty list",
            None,
        ),
        (
            "model",
            "dtype: bf16",
            "2:10",
            "model.dtype: expected auto, float32, bfloat16 or float16, found the text 'bf16'",
            "did you mean 'bfloat16'?",
        ),
        (
            "model",
            "dtype: 16",
            "2:10",
            "model.dtype: expected auto, float32, bfloat16 or float16, found the number 16",
            None,
        ),
        (
            "training",
            "gradient_checkpointing: on",
            "6:27",
            "training.gradient_checkpointing: expected true, false, auto or offload, found the text 'on'",
            None,
        ),
        (
            "training",
            "report_to: wandb",
            "6:14",
            "training.report_to: expected a list (each tensorboard, wandb, mlflow, trackio or swanlab), "
            "found the text 'wandb'",
            "in brackets it is a list: [wandb]",
        ),
        (
            "training",
            "report_to: none",
            "6:14",
            "training.report_to: expected a list (each tensorboard, wandb, mlflow, trackio or swanlab), "
            "found the text 'none'",
            "in brackets it is a list: []",
        ),
        (
            "adapter",
            "layers_to_transform: 5",
            "8:24",
            "adapter.layers_to_transform: expected a list (each a whole number of at least 0) or null, "
            "found the number 5",
            "in brackets it is a list: [5]",
        ),
        ("adapter", "lora_r: 8", "8:3", "adapter.lora_r: unknown key", "here it is adapter.r"),
        ("adapter", "type: lora", "8:3", "adapter.type: unknown key", "here it is adapter.method"),
        (
            "training",
            "per_device_eval_batch_size: 4",
            "6:3",
            "training.per_device_eval_batch_size: unknown key",
            "here it is training.per_device_train_batch_size, for validation as well",
        ),
        (
            "training",
            "report_to: [wand]",
            "6:15",
            "training.report_to[0]: expected tensorboard, wandb, mlflow, trackio or swanlab, found the text 'wand'",
            "did you mean 'wandb'?",
        ),
        (
            "training",
            "seed: 4294967296",
            "6:9",
            "training.seed: expected a whole number of at least 0 and below 4294967296, found the number 4294967296",
            None,
        ),
        (
            "data",
            "validation: 0.0",
            "4:15",
            "data.validation: expected a number above 0 and below 1, found the number 0.0",
            "to go without, write null",
        ),
        (
            "training",
            "max_steps: -1",
            "6:14",
            "training.max_steps: expected a whole number of at least 1 and up to 99999999, found the number -1",
            "to go without, write null",
        ),
        (
            "data",
            "validation: 1",
            "4:15",
            "data.validation: expected a number above 0 and below 1, found the number 1",
            None,
        ),
        (
            "data",
            "validation: true",
            "4:15",
            "data.validation: expected a number above 0 and below 1, text, "
            "a list (each text or a mapping of path, weight, name, split, streaming) or null, found true",
            None,
        ),
        (
            "data",
            "validation: [{pth: x, path: y}]",
            "4:17",
            "data.validation[0].pth: unknown key",
            "did you mean 'path'?",
        ),
        ("data", "validation: [a, {weight: 2}]", "4:19", "data.validation[1].path: missing, expected text", ...),
        (
            "data",
            "validation: [{path: a, weight: 0}]",
            "4:34",
            "data.validation[0].weight: expected a number above 0 and up to 100000, found the number 0",
            None,
        ),
        (
            "data",
            "validation: [{path: a, weight: 1e300}]",
            "4:34",
            "data.validation[0].weight: expected a number above 0 and up to 100000, found the number 1e+300",
            None,
        ),
        (
            "data",
            "validation: [[a]]",
            "4:16",
            "data.validation[0]: expected text or a mapping of path, weight, name, split, streaming, found a list",
            None,
        ),
        ("data", "columns: {prompt: 3}", "4:21", "data.columns.prompt: expected text, found the number 3", ...),
        ("data", "columns: x", "4:12", "data.columns: expected a mapping of names to text, found the text 'x'", None),
        (
            "data",
            "template: {completion: x, promt: y}",
            "4:29",
            "data.template.promt: unknown key",
            "did you mean 'prompt'?",
        ),
        (
            "data",
            "format: template",
            "4:11",
            "data.format: template needs data.template with a completion pattern",
            None,
        ),
        (
            "data",
            "format: chat\n  template: {completion: x}",
            "5:13",
            "data.template: needs format: template, but data.format is chat",
            None,
        ),
        (
            "training",
            "early_stopping_patience: 3",
            "6:28",
            "training.early_stopping_patience: needs data.validation, which is null",
            None,
        ),
        (
            "training",
            "warmup_ratio: 0.1\n  warmup_steps: 5",
            "7:17",
            "training.warmup_steps: warmup_ratio is given too (0.1); keep one",
            None,
        ),
        (
            "training",
            "max_steps: 1\n  warmup_steps: 5",
            "7:17",
            "training.warmup_steps: with max_steps: 1 the learning rate would be 0; set it to 0",
            None,
        ),
    ],
)
def test_a_wrong_key_or_value(section: str, line: str, where: str, what: str, hint: Any) -> None:
    found = fault(with_key(section, line))
    assert found.where == f"r.yaml:{where}"
    assert found.what == what
    if hint is not ...:
        assert found.hint == hint or (hint is None and (found.hint or "known: ").startswith("known: "))


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("learning_rate: 1e-4", "learning_rate belongs in training: write training.learning_rate"),
        ("quantisation: {method: nf4}", "did you mean 'quantization'?"),
        ("max_lenght: 3", "did you mean 'data.max_length'?"),
        ("bse: x.yaml", "did you mean 'base'?"),
        ("zzz: 1", "known: adapter, base, data, model, quantization, training"),
        ("zzz:", "remove it: it has no value"),
        ("trianing:", "did you mean 'training'?"),
        ("load_in_4bit: true", "here it is quantization.method: nf4"),
        ("load_in_4bit: false", "leave it out: true is quantization.method: nf4 here"),
        ("bf16:", "leave it out: true is model.dtype: bfloat16 here"),
        ("sample_packing: false", "here it is data.packing"),
        ("sequence_len: 512", "here it is data.max_length"),
        ("train_on_inputs: false", "leave it out: true is data.train_on: all here"),
        ("evals_per_epoch: 4", "here it is training.eval_steps, in steps"),
        ("double_quantization: false", "here it is quantization.double_quant"),
        ("chat_template: llama3", "leave it out: a chat goes through the tokenizer's own template"),
        ("template: llama3", "leave it out: a chat goes through the tokenizer's own template"),
        ("template: {completion: x}", "template belongs in data: write data.template"),
        ("model_type: LlamaForCausalLM", "leave it out: this is read from the model's and the data's files"),
        ("do_train: true", "leave it out: nothing here needs it"),
        ("local_rank:", "leave it out: nothing here needs it"),
        ("pretraining_dataset: c4", "here it is data.train"),
        ("max_samples: 9", "leave it out: give fewer rows, or a source in data.train a weight below 1"),
        ("use_4bit_quantization: true", "here it is quantization.method: nf4"),
        ("max_steps_per_epoch: 9", "here it is training.max_steps, of the whole run"),
        ("export_dir: out", "leave it out: use lora merge ADAPTER --out FOLDER"),
        ("use_mlflow: true", "here it is training.report_to: [mlflow]"),
        ("use_wandb: false", "leave it out: true is training.report_to: [wandb] here"),
        ("gradient_clipping: 1.0", "here it is training.max_grad_norm"),
        ("flex_attention: true", "here it is model.attn_implementation: flex_attention"),
        ("float16: true", "here it is model.dtype: float16"),
        ("dataset_test_split: test", "here it is data.validation, a list of mappings: [{path: ..., split: ...}]"),
        ("train_on_responses_only: true", "here it is data.train_on: completion"),
        ("use_galore: true", "leave it out: the optimizer is AdamW, with its state in 32 or 8 bits"),
        ("temperature: 0.7", "leave it out: lora generates no text"),
        ("peft_config: {}", "leave it out: its settings are keys of adapter"),
        ("lora_modules_to_save: [lm_head]", "leave it out: an adapter trains LoRA's own weights only"),
    ],
)
def test_unknown_top_level_keys(line: str, hint: str) -> None:
    found = fault(MINIMAL + line + "\n")
    assert found == Fault(f"{line.partition(':')[0]}: unknown key", "r.yaml:7:1", hint)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("adapter.method=dora", "adapter.use_dora: true"),
        ("adapter.method=rslora", "adapter.use_rslora: true"),
        ("adapter.method=qlora", "quantization.method: nf4"),
        ("quantization.method=4bit", "quantization.method: nf4"),
        ("quantization.method=int4", "quantization.method: nf4"),
        ("data.format=chat_template", "data.format: chat"),
        ("data.format=completion", "data.format: text"),
        ("training.warmup_steps=0.1", "training.warmup_ratio"),
        ("training.lr_scheduler_type=cosine_with_restarts", "training.lr_scheduler_type: cosine, without restarts"),
        ("training.optim=adamw", "training.optim: adamw_torch"),
        ("training.gradient_checkpointing=unsloth", "training.gradient_checkpointing: offload"),
        ("training.optim=paged_adamw_32bit", "training.optim: adamw_torch, which is not paged"),
        ("adapter=qlora", "quantization.method: nf4"),
        ("quantization.method=4", "quantization.method: nf4"),
        ("quantization.method=8bit", "quantization.method: int8"),
        ("model.dtype=fp16", "model.dtype: float16"),
        ("quantization.compute_dtype=fp16", "quantization.compute_dtype: float16"),
        ("model.attn_implementation=flash_attn", "model.attn_implementation: flash_attention_2"),
        ("training.optim=AdamW", "training.optim: adamw_torch"),
        ("training.eval_steps=0.1", "training.eval_steps, in steps"),
        ("data.format=sharegpt", "data.format: chat"),
    ],
)
def test_a_peers_value_is_not_told_the_one_spelt_most_like_it(override: str, hint: str) -> None:
    assert fault(MINIMAL, override).hint == f"here it is {hint}"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        (
            "adapter.method=adalora",
            "leave it out: LoRA is the only kind (with adapter.use_dora, adapter.use_rslora); no",
        ),
        ("training.optim=adafactor", "leave it out: the optimizer is AdamW, with its state in 32 or 8 bits"),
        ("quantization.method=fp8", "write nf4, fp4 or int8, or leave the section out: a base is quantized to no"),
        ("training.torch_compile=inductor", ""),
        ("training.report_to=comet_ml", ""),
        ("training.report_to=wandb,mlflow", "in brackets it is a list: [wandb,mlflow]"),
        ("adapter.layers_to_transform=all", ""),
        ("adapter.layers_to_transform=none", "to go without, write null"),
        ("adapter.layers_to_transform=-1", "to go without, write null"),
        ("training.report_to=none", "in brackets it is a list: []"),
        ("adapter.target_modules=''", ""),
        ("data.train=''", ""),
        ("adapter.layers_to_transform=6,7", "in brackets it is a list: [6,7]"),
    ],
)
def test_a_peers_value_without_a_counterpart_is_not_told_another(override: str, hint: str) -> None:
    found = fault(MINIMAL, override).hint or ""
    assert found.startswith(hint) and bool(found) == bool(hint)


@pytest.mark.parametrize("known", [LoraConfig, TrainingArguments])
def test_a_field_of_peft_and_transformers_is_told_what_it_is_here(known: Any) -> None:
    hints = {field.name: fault(MINIMAL + f"{field.name}: true\n").hint for field in dataclasses.fields(known)}
    told = {name for name, hint in hints.items() if re.match(rf"{name} belongs in|here it is|leave it out", hint or "")}
    assert hints.keys() - told == set()


def test_a_data_sets_configuration_belongs_to_its_source() -> None:
    hint = fault(with_key("data", "name: main")).hint
    assert hint == "here it is data.train, a list of mappings: [{path: ..., name: ...}]"


def test_what_is_told_for_a_peers_key_is_a_key_here() -> None:
    homes = {re.split("[:,]", here)[0] for here in EQUIVALENTS.values()}
    assert homes <= set(dotted_keys())


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("num_train_epochs", "1e300", "a number above 0 and up to 100000"),
        ("max_steps", "9" * 40, "a whole number of at least 1 and up to 99999999 or null"),
        ("per_device_train_batch_size", "1" + "0" * 18, "a whole number of at least 1 and up to 1000000"),
        ("gradient_accumulation_steps", "1" + "0" * 18, "a whole number of at least 1 and up to 1000000"),
    ],
)
def test_more_than_any_run_takes_is_refused(key: str, value: str, wanted: str) -> None:
    found = fault(with_key("training", f"{key}: {value}"))
    assert found.where == f"r.yaml:6:{5 + len(key)}"
    assert found.what.startswith(f"training.{key}: expected {wanted.removesuffix(' or null')}, found the number ")
    assert expected(schema_at(("training", key))).startswith(wanted)


def test_missing_sections_and_keys() -> None:
    found = faults("model: {}\ndata:\n")
    assert [(each.where, each.what, each.hint) for each in found][1:] == [
        ("r.yaml:1:1", "training: missing", "it needs training.output_dir"),
        ("r.yaml:2:1", "data: missing", "it needs data.train"),
    ]
    assert found[0].what == "model.name_or_path: missing, expected text"
    assert "Folder" in (found[0].hint or "")


def test_a_section_that_is_no_mapping() -> None:
    assert fault(MINIMAL + "adapter: lora\n") == Fault(
        "adapter: expected a mapping, found the text 'lora'", "r.yaml:7:10", "lora explain adapter lists its keys"
    )


def test_all_faults_at_once_in_the_files_order() -> None:
    text = """\
model:
  name_or_path: 7
  dtype: bf16
quantisation: {}
adapter:
  rr: 3
  r: true
  r: 4
  init_from: ${LORA_TEST_UNSET}
data:
  train:
    - {path: a, wieght: 2}
    - 3
  max_length: 1
learning_rate: 3
training:
  seed: x
"""
    found = faults(text, "adapter.use_dora=2", "nonsense", "adapter.lora_alpha=[")
    assert [(each.where or "").removeprefix("r.yaml:") for each in found] == [
        "2:17",
        "3:10",
        "4:1",
        "6:3",
        "7:6",
        "8:3",
        "9:14",
        "12:17",
        "13:7",
        "14:15",
        "15:1",
        "16:1",
        "17:9",
        "adapter.lora_alpha=[ (command line)",
        "adapter.use_dora=2 (command line)",
        "nonsense (command line)",
    ]


def test_messages_print_and_carry_no_pydantic_words() -> None:
    with pytest.raises(UserError) as caught:
        load(with_key("adapter", "r: x\n  zz: 1"))
    assert str(caught.value).startswith("r.yaml:8:6: adapter.r: expected")
    assert "pydantic" not in str(caught.value)
    assert "Input should" not in str(caught.value)
    assert caught.value.exit_code == 2


# Environment


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: ${LR}", 3e-4),
        ("learning_rate: ${LR:-1e-4}", 3e-4),
        ("learning_rate: ${UNSET:-1e-4}", 1e-4),
        ("learning_rate: ${EMPTY:-1e-4}", 1e-4),
        ("learning_rate: 1${UNSET:-e-4}", 1e-4),
    ],
)
def test_a_variable_is_put_in_before_the_type_is_decided(
    line: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LR", "3e-4")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    assert load(with_key("training", line)).training.learning_rate == value


@pytest.mark.parametrize(
    ("value", "expected_value"),
    [
        ("'${N}'", "5"),
        ('"a ${N} b"', "a 5 b"),
        ("a/${N}/${N}", "a/5/5"),
        ("$${N}", "${N}"),
        ("$$${N}", "$${N}"),
        ("$N", "$N"),
        ("${REF}", "${N}"),
        ("${LIST}", "[a, b]"),
        ("'${EMPTY}x'", "x"),
        ("${EMPTY}", None),
    ],
)
def test_variables_in_text(value: str, expected_value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N", "5")
    monkeypatch.setenv("REF", "${N}")
    monkeypatch.setenv("LIST", "[a, b]")
    monkeypatch.setenv("EMPTY", "")
    assert load(with_key("adapter", f"init_from: {value}")).adapter.init_from == expected_value


def test_a_plain_variable_that_holds_a_number_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N", "5")
    assert fault(with_key("adapter", "init_from: ${N}")).hint == "in quotes it is text"


def test_an_unset_variable_is_named_and_told_once() -> None:
    found = fault(with_key("data", "validation: [a, '${LORA_TEST_UNSET}']"))
    assert found.where == "r.yaml:4:19"
    assert fault("base: ${LORA_TEST_UNSET}\n" + MINIMAL) == Fault(found.what, "r.yaml:1:7", found.hint)
    both = faults(with_key("data", "colums: ${LORA_TEST_UNSET}"))
    assert [each.what for each in both] == ["data.colums: unknown key", found.what]
    assert found.what == "the environment variable LORA_TEST_UNSET is not set"


def test_an_unset_variable_is_no_missing_key_and_breaks_no_rule() -> None:
    text = with_key("data", "validation: ${LORA_TEST_UNSET}").replace(
        "training:", "training:\n  early_stopping_patience: 2"
    )
    assert "LORA_TEST_UNSET" in fault(text).what
    assert "LORA_TEST_UNSET" in fault(MINIMAL.replace("rows.jsonl", "${LORA_TEST_UNSET}")).what


@pytest.mark.parametrize("value", ["${", "${}", "${1X}", "${A", "${A-b}", "${A:-${B}}"])
def test_a_malformed_variable(value: str) -> None:
    assert "'${' without" in faults(with_key("adapter", f"init_from: '{value}'"))[0].what


def test_a_variable_in_brackets_is_told_to_be_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M", "q_proj")
    assert 'needs quotes: "${VAR}"' in (fault(with_key("adapter", "target_modules: [${M}]")).hint or "")
    assert load(with_key("adapter", 'target_modules: ["${M}"]')).adapter.target_modules == ("q_proj",)
    monkeypatch.setenv("M", "7")  # quotes would make it text
    assert "for a number give the key its own line" in (fault("adapter: {r: ${M}}\n" + MINIMAL).hint or "")
    assert load(with_key("adapter", "r: ${M}")).adapter.r == 7


def test_keys_take_no_variables() -> None:
    assert fault(with_key("adapter", "'${HOME}': 1")).what == "adapter.${HOME}: unknown key"


# Base


def test_a_base_gives_the_keys_that_the_recipe_leaves_out() -> None:
    Path("sub").mkdir()
    Path("root.yaml").write_text(MINIMAL + "quantization: {method: int8}\nadapter: {r: 4, lora_alpha: 8}\n")
    Path("sub/mid.yaml").write_text("base: ../root.yaml\nadapter: {r: 5}\n")
    recipe = load("base: sub/mid.yaml\nadapter: {lora_dropout: 0.5}\ndata: {train: [a, b]}\nquantization:\n")
    assert (recipe.adapter.r, recipe.adapter.lora_alpha, recipe.adapter.lora_dropout) == (5, 8, 0.5)
    assert recipe.data.train == ("a", "b")
    assert recipe.model.name_or_path == "tiny"
    assert recipe.quantization is None


def test_a_section_with_nothing_under_it_is_its_bases() -> None:
    Path("a.yaml").write_text(MINIMAL + "adapter: {r: 64}\n")
    Path("b.yaml").write_text("base: a.yaml\nadapter:\n  # r: 8\ndata:\n")
    assert load_recipe("b.yaml") == load_recipe("a.yaml")
    assert load_recipe("b.yaml", ["adapter=null"]).adapter.r == 16


def test_a_section_nulled_halfway_does_not_come_back() -> None:
    Path("a.yaml").write_text(MINIMAL + "quantization: {method: int8, double_quant: false}\n")
    Path("b.yaml").write_text("base: a.yaml\nquantization: null\n")
    recipe = load("base: b.yaml\nquantization: {method: fp4}\n")
    assert recipe.quantization is not None
    assert (recipe.quantization.method, recipe.quantization.double_quant) == ("fp4", True)


def test_faults_point_to_the_file_that_holds_the_key() -> None:
    Path("sub").mkdir()
    Path("sub/root.yaml").write_text(MINIMAL + "adapter:\n  rr: 4\n  r: x\n  lora_alpha: y\n")
    found = faults("base: sub/root.yaml\nadapter:\n  lora_alpha: 0\n")
    assert [each.where for each in found] == ["r.yaml:3:15", "sub/root.yaml:8:3", "sub/root.yaml:9:6"]
    Path("sub/root.yaml").write_text("data:\n  packing: true\n")
    assert fault("base: sub/root.yaml\n" + MINIMAL.replace("train:", "validation:")).where == "r.yaml:4:1"


def test_an_empty_mapping_takes_away_the_columns_of_the_base() -> None:
    Path("a.yaml").write_text(MINIMAL.replace("data:\n", "data:\n  columns: {prompt: ask, completion: reply}\n"))
    Path("b.yaml").write_text("base: a.yaml\ndata: {columns: {}}\n")
    kept = load_recipe("a.yaml")
    assert load_recipe("a.yaml", ["data.columns={prompt: q}"]).data.columns == {"prompt": "q", "completion": "reply"}
    assert load_recipe("a.yaml", ["data.columns={}"]).data.columns == {} == load_recipe("b.yaml").data.columns
    assert load_recipe("a.yaml", ["data={}", "adapter={}"]) == kept


def test_a_base_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_TEST_BASE", "root.yaml")
    Path("root.yaml").write_text(MINIMAL)
    assert load("base: ${LORA_TEST_BASE}\n") == load(MINIMAL)


def test_an_absolute_base(tmp_path: Path) -> None:
    (tmp_path / "root.yaml").write_text(MINIMAL)
    assert load(f"base: {tmp_path}/root.yaml\n") == load(MINIMAL)


def test_a_circle_of_bases_is_named() -> None:
    Path("a.yaml").write_text("base: b.yaml\n")
    Path("b.yaml").write_text("x: 1\nbase: ./r.yaml\n")
    found = faults("base: a.yaml\n")
    assert found[0].where == "b.yaml:1:1"
    assert found[1] == Fault(
        "base: recipes that name each other: r.yaml → a.yaml → b.yaml → r.yaml", "b.yaml:2:7", None
    )
    Path("sub").mkdir()
    assert "recipes that name each other" in faults("base: sub/../r.yaml\n")[0].what


@pytest.mark.parametrize(
    ("base", "what"),
    [
        ("3", "base: expected a recipe's file name, found the number 3"),
        ("", "base: expected a recipe's file name, found nothing (null)"),
        ("[a.yaml]", "base: expected a recipe's file name, found a list"),
        ("nope.yaml", "base: nope.yaml: no such file"),
        ("'.'", "base: .: this is a folder; a recipe is a YAML file"),
        ('"a\\0b"', "base: a\0b: cannot be read: embedded null byte"),
    ],
)
def test_a_wrong_base_is_the_only_fault_beside_those_of_the_recipe(base: str, what: str) -> None:
    found = faults(f"model: {{}}\nadapter: {{r: 0}}\nbase: {base}\n")
    assert [each.where for each in found] == ["r.yaml:2:14", "r.yaml:3:6" if not base else "r.yaml:3:7"]
    assert found[1].what == what


def test_a_base_that_is_no_yaml() -> None:
    Path("root.yaml").write_text("a: [\n")
    found = fault("base: root.yaml\n")
    assert (found.where or "").startswith("root.yaml:")


# Overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("adapter.r=32", "adapter", "r", 32),
        ("training.learning_rate=1e-4", "training", "learning_rate", 1e-4),
        ("adapter.target_modules=[a, b]", "adapter", "target_modules", ("a", "b")),
        ("data.columns={prompt: q}", "data", "columns", {"prompt": "q"}),
        ("data.columns.prompt=q", "data", "columns", {"prompt": "q"}),
        ("training.eval_steps=", "training", "eval_steps", None),
        ("data.train='a=b'", "data", "train", "a=b"),
        ("data.train=a=b", "data", "train", "a=b"),
        ("adapter.init_from='010'", "adapter", "init_from", "010"),
        (" adapter.r =32", "adapter", "r", 32),
    ],
)
def test_overrides(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load(MINIMAL, override), section), key) == value


def test_the_last_override_wins_over_file_and_base() -> None:
    Path("root.yaml").write_text(MINIMAL + "adapter: {r: 4, lora_alpha: 7}\n")
    recipe = load("base: root.yaml\nadapter: {r: 5}\n", "adapter.r=6", "adapter.r=7")
    assert (recipe.adapter.r, recipe.adapter.lora_alpha) == (7, 7)


def test_overrides_make_and_remove_sections() -> None:
    made = load(MINIMAL, "quantization.method=fp4").quantization
    assert made is not None
    assert (made.method, made.double_quant) == ("fp4", True)
    assert load(MINIMAL + "quantization: {}\n", "quantization=").quantization is None


@pytest.mark.parametrize(
    ("override", "what", "hint"),
    [
        ("adapter.rr=3", "adapter.rr: unknown key", "did you mean 'r'?"),
        ("learning_rate=3", "learning_rate: unknown key", "learning_rate belongs in training: "),
        ("adapter.r=true", "adapter.r: expected a whole number of at least 1, found true", ""),
        ("adapter.r.x=3", "adapter.r: expected a whole number of at least 1, found a mapping", ""),
        ("data.train=", "data.train: expected text or a list", ""),
        ("adapter.r", "expected section.key=value", "e.g. adapter.r=32"),
        ("=3", "expected section.key=value", "e.g. adapter.r=32"),
        ("adapter.=3", "expected section.key=value", "e.g. adapter.r=32"),
        ("", "expected section.key=value", "e.g. adapter.r=32"),
        ("adapter.r=[1", "this '[' is not closed", ""),
        ("adapter.r=${LORA_TEST_UNSET}", "the environment variable LORA_TEST_UNSET is not set", ""),
        ("base=x.yaml", "base: unknown key", "base is written in the recipe's file"),
        ("adapter=lora", "adapter: expected a mapping, found the text 'lora'", ""),
        ("training.output_dir=[", "expected a value here", ""),
    ],
)
def test_a_wrong_override_is_told_by_its_own_text(override: str, what: str, hint: str) -> None:
    found = fault(MINIMAL, override)
    assert found.where == f"{override} (command line)"
    assert found.what.startswith(what)
    assert hint in (found.hint or "")


def test_a_key_missing_beside_an_override_is_missing_in_the_file() -> None:
    found = fault(MINIMAL.replace("  train: rows.jsonl", "  packing: true"), "data.format=text")
    assert found.where == "r.yaml:3:1"


def test_an_override_that_is_not_unicode_can_be_printed() -> None:
    found = fault(MINIMAL, "adapter.\udcff=3")
    str(found).encode()


# Writing


def full_recipe(text: str) -> Recipe:
    base = load(MINIMAL).model_dump()
    base["model"]["name_or_path"] = text
    base["data"] |= {"train": (text, {"path": text, "weight": 1e-5}), "columns": {text: text}}
    base["data"] |= {"format": "template", "template": {"prompt": text, "completion": text}}
    base["adapter"]["target_modules"] = (text, text)
    base["training"] |= {"warmup_steps": 3, "learning_rate": 1e-7, "max_grad_norm": 1e16}
    base["quantization"] = {}
    return Recipe.model_validate(base)


AWKWARD = [
    "1e-4",
    "010",
    "yes",
    "null",
    "~",
    "0o17",
    "0x1F",
    ".nan",
    "true",
    "${X}",
    "$${X}",
    "$$${",
    "a: b",
    "#x",
    " a ",
]
AWKWARD += [
    "'",
    '"',
    "\\",
    "\n",
    "a\n\nb\n",
    "\t",
    "- x",
    "[a]",
    "{a}",
    "*x",
    "&x",
    "!x",
    "%x",
    "@x",
    "`x",
    "|",
    ">",
    "é",
    "😀",
]
AWKWARD += [
    "\x85",
    "\u2028",
    "\ufeff",
    "\x00",
    "\x7f",
    "---",
    "...",
    "?",
    ":",
    "<<",
    "=",
    "2024-01-01",
    "1:30",
    "a" * 500 + " b" * 300,
]


@pytest.mark.parametrize("text", AWKWARD)
def test_what_is_written_reads_back(text: str) -> None:
    recipe = full_recipe(text)
    assert load(dump_recipe(recipe)) == recipe


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_reads_back(text: str) -> None:
    recipe = full_recipe(text)
    assert load(dump_recipe(recipe)) == recipe


def test_a_written_recipe_has_every_key_in_the_schemas_order() -> None:
    written = yaml.safe_load(dump_recipe(load(MINIMAL)))
    assert list(written) == list(Recipe.model_fields)
    assert written["quantization"] is None
    assert list(written["training"]) == list(type(load(MINIMAL).training).model_fields)
    assert load(dump_recipe(load(MINIMAL))) == load(MINIMAL)


def test_a_written_recipe_takes_overrides_of_keys_it_left_at_their_defaults() -> None:
    assert load(dump_recipe(load(MINIMAL)), "training.warmup_steps=10").training.warmup_steps == 10


# Anything at all

_WORDS = st.sampled_from(
    [
        *Recipe.model_fields,
        *(key.partition(".")[2] for key in dotted_keys()),
        "base",
        "path",
        "x",
        "r.yaml",
        "str",
        "Source",
    ]
)
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
_RECIPES = st.fixed_dictionaries(
    {},
    optional={
        name: st.dictionaries(st.sampled_from(sorted(field_names)), _VALUES, max_size=4) | _VALUES
        for name, field_names in {
            section: [key.partition(".")[2] for key in dotted_keys() if key.startswith(f"{section}.")]
            for section in Recipe.model_fields
        }.items()
    },
)
_YAML_LIKE = st.lists(
    st.sampled_from([*"abr:-[]{}&*!|>'\"%@`#,?$~\t\n \\", ": ", "\n  ", "- ", "---\n", "${", "model", "\ufeff"])
)


def load_or_refuse(text: str | bytes, *overrides: str) -> None:
    try:
        assert isinstance(load(text, *overrides), Recipe)
    except UserError as error:
        assert error.faults
        for each in error.faults:
            assert each.where
            assert str(each).encode()


_anything = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.text() | st.binary() | _YAML_LIKE.map("".join))
@_anything
def test_any_text_is_a_recipe_or_a_user_error(text: str | bytes) -> None:
    load_or_refuse(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))


@given(_VALUES | _RECIPES)
@_anything
def test_any_yaml_is_a_recipe_or_a_user_error(value: object) -> None:
    load_or_refuse(json.dumps(value, allow_nan=False) if not _has_odd_float(value) else yaml.safe_dump(value))


@given(st.text(max_size=20) | _YAML_LIKE.map(lambda parts: "adapter.r=" + "".join(parts)))
@_anything
def test_any_override_is_taken_or_a_user_error(override: str) -> None:
    load_or_refuse(MINIMAL, override)


def _has_odd_float(value: object) -> bool:
    if isinstance(value, dict):
        return any(_has_odd_float(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_has_odd_float(inner) for inner in value)
    return isinstance(value, float) and not math.isfinite(value)


# The schema and its reference


def test_every_key_and_section_has_a_description() -> None:
    for section in Section.__subclasses__():
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            assert field.description or section is Recipe, f"{section.__name__}.{name}"


def test_explain_lists_every_key() -> None:
    text = explain(None)
    assert "  base\n" in text
    for key in dotted_keys():
        assert f"\n  {key}\n" in text
    sections = [each for each in Section.__subclasses__() if each.__name__.lower() in Recipe.model_fields]
    assert len(dotted_keys()) == sum(len(each.model_fields) for each in sections)


def test_explain_a_section_and_a_key() -> None:
    section = explain("adapter")
    assert section.startswith("adapter: The adapter that is trained.")
    assert "adapter.r\n" in section
    assert "training." not in section.replace("while training.", "")
    assert (
        explain("adapter.r")
        == "  adapter.r\n      a whole number of at least 1; default 16\n      Rank of the update BA."
    )
    assert "data.train[].weight" in explain("data.train")
    assert "required" in explain("data.train")
    assert "data.template.completion" in explain("data.template")
    assert "base" in explain("base")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("adapter.rr", "adapter.r"),
        ("r", "'adapter.r'"),
        ("method", "'adapter.method'"),
        ("modell", "model"),
        ("lora_r", "here it is adapter.r"),
        ("quantization.type", "here it is quantization.method"),
        ("chat_template", "leave it out: a chat goes through the tokenizer's own template"),
        ("color", "'lora explain' lists them all"),
    ],
)
def test_explain_an_unknown_key(key: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        explain(key)
    assert hint in (caught.value.faults[0].hint or "")


def test_lines_of_the_reference_fit_a_terminal() -> None:
    assert max(len(line) for line in explain(None).splitlines()) <= 80


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("adapter", "r"), "a whole number of at least 1"),
        (("adapter", "lora_dropout"), "a number of at least 0 and below 1"),
        (("training", "max_steps"), "a whole number of at least 1 and up to 99999999 or null"),
        (("training", "gradient_checkpointing"), "true, false, auto or offload"),
        (("adapter", "method"), None),
        (("data", "columns"), "a mapping of names to text"),
        (("data", "train", 0), "text or a mapping of path, weight, name, split, streaming"),
        (("data", "train", 0, "weight"), "a number above 0 and up to 100000"),
    ],
)
def test_expected_words(path: Sequence[str | int], words: str | None) -> None:
    schema = schema_at(path)
    assert expected(schema) == words or (words is None and "lora" in expected(schema))


def test_the_json_schema_is_for_editors() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["title"] == "lora recipe"
    assert schema["properties"]["base"]["type"] == "string"
    assert schema["additionalProperties"] is False
    assert schema["anyOf"] == [{"required": ["base"]}, {"required": ["model", "data", "training"]}]
    assert "required" not in schema["$defs"]["Model"]
    assert schema["$defs"]["Source"]["required"] == ["path"]
    assert "base" not in Recipe.model_json_schema()["properties"]
    json.dumps(schema)


def test_json_schema_and_reference_agree_on_the_schemas_requirements() -> None:
    json_schema()
    assert Data.model_fields["train"].is_required()
    assert "required" in explain("data.train"), "json_schema must not change what the reference is made from"


def test_places_print_as_an_editor_opens_them() -> None:
    assert str(Place("r.yaml", 3, 4)) == "r.yaml:3:4"
    assert str(Place("a=1 (command line)")) == "a=1 (command line)"
