"""Wrong input: told in a short block with its place and a remedy, exit code 2, nothing written, no weights loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
Arguments = list[str | Path]


@dataclass
class World:
    """A folder to go wrong in: what a case needs is put there, then the command's arguments are returned."""

    root: Path
    gpt2: Path
    llama: Path
    write_recipe: Callable[..., Path]
    trained: Callable[[], Path]

    def file(self, name: str, content: str | bytes) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def rows(self, *rows: Any, name: str = "rows.jsonl") -> str:
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))

    def model(self, kind: str = "gpt2", name: str = "model") -> Path:
        """A copy of a tiny model, to damage."""
        shutil.copytree(getattr(self, kind), self.root / name)
        return Path(name)

    def run(self) -> Path:
        """A finished run beside its base, to damage: run/ and base/."""
        home = self.trained()
        for part in ("base", "run"):
            shutil.copytree(home / part, self.root / part)
        for path in self.root.glob("run/**/*"):
            if path.suffix in (".json", ".yaml"):
                path.write_text(path.read_text().replace(str(home), str(self.root)))
        return Path("run")

    def train(self, changes: dict[str, Any] | None = None, *arguments: str, data: str | None = None) -> Arguments:
        changes = dict(changes or {})
        if data is not None:
            changes["data.train"] = data
        changes.setdefault("model.name_or_path", self.gpt2)
        return ["train", self.write_recipe(changes), *arguments]

    def edit_json(self, path: str | Path, **changes: Any) -> None:
        file = self.root / path
        content = json.loads(file.read_text())
        for key, value in changes.items():
            content.pop(key, None)
            if value is not ...:
                content[key] = value
        file.write_text(json.dumps(content))

    def tensors(self, path: str | Path, change: Callable[[dict[str, Any]], None]) -> None:
        """Rewrite a safetensors file after ``change`` had its way with the tensors."""
        from safetensors.torch import load_file, save_file

        tensors = load_file(self.root / path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.root / path, {"format": "pt"})

    def truncate(self, path: str | Path, keep: float = 0.5) -> None:
        os.truncate(self.root / path, int((self.root / path).stat().st_size * keep))


@dataclass(frozen=True)
class Case:
    name: str
    arguments: Callable[[World], Arguments]
    says: tuple[str, ...]
    loads: bool = False


CASES: list[Case] = []


def case(*says: str, loads: bool = False) -> Callable[[Callable[[World], Arguments]], Callable[[World], Arguments]]:
    """Put a way to go wrong into the table: ``says`` are words that stderr must hold."""

    def put(arguments: Callable[[World], Arguments]) -> Callable[[World], Arguments]:
        CASES.append(Case(arguments.__name__, arguments, says, loads))
        return arguments

    return put


# The recipe. (tests/test_recipe.py has many more, through load_recipe.)


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


@case("recipe.yaml:2:3: adapter.a0: unknown key", "... and 288 more")
def hundreds_of_faults(w: World) -> Arguments:
    return ["train", w.file("recipe.yaml", "adapter:\n" + "".join(f"  a{n}: 1\n" for n in range(297)))]


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


@case("recipe.yaml:", "HF_TOKEN looks to be a secret", "leave it in the environment")
def secret_in_a_recipe(w: World) -> Arguments:
    return w.train({"model.name_or_path": "https://user:${HF_TOKEN}@hub/model"})


@case("training.output_dir=${wandb_api_key:-runs} (command line)", "looks to be a secret")
def secret_in_an_override(w: World) -> Arguments:
    return w.train({}, "training.output_dir=${wandb_api_key:-runs}")


@case("recipes", "this is a folder", "did you mean 'recipes/recipe.yaml'?")
def folder_as_recipe(w: World) -> Arguments:
    w.file("recipes/recipe.yaml", "")
    return ["train", "recipes"]


# The adapter's place in the model.


@case("adapter.target_modules: 'q_proj'", "c_attn", "c_proj", "c_fc")
def targets_of_another_architecture(w: World) -> Arguments:
    return w.train({"adapter.target_modules": ["q_proj"]})


@case("adapter.target_modules: 'c_atn'", "did you mean 'c_attn'?")
def misspelt_target(w: World) -> Arguments:
    return w.train({"adapter.target_modules": ["c_fc", "c_atn"]})


@case("adapter.target_modules", r".*\.query", "c_attn")
def pattern_without_match(w: World) -> Arguments:
    return w.train({"adapter.target_modules": r".*\.query"})


@case("adapter.target_modules", "regular expression", "(c_attn", "c_fc")
def broken_pattern(w: World) -> Arguments:
    return w.train({"adapter.target_modules": "(c_attn"})


@case("adapter.r: 64", "32")
def rank_wider_than_the_layer(w: World) -> Arguments:
    return w.train({"adapter.r": 64})


# The model's folder.


@case("nowhere/model", "no such model folder")
def missing_model(w: World) -> Arguments:
    return w.train({"model.name_or_path": "./nowhere/model"})


@case("modl", "no such model folder", "did you mean 'model'?")
def misspelt_model(w: World) -> Arguments:
    w.model()
    return w.train({"model.name_or_path": "modl"})


@case("somebody/something", "HF_HUB_OFFLINE", "not in the local cache")
def hub_id_while_offline(w: World) -> Arguments:
    return w.train({"model.name_or_path": "somebody/something"})


@case("no config.json", "model")
def no_config(w: World) -> Arguments:
    (w.root / w.model() / "config.json").unlink()
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "line 1")
def broken_config(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", '{"model_type": "gpt2"')
    return w.train({"model.name_or_path": "model"})


@case("model/config.json")
def config_that_is_a_list(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", "[]")
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "gpt17")
def unknown_model_type(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", model_type="gpt17")
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "'vit'", "no causal language model")
def model_of_another_kind(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", json.dumps({"model_type": "vit"}))
    return w.train({"model.name_or_path": "model"})


@case("model", "no tokenizer", "tokenizer.json")
def no_tokenizer(w: World) -> Arguments:
    model = w.root / w.model()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    return w.train({"model.name_or_path": "model"})


@case("model", "no usable tokenizer")
def broken_tokenizer(w: World) -> Arguments:
    w.file(f"{w.model()}/tokenizer.json", "{")
    return w.train({"model.name_or_path": "model"})


@case("model", "no usable tokenizer")
def tokenizer_that_is_none(w: World) -> Arguments:
    w.file(f"{w.model()}/tokenizer.json", "{}")
    return w.train({"model.name_or_path": "model"})


@case("model", "tokenizer", "vocabulary", "300")
def tokenizer_of_a_larger_vocabulary(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", vocab_size=300)

    def shorten(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("wte.weight", "lm_head.weight")):
                tensors[name] = tensor[:300]

    w.tensors("model/model.safetensors", shorten)
    return w.train({"model.name_or_path": "model"})


@case("model", "no safetensors weights")
def no_weights(w: World) -> Arguments:
    (w.root / w.model() / "model.safetensors").unlink()
    return w.train({"model.name_or_path": "model"})


@case("model", "no safetensors weights", "pytorch_model.bin", "save the model again with safetensors")
def pickled_weights(w: World) -> Arguments:
    (w.root / w.model() / "model.safetensors").rename(w.root / "model" / "pytorch_model.bin")
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "not a whole safetensors file", "bytes", "again")
def truncated_weights(w: World) -> Arguments:
    w.truncate(w.model() / "model.safetensors")
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "not a whole safetensors file")
def weights_cut_within_the_header(w: World) -> Arguments:
    w.truncate(w.model() / "model.safetensors", 0.001)
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "not a whole safetensors file")
def empty_weights(w: World) -> Arguments:
    w.file(f"{w.model()}/model.safetensors", b"")
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors", "h.0.mlp.c_fc.weight", "[32, 130]", "[32, 128]", "config.json")
def weights_of_another_shape(w: World) -> Arguments:
    def widen(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if name.endswith("h.0.mlp.c_fc.weight"))
        tensors[name] = tensors[name].new_zeros(32, 130)

    w.tensors(w.model() / "model.safetensors", widen)
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors.index.json", "model-00002-of-00002.safetensors")
def missing_shard(w: World) -> Arguments:
    model = w.root / w.model()
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    w.file("model/model.safetensors.index.json", json.dumps({"weight_map": shards}))
    return w.train({"model.name_or_path": "model"})


@case("model/model.safetensors.index.json", "not a readable shard index")
def broken_shard_index(w: World) -> Arguments:
    w.file(f"{w.model()}/model.safetensors.index.json", "{}")
    return w.train({"model.name_or_path": "model"})


@case("model", "lack", "h.1.ln_2.weight", loads=True)
def missing_tensor(w: World) -> Arguments:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.endswith("h.1.ln_2.weight"))]

    w.tensors(w.model() / "model.safetensors", drop)
    return w.train({"model.name_or_path": "model"})


@case("an adapter", "base")
def adapter_given_as_model(w: World) -> Arguments:
    return w.train({"model.name_or_path": str(w.run() / "adapter")})


@case("model", "quantized already (bitsandbytes)", "leave the quantization out")
def quantize_again_in_training(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return w.train({"model.name_or_path": "model", "quantization.method": "nf4"})


@case("model", "quantized already (gptq)", "unquantized model")
def quantize_again(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    return ["quantize", "model", "--out", "out"]


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@case("model/model.safetensors", "not a whole safetensors file")
def weights_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    w.file(f"{w.model()}/model.safetensors", LFS)
    return w.train({"model.name_or_path": "model"})


@case("model/config.json", "not readable")
def config_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", LFS)
    return ["quantize", "model", "--out", "out"]


@case("model/config.json", "'t5'", "no causal language model")
def encoder_and_decoder(w: World) -> Arguments:
    w.file(f"{w.model()}/config.json", json.dumps({"model_type": "t5"}))
    return ["eval", "model", "--data", w.rows(ROW)]


@case("model/config.json", "None")
def config_without_a_type(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", model_type=...)
    return ["eval", "model", "--data", w.rows(ROW)]


@case("model/config.json", "['gpt2']", "unknown to transformers")
def config_with_a_type_that_is_a_list(w: World) -> Arguments:
    w.edit_json(w.model() / "config.json", model_type=["gpt2"])
    return w.train({"model.name_or_path": "model"})


@case("run/adapter/adapter_model.safetensors", "not a whole safetensors file")
def adapter_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/adapter_model.safetensors", LFS)
    return ["eval", "run", "--data", w.rows(ROW)]


@case("run/adapter/adapter_config.json")
def adapter_config_that_is_a_list(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/adapter_config.json", "[]")
    return ["eval", "run", "--data", w.rows(ROW)]


@case("run/adapter/provenance.json")
def provenance_that_is_broken(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/provenance.json", "{")
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "h.9.attn.c_attn")
def adapter_with_a_tensor_too_many(w: World) -> Arguments:
    w.run()

    def add(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "h.1.attn.c_attn" in name]:
            tensors[name.replace("h.1.", "h.9.")] = tensors[name].clone()

    w.tensors("run/adapter/adapter_model.safetensors", add)
    return ["eval", "run", "--data", w.rows(ROW)]


@case("File name too long", "choose another name")
def output_of_too_long_a_name(w: World) -> Arguments:
    return w.train({"training.output_dir": "x" * 300})


@case("File name too long", "choose another name")
def merge_into_too_long_a_name(w: World) -> Arguments:
    return ["merge", w.run(), "--out", "x" * 300]


# The data.

ROW = {"question": "Why?", "answer": " Because."}


@case("rows.jsonl:3", "not valid JSON", "one JSON object a line")
def broken_json_line(w: World) -> Arguments:
    rows = f"{json.dumps(ROW)}\n\n{{'question': 1}}\n{json.dumps(ROW)}\n"
    return w.train(data=w.file("rows.jsonl", rows))


@case("rows.jsonl:2", "rows.jsonl:4")
def two_broken_lines_at_once(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", f"{json.dumps(ROW)}\n{{\n{json.dumps(ROW)}\n]\n"))


@case("rows.jsonl:1", "rows.jsonl:10", "there may be more")
def a_hundred_broken_lines(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", "oops\n" * 100))


@case("rows.jsonl:2", "not UTF-8", "0xe9", "save the file as UTF-8")
def jsonl_in_latin_1(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", json.dumps(ROW).encode() + b'\n{"question": "caf\xe9", "answer": " x"}\n'))


@case("rows.csv:3", "not UTF-8", "0xe9", "UTF-8")
def csv_in_latin_1(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", b"question,answer\na,b\ncaf\xe9,d\n"))


@case("rows.json:2", "not UTF-8")
def json_in_utf_16(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", b"[\n\xff\xfe]"))


@case("rows.jsonl", "holds no rows", "at least one row")
def empty_file(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", ""))


@case("rows.json", "holds no rows")
def empty_list(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", "[]"))


@case("rows.csv", "holds no rows")
def csv_with_a_header_alone(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", "question,answer\n"))


@case("empty.jsonl", "holds no rows")
def empty_part_of_a_mixture(w: World) -> Arguments:
    return w.train({"data.train": [w.rows(ROW), {"path": w.file("empty.jsonl", "\n\n"), "weight": 2.0}]})


@case("rows.jsnl", "no such data file", "did you mean 'rows.jsonl'?")
def misspelt_file(w: World) -> Arguments:
    w.rows(ROW)
    return w.train(data="rows.jsnl")


@case("data/train.jsonl", "no such data file", "paths are relative to")
def missing_file(w: World) -> Arguments:
    return w.train(data="data/train.jsonl")


@case("validation.jsonl", "no such data file")
def missing_validation_file(w: World) -> Arguments:
    return w.train({"data.validation": "validation.jsonl"})


@case("folder", "holds no data file", ".jsonl", ".parquet")
def folder_without_data(w: World) -> Arguments:
    w.file("folder/readme.md", "nothing")
    return w.train(data="folder")


@case("folder/*.jsonl", "no data file matches")
def glob_without_match(w: World) -> Arguments:
    return w.train(data="folder/*.jsonl")


@case("rows.xlsx", "cannot read files of type '.xlsx'", ".csv")
def unknown_suffix(w: World) -> Arguments:
    return w.train(data=w.file("rows.xlsx", "PK"))


@case("somebody/rows", "hub")
def data_on_the_hub_while_offline(w: World) -> Arguments:
    return w.train(data="somebody/rows")


@case("rows.csv:3", "3 cells under 2 columns", "question, answer")
def ragged_csv(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", "question,answer\na,b\na,b,c\n"))


@case("rows.csv:1", "column named twice: answer")
def csv_column_twice(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", "answer,answer\na,b\n"))


@case("rows.csv:", "not valid CSV")
def csv_quote_left_open(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", 'question,answer\na,"b\n'))


@case("rows.parquet", "not a readable Parquet file")
def broken_parquet(w: World) -> Arguments:
    return w.train(data=w.file("rows.parquet", b"PAR1 no PAR1"))


@case("rows.jsonl:2", "expected a JSON object, found a list")
def json_line_that_is_no_object(w: World) -> Arguments:
    return w.train(data=w.rows(ROW, [1, 2]))


@case("rows.json (row 2)", "expected an object, found a number")
def json_item_that_is_no_object(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", json.dumps([ROW, 5])))


@case("rows.json:2", "not valid JSON")
def broken_json(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", '[\n{"question": ]'))


@case("rows.json", "expected a list of objects, found an object")
def json_that_is_no_list(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", json.dumps(ROW)))


@case("rows.jsonl:2", "no column 'completion' or 'answer'", "columns seen: question, reply", "data.columns")
def row_without_a_column(w: World) -> Arguments:
    return w.train(data=w.rows(ROW, {"question": "Why?", "reply": " x"}))


@case("rows.jsonl:2", "column 'answer' is null", "columns seen: question, answer")
def row_with_null(w: World) -> Arguments:
    return w.train(data=w.rows(ROW, ROW | {"answer": None}))


@case("rows.jsonl:1", "column 'answer' holds", "number", "expected text")
def row_with_a_number(w: World) -> Arguments:
    return w.train(data=w.rows(ROW | {"answer": 5}, ROW))


@case("rows.jsonl:1", "half a character", "\\ud800")
def row_with_a_lone_surrogate(w: World) -> Arguments:
    return w.train(data=w.rows({"text": "half \ud83d"}))


@case("rows.jsonl:1", "ask, reply", "prompt/question + completion/answer", "data.columns")
def columns_unknown_to_auto(w: World) -> Arguments:
    return w.train(data=w.rows({"ask": "Why?", "reply": "x"}))


@case("rows.jsonl:1", "no column", "asked", "columns seen: question, answer")
def mapped_column_missing(w: World) -> Arguments:
    return w.train({"data.columns": {"prompt": "asked"}, "data.format": "prompt_completion"}, data=w.rows(ROW))


def chat(w: World, *turns: Any, model: str = "llama") -> Arguments:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    changes = {"data.format": "chat", "model.name_or_path": getattr(w, model)}
    return w.train(changes, data=w.rows(good, *({"messages": turn} for turn in turns)))


@case("rows.jsonl:2", "messages[0]", "unknown role 'robot'", "user, assistant")
def chat_with_a_bad_role(w: World) -> Arguments:
    return chat(w, [{"role": "robot", "content": "Beep"}])


@case("rows.jsonl:2", "messages", "list of turns", "{role, content}")
def chat_without_turns(w: World) -> Arguments:
    return chat(w, [])


@case("rows.jsonl:2", "messages[1]", "null or missing")
def chat_with_null_content(w: World) -> Arguments:
    return chat(w, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}])


@case("rows.jsonl:2", "messages[0]", "expected a turn")
def chat_turn_that_is_text(w: World) -> Arguments:
    return chat(w, ["Hi"])


@case("chat template", "instruct model", "data.format")
def chat_without_a_template(w: World) -> Arguments:
    return chat(w, model="gpt2")


@case("rows.jsonl:2", "chat template", "roles must alternate")
def conversation_that_the_template_refuses(w: World) -> Arguments:
    text = "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant')|int %}"
    text += "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role + m.content }}{% endfor %}"
    w.file(f"{w.model('llama')}/chat_template.jinja", text)
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    twice = {"messages": [good["messages"][0], *good["messages"]]}
    return w.train({"data.format": "chat", "model.name_or_path": "model"}, data=w.rows(good, twice))


@case("chat template is broken", "line 1", "chat_template.jinja")
def broken_chat_template(w: World) -> Arguments:
    w.file(f"{w.model('llama')}/chat_template.jinja", "{% for m in messages %}{{ m.content ")
    rows = w.rows({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    return w.train({"data.format": "chat", "model.name_or_path": "model"}, data=rows)


def template(w: World, prompt: str, completion: str) -> Arguments:
    return w.train({"data.template": {"prompt": prompt, "completion": completion}}, data=w.rows(ROW))


@case("data.template.prompt", "{{ and }}")
def template_with_an_open_brace(w: World) -> Arguments:
    return template(w, "Q: {question", " {answer}")


@case("data.template.completion", "answer.__class__", "write {column}")
def template_that_reaches_into_a_value(w: World) -> Arguments:
    return template(w, "Q: {question}", " {answer.__class__}")


@case("data.template.prompt", "no column", "write {column}")
def template_with_an_empty_field(w: World) -> Arguments:
    return template(w, "Q: {}", " {answer}")


@case("rows.jsonl:1", "no column 'reply'", "columns seen: question, answer")
def template_of_a_missing_column(w: World) -> Arguments:
    return template(w, "Q: {question}", " {reply}")


@case("data.train", "nothing to learn", "first 4", "data.max_length")
def nothing_left_to_learn(w: World) -> Arguments:
    return w.train({"data.max_length": 4}, data=w.rows({"question": "Why do swallows fly? " * 9, "answer": " So."}))


@case("data.validation", "none", "first 4")
def nothing_left_to_evaluate(w: World) -> Arguments:
    long = w.rows({"question": "Why do swallows fly? " * 9, "answer": " So."}, name="long.jsonl")
    return w.train({"data.max_length": 4, "data.validation": long}, data=w.rows({"text": "Swallows fly."}))


@case("rows.jsonl", "at least two rows")
def share_of_one_row(w: World) -> Arguments:
    return w.train({"data.validation": 0.5}, data=w.rows(ROW))


# The run's folder.


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


# Adapters.


@case("no adapter here", "adapter_config.json", "give a run or an adapter folder")
def merge_of_no_adapter(w: World) -> Arguments:
    w.file("folder/x", "")
    return ["merge", "folder", "--out", "out"]


@case("run/adapter/adapter_config.json", "line 1")
def broken_adapter_config(w: World) -> Arguments:
    w.file(f"{w.run()}/adapter/adapter_config.json", "{")
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "adapter_model.safetensors", "missing")
def adapter_without_weights(w: World) -> Arguments:
    (w.root / w.run() / "adapter" / "adapter_model.safetensors").unlink()
    return ["merge", "run", "--out", "out"]


@case("run/adapter/adapter_model.safetensors", "not a whole safetensors file")
def truncated_adapter(w: World) -> Arguments:
    w.truncate(w.run() / "adapter" / "adapter_model.safetensors")
    return ["merge", "run", "--out", "out"]


@case("PREFIX_TUNING", "run/adapter")
def adapter_of_another_kind(w: World) -> Arguments:
    w.edit_json(w.run() / "adapter" / "adapter_config.json", peft_type="PREFIX_TUNING")
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "base that this adapter is for is not found", "no such model folder", "put it back")
def base_missing(w: World) -> Arguments:
    w.run()
    shutil.rmtree(w.root / "base")
    return ["merge", "run", "--out", "out"]


def _other_weights(tensors: dict[str, Any]) -> None:
    for tensor in tensors.values():
        tensor += 1.0


@case("run/adapter", "another base", "restore that base")
def base_changed(w: World) -> Arguments:
    w.run()
    w.tensors("base/model.safetensors", _other_weights)
    return ["merge", "run", "--out", "out"]


@case("run/adapter", "another base")
def base_changed_before_eval(w: World) -> Arguments:
    w.run()
    w.tensors("base/model.safetensors", _other_weights)
    return ["eval", "run", "--data", w.rows(ROW)]


def _forget_base(w: World) -> None:
    """An adapter made elsewhere says no more of its base than a name."""
    (w.root / "run" / "adapter" / "provenance.json").unlink()


@case("lora_A", "does not fit its base", "another base")
def adapter_of_other_names(w: World) -> Arguments:
    w.run()
    _forget_base(w)
    shutil.rmtree(w.root / "base")
    w.model("llama", "base")
    return ["merge", "run", "--out", "out"]


@case("48 -> 96", "the base's is 32 -> 96", "does not fit its base", "another base")
def adapter_of_other_shapes(w: World) -> Arguments:
    w.run()
    _forget_base(w)

    def widen(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("c_attn.lora_A.weight"):
                tensors[name] = tensor.new_zeros(tensor.shape[0], 48)

    w.tensors("run/adapter/adapter_model.safetensors", widen)
    return ["merge", "run", "--out", "out"]


@case("h.0.attn.c_attn.lora_B.weight is missing")
def adapter_without_a_tensor(w: World) -> Arguments:
    w.run()

    def drop(tensors: dict[str, Any]) -> None:
        del tensors[next(name for name in tensors if name.endswith("h.0.attn.c_attn.lora_B.weight"))]

    w.tensors("run/adapter/adapter_model.safetensors", drop)
    return ["merge", "run", "--out", "out"]


@case("h.1.attn.c_attn", "missing")
def adapter_without_a_layer(w: World) -> Arguments:
    w.run()

    def drop(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "h.1.attn.c_attn" in name]:
            del tensors[name]

    w.tensors("run/adapter/adapter_model.safetensors", drop)
    return ["eval", "run", "--data", w.rows(ROW)]


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


@case("nothing", "no such model folder")
def quantize_of_nothing(w: World) -> Arguments:
    return ["quantize", "nothing", "--out", "out"]


@case("model/model.safetensors", "not a whole safetensors file")
def quantize_of_truncated_weights(w: World) -> Arguments:
    w.truncate(w.model() / "model.safetensors")
    return ["quantize", "model", "--out", "out"]


@case("rows.jsonl:1", "not valid JSON")
def quantize_with_broken_rows(w: World) -> Arguments:
    return ["quantize", w.gpt2, "--out", "out", "--data", w.file("rows.jsonl", "oops\n")]


@case("folder", "no adapter here")
def start_from_no_adapter(w: World) -> Arguments:
    w.file("folder/x", "")
    return w.train({"adapter.init_from": "folder"})


@case("run/adapter", "another base")
def start_from_an_adapter_of_another_base(w: World) -> Arguments:
    w.run()
    w.tensors("base/model.safetensors", _other_weights)
    return w.train({"adapter.init_from": "run/adapter", "model.name_or_path": "base"})


@case("run/adapter", "not a whole safetensors file")
def start_from_a_truncated_adapter(w: World) -> Arguments:
    w.run()
    w.truncate("run/adapter/adapter_model.safetensors")
    return w.train({"adapter.init_from": "run/adapter", "model.name_or_path": "base"})


@case("adapter.r: 8", "4 in the adapter of init_from")
def start_from_an_adapter_of_another_rank(w: World) -> Arguments:
    w.run()
    return w.train(
        {"adapter.init_from": "run/adapter", "model.name_or_path": "base", "adapter.r": 8, "training.output_dir": "new"}
    )


@case("no finished run", "name a run")
def eval_of_nothing(w: World) -> Arguments:
    return ["eval", "--data", w.rows(ROW)]


@case("nothing", "no such model folder")
def eval_of_a_missing_target(w: World) -> Arguments:
    return ["eval", "nothing", "--data", w.rows(ROW)]


@case("nothing to measure on", "--data")
def eval_without_rows(w: World) -> Arguments:
    return ["eval", w.gpt2]


@case("missing.jsonl", "no such data file")
def eval_of_missing_rows(w: World) -> Arguments:
    return ["eval", w.gpt2, "--data", "missing.jsonl"]


@case("model", "no tokenizer")
def eval_without_a_tokenizer(w: World) -> Arguments:
    (w.root / w.model() / "tokenizer.json").unlink()
    return ["eval", "model", "--data", w.rows(ROW)]


@case("model/model.safetensors", "not a whole safetensors file")
def eval_of_truncated_weights(w: World) -> Arguments:
    w.truncate(w.model() / "model.safetensors")
    return ["eval", "model", "--data", w.rows(ROW)]


# The command line.


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


@pytest.fixture(scope="session")
def trained(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory, lora: Any) -> Callable[[], Path]:
    """Trains once, when first asked: a folder with ``base`` and ``run``."""
    home = tmp_path_factory.mktemp("trained")

    def train() -> Path:
        if not (home / "run").exists():
            shutil.copytree(tiny_gpt2, home / "base")
            (home / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 4)
            recipe = {
                "model": {"name_or_path": str(home / "base")},
                "adapter": {"r": 4, "target_modules": ["c_attn"]},
                "data": {"train": str(home / "rows.jsonl"), "max_length": 32},
                "training": {"output_dir": str(home / "run"), "max_steps": 1, "learning_rate": 0.005},
            }
            (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            done = lora("train", home / "recipe.yaml")
            assert done.exit_code == 0, done.stderr
        return home

    return train


@pytest.fixture
def world(
    tmp_path: Path,
    tiny_gpt2: Path,
    tiny_llama: Path,
    write_recipe: Any,
    trained: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, tiny_gpt2, tiny_llama, write_recipe, trained)


def everything_in(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder below ``root`` with the time it was last changed and its content."""
    return {
        str(path.relative_to(root)): (
            path.lstat().st_mtime_ns,
            path.read_bytes() if not path.is_symlink() and path.is_file() else b"",
        )
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused(case: Case, world: World, lora: Any, no_curves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = case.arguments(world)
    before = everything_in(world.root)
    if not case.loads:
        from transformers import AutoModelForCausalLM

        def load(*_: Any, **__: Any) -> None:
            pytest.fail("weights were loaded before the fault was told")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    result = lora(*arguments)
    if report := os.environ.get("LORA_MESSAGES"):
        with Path(report).open("a") as file:
            file.write(
                f"--- {case.name}: lora {' '.join(map(str, arguments))} -> {result.exit_code}\n{result.stderr}\n"
            )
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for words in case.says:
        assert words in result.stderr
    assert len(result.stderr.splitlines()) < 30
    assert everything_in(world.root) == before


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_recipes_that_are_shipped_are_read(path: Path) -> None:
    from lora_cli.recipe.load import load_recipe

    assert load_recipe(path).training.output_dir.startswith("runs/")
