"""`lora adapters list` and `show`: the facts that they report about adapter folders."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WIDTH, Run, done, edit_json
from made_adapters import ALPHA, R, make_adapter
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def test_list_and_show_a_run(
    train: Callable[..., Run], tmp_path: Path, tiny_gpt2: Path, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train({"data.validation": 0.25, "adapter.target_modules": ["c_attn"], "training.eval_steps": 1})
    weights = run.folder / "adapter" / "adapter_model.safetensors"
    os.utime(weights, (0, 0))  # as in a copy: the date must come from the adapter's record
    listed = done(lora("adapters", "list", tmp_path, "--json")).json
    (entry,) = listed["adapters"]
    assert listed["warnings"] == []
    assert entry["path"] == str(run.folder / "adapter")
    assert (entry["kind"], entry["targets"], entry["ranks"]) == ("LORA", ["c_attn"], [run.config["r"]])
    assert entry["bytes"] == weights.stat().st_size
    assert entry["parameters"] == sum(tensor.numel() for tensor in load_file(weights).values())
    assert entry["base"] == str(tiny_gpt2.resolve())
    assert entry["data"].endswith("qa.jsonl")
    assert entry["best_loss"] == min(run.column("loss", "validation"))
    assert entry["date"] == run.info["finished"]

    for target in (run.folder, run.folder / "adapter"):
        shown = done(lora("adapters", "show", target, "--json")).json
        assert {key: shown[key] for key in entry} == entry
        assert shown["base_state"] == "there"
        assert shown["config"] == run.config
        assert shown["provenance"]["base"]["fingerprint"] == run.info["base"]["fingerprint"]
        assert shown["provenance"]["data"]["fingerprint"] == run.info["data"]["fingerprint"]
        assert shown["provenance"]["result"]["best"] == run.info["result"]["best"]
        assert shown["provenance"]["versions"]["torch"] == version("torch")
        assert shown["layers"][0] == {
            "name": "transformer.h.0.attn.c_attn",
            "in_features": WIDTH,
            "out_features": 3 * WIDTH,
            "rank": run.config["r"],
        }
    text = done(lora("adapters", "show", run.folder)).stdout
    there = f"{WIDTH} -> {3 * WIDTH}"
    for words in (run.info["base"]["fingerprint"], run.info["data"]["fingerprint"], "(there)", there, "torch"):
        assert words in text
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80"}.items():  # as in a narrow terminal
        monkeypatch.setenv(name, value)
    line = done(lora("adapters", "list", tmp_path)).stdout.splitlines()[1]
    for words in (str(run.folder / "adapter"), "LORA", "c_attn", f"{entry['best_loss']:.4f}", entry["date"][:10]):
        assert words in line


def test_what_is_shown_is_told_in_words(train: Callable[..., Run], tmp_path: Path, lora: Any) -> None:
    """The text shows the same figures as the files and records, for a run and for a composition."""
    run = train(
        {
            "data.validation": 0.25,
            "training": {"eval_steps": 1, "learning_rate": 3.0, "max_steps": 3, "lr_scheduler_type": "constant"},
        }
    )
    other = shutil.copytree(run.folder / "adapter", tmp_path / "other")
    result, losses = run.info["result"], run.column("loss", "validation")
    best = min(losses[1:])
    assert result["best"]["step"] == losses.index(best) != 3
    text = done(lora("adapters", "show", run.folder)).stdout.splitlines()
    told = dict(line.split(":", 1) for line in text if ":" in line)
    told = {name: value.strip() for name, value in told.items()}
    header, row = done(lora("adapters", "list", run.folder)).stdout.splitlines()
    columns = [row[header.index(name) :].split()[0] for name in ("  loss", "best loss")]
    assert columns == [f"{losses[-1]:.4f}", f"{best:.4f}"], "the adapter has the last weights, not the best"
    size = (run.folder / "adapter" / "adapter_model.safetensors").stat().st_size
    numbers = sum(tensor.numel() for tensor in run.tensors.values())
    assert told["alpha"] == "8" and told["size"] == f"{numbers:,} parameters, {size / 1e6:,.1f} MB"
    assert told["validation loss"] == f"validation {losses[-1]:.4f}, base {losses[0]:.4f}, best {best:.4f}"
    assert told["data"].endswith("qa.jsonl")
    assert told["best step"] == str(result["best"]["step"]) and told["made"] == run.info["finished"]
    widths = {"c_attn": (WIDTH, 3 * WIDTH), "c_proj": (WIDTH, WIDTH)}
    rows = [line.split() for line in text[text.index(next(line for line in text if line.startswith("layers "))) + 1 :]]
    assert rows == [[name, "2", str(wide[0]), "->", str(wide[1]), "4"] for name, wide in widths.items()]

    parts = (run.folder / "adapter", other)
    made = done(lora("adapters", "compose", *(f"{part}=0.5" for part in parts), "--out", tmp_path / "sum")).stdout
    megabytes = (tmp_path / "sum" / "adapter_model.safetensors").stat().st_size / 1e6
    assert made == f"{tmp_path / 'sum'}: 4 layers of rank 8 by cat, {megabytes:,.1f} MB\n"
    text = done(lora("adapters", "show", tmp_path / "sum")).stdout
    assert re.search(rf"^made of: +compose of {re.escape(', '.join(map(str, parts)))}$", text, re.MULTILINE), text


def test_what_an_adapters_files_say_does_not_control_a_terminal(
    train: Callable[..., Run], tmp_path: Path, lora: Any
) -> None:
    run = train({"training.max_steps": 1, "training.warmup_steps": 0})
    adapter = run.folder / "adapter"
    record = json.loads((adapter / "provenance.json").read_text())
    foreign = "\x1b]0;title\x07\x1b[2J\nan adapter of mine\x7f"
    record["base"]["name_or_path"] = record["recipe"]["data"]["train"] = record["versions"]["torch"] = foreign
    edit_json(adapter / "provenance.json", **record)
    escaped = r"\x1b]0;title\x07\x1b[2J\nan adapter of mine\x7f"
    for arguments in (
        ["adapters", "list", run.folder],
        ["adapters", "show", adapter],
        ["merge", adapter, "--out", tmp_path / "merged", "--no-verify"],
        ["quantize", adapter, "--out", tmp_path / "quantized"],
    ):
        result = done(lora(*arguments))
        assert escaped in result.stdout
        assert all(line.isprintable() for line in result.stdout.splitlines())
    shown = done(lora("adapters", "show", adapter, "--json")).json
    assert shown["base"] == foreign


def test_layers_are_named_in_the_same_order_in_every_process(
    tiny_llama: Path, train: Callable[..., Run], tmp_path: Path, lora: Any
) -> None:
    """PEFT keeps names in a set, whose order each process draws anew."""
    changes = {"model.name_or_path": tiny_llama, "adapter.target_modules": "all-linear", "training.max_steps": 1}
    run = train(changes | {"training.warmup_steps": 0})
    other = shutil.copytree(run.folder / "adapter", tmp_path / "other")
    done(lora("adapters", "compose", f"{run.folder}=1", f"{other}=1", "--out", tmp_path / "sum"))
    for folder in (run.folder / "adapter", tmp_path / "sum"):
        names = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert names == sorted(names) and len(names) == 14


def test_kinds_ranks_and_what_cannot_be_read(tiny_llama: Path, tmp_path: Path, lora: Any) -> None:
    make_adapter(
        "llama",
        tiny_llama,
        tmp_path / "a" / "plain",
        rank_pattern={"q_proj": 7},
        alpha_pattern={"q_proj": 3},
        use_rslora=True,
    )
    make_adapter("llama", tiny_llama, tmp_path / "b", target_modules=["embed_tokens", "v_proj"])
    make_adapter("llama", tiny_llama, tmp_path / "b2", modules_to_save=["lm_head"], trainable_token_indices=[3])
    scaled = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    )
    scaled.save_pretrained(str(tmp_path / "c"))
    make_adapter("llama", tiny_llama, tmp_path / "d")
    (tmp_path / "d" / "adapter_config.json").write_text("{")
    make_adapter("llama", tiny_llama, tmp_path / ".draft")

    result = done(lora("adapters", "list", tmp_path, "--json")).json
    plain, embedding, headed, other = result["adapters"]
    assert [Path(entry["path"]).name for entry in (plain, embedding, headed, other)] == ["plain", "b", "b2", "c"]
    beside = ["embed_tokens.trainable_tokens_delta", "lm_head"]
    assert [entry["whole"] for entry in result["adapters"]] == [[], [], beside, []]
    text = re.sub(" +", " ", done(lora("adapters", "show", tmp_path / "b2")).stdout)
    assert f"besides LoRA: {', '.join(beside)}" in text
    assert (plain["kind"], plain["ranks"]) == ("LORA rsLoRA", [R, 7])
    assert embedding["targets"] == ["embed_tokens", "v_proj"]
    assert (other["kind"], other["ranks"], other["targets"]) == ("IA3", [], ["k_proj"])
    for key in ("validation_loss", "best_loss", "data"):
        assert all(entry[key] is None for entry in result["adapters"])
    assert len(result["warnings"]) == 1 and str(tmp_path / "d") in result["warnings"][0]
    shown = done(lora("adapters", "show", tmp_path / "a" / "plain")).stdout
    assert f"{ALPHA:g} in part\n" in shown and "LORA rsLoRA" in shown and f"{tiny_llama} (there)" in shown
    assert done(lora("adapters", "list", tmp_path / "c" / "..", "--quiet")).stdout
    empty = tmp_path / "empty"
    empty.mkdir()
    assert done(lora("adapters", "list", empty, "--json", "--json")).json == {"adapters": [], "warnings": []}
    assert done(lora("adapters", "list", empty)).stdout == f"no adapters in {empty}\n"
    assert "alpha" not in done(lora("adapters", "show", tmp_path / "c")).stdout


@pytest.mark.parametrize("made", [{}, {"made": {"by": "hand"}}, {"made": {"by": "hand", "of": [3, {}]}}], ids=str)
def test_values_that_nobody_has_measured_are_not_shown(
    made: dict[str, Any], tiny_llama: Path, tmp_path: Path, lora: Any
) -> None:
    """As in a record that another program has written."""
    adapter = make_adapter("llama", tiny_llama, tmp_path / "adapter")
    edit_json(adapter / "provenance.json", result={"validation": {"loss": "low"}, "best": 3}, **made)
    text = done(lora("adapters", "show", adapter)).stdout
    assert "validation loss" not in text and "data" not in text
    assert ("made of" in text) == bool(made)


def test_links_are_followed_and_no_adapter_is_listed_twice(tiny_gpt2: Path, tmp_path: Path, lora: Any) -> None:
    """Runs often lie on another disk, behind a link."""
    runs, elsewhere = tmp_path / "runs", tmp_path / "scratch" / "elsewhere"
    make_adapter("gpt2", tiny_gpt2, runs / "first")
    make_adapter("gpt2", tiny_gpt2, elsewhere / "second")
    links = {"away": elsewhere, "latest": runs / "first", "circle": runs, "nowhere": tmp_path / "no"}
    for name, place in links.items():
        (runs / name).symlink_to(place)
    found = done(lora("adapters", "list", runs, "--json")).json
    assert [entry["path"] for entry in found["adapters"]] == [str(runs / "first"), str(runs / "away" / "second")]
    assert found["warnings"] == []


def test_show_tells_a_base_that_is_another(
    train: Callable[..., Run], tmp_path: Path, tiny_gpt2: Path, lora: Any
) -> None:
    shutil.copytree(tiny_gpt2, tmp_path / "base")
    run = train({"model.name_or_path": tmp_path / "base", "training.max_steps": 1})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.transformer.wte.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "base")
    assert done(lora("adapters", "show", run.folder, "--json")).json["base_state"] == "changed"
    (tmp_path / "base" / "model.safetensors").unlink()
    assert done(lora("adapters", "show", run.folder, "--json")).json["base_state"] == "not readable"
    shutil.rmtree(tmp_path / "base")
    assert done(lora("adapters", "show", run.folder, "--json")).json["base_state"] == "not found"
