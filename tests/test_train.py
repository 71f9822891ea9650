"""`lora train`: the results follow from the papers' equations, and every recipe key does what it says."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import yaml
from conftest import TRAIN_KEYS, VALIDATION_KEYS, WIDTH, Run, done, edit_json, edited_weights, fork_lora, write_rows
from made_adapters import ALPHA, R, make_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from lora_cli.cli.app import main
from lora_cli.display import Display, duration
from lora_cli.model.fast_paths.gated_mlp import GatedMLP
from lora_cli.recipe.explain import dotted_keys
from lora_cli.training import loop, validation
from lora_cli.training.metrics import Clock

# --- the equations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run to compare with the reference."""

    base: str = "gpt2"
    kind: str = "lora"
    packing: bool = False
    shuffle: bool = False
    batch_size: int = 3
    accumulation: int = 3  # 24 rows in batches of 3 are 8 batches: the last window is short
    epochs: float = 2
    schedule: str = "cosine"
    warmup: dict[str, Any] | None = None
    weight_decay: float = 0.0
    clip: float | None = None
    max_length: int = 24  # some rows are longer


CASES = {
    "gpt2-lora": Case(),
    "gpt2-lora-packed-clipped": Case(packing=True, clip=0.05, warmup={"warmup_steps": 2}, weight_decay=0.1),
    "gpt2-lora-shuffled": Case(shuffle=True, epochs=2.5),
    "gpt2-lora-packed-shuffled": Case(packing=True, shuffle=True, accumulation=2, max_length=32, epochs=2.5),
    "gpt2-rslora-linear": Case(kind="rslora", schedule="linear", warmup={"warmup_ratio": 0.3}, epochs=2.5),
    "gpt2-dora": Case(kind="dora", weight_decay=0.05),
    "gpt2-dora-packed": Case(kind="dora", packing=True, schedule="constant", warmup={"warmup_steps": 3}),
    "llama-lora-constant": Case("llama", schedule="constant", clip=0.5, weight_decay=0.2),
    "llama-lora-packed": Case("llama", packing=True, warmup={"warmup_ratio": 0.2}),
    "llama-rslora-packed": Case("llama", "rslora", packing=True, schedule="linear", batch_size=2, accumulation=1),
    "llama-dora-clipped": Case("llama", "dora", clip=0.1, accumulation=5, epochs=3),
    "llama-dora-packed": Case("llama", "dora", packing=True, weight_decay=0.1),
}
RATE, SEED = 2e-3, 11
SCHEDULES = {"cosine": reference.cosine, "linear": reference.linear_decay, "constant": reference.constant}


def batches_of(rows: list[Any], case: Case, epoch: int) -> list[list[Any]]:
    if case.shuffle:
        rows = [rows[index] for index in np.random.default_rng([SEED, epoch]).permutation(len(rows))]
    lengths = [len(ids) for ids, _ in rows]
    if case.packing:
        budget = case.batch_size * case.max_length
        packed = reference.first_fit(lengths, budget, 16) if case.shuffle else reference.next_fit(lengths, budget)
        return [[rows[index] for index in batch] for batch in packed]
    if not case.shuffle:
        return [rows[at : at + case.batch_size] for at in range(0, len(rows), case.batch_size)]
    alike = sorted(rows, key=lambda row: -len(row[0]))  # fewer rows than are sorted at a time
    batches = [alike[at : at + case.batch_size] for at in range(0, len(alike), case.batch_size)]
    drawn = [batches[index] for index in np.random.default_rng([SEED, epoch, 1]).permutation(len(batches))]
    first = max(drawn, key=lambda batch: max(len(ids) for ids, _ in batch))
    return [first, *(batch for batch in drawn if batch is not first)]


@pytest.mark.parametrize("name", CASES)
def test_steps_and_adapter_equal_the_reference(
    name: str, request: pytest.FixtureRequest, qa_file: Path, tmp_path: Path, train: Callable[..., Run]
) -> None:
    case = CASES[name]
    folder = request.getfixturevalue(f"tiny_{case.base}")
    variant = {"use_rslora": case.kind == "rslora", "use_dora": case.kind == "dora"}
    start = make_adapter(case.base, folder, tmp_path / "start", seed=3, **variant)
    run = train(
        {
            "model.name_or_path": folder,
            "adapter": {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear", "init_from": start} | variant,
            "data": {"packing": case.packing, "shuffle": case.shuffle, "max_length": case.max_length},
            "training": {
                "seed": SEED,
                "max_steps": None,
                "num_train_epochs": float(case.epochs),
                "per_device_train_batch_size": case.batch_size,
                "gradient_accumulation_steps": case.accumulation,
                "learning_rate": RATE,
                "lr_scheduler_type": case.schedule,
                "weight_decay": case.weight_decay,
                "max_grad_norm": case.clip,
                **(case.warmup or {"warmup_steps": 0}),
            },
        }
    )

    rows = reference.rows_of(qa_file, AutoTokenizer.from_pretrained(folder), case.max_length)
    steps, passes = [], []
    for epoch in range(math.ceil(case.epochs)):
        batches = batches_of(rows, case, epoch)
        windows = [batches[at : at + case.accumulation] for at in range(0, len(batches), case.accumulation)]
        share = min(1.0, case.epochs - epoch)
        for number, window in enumerate(windows[: math.ceil(share * len(windows))], 1):
            steps.append([row for batch in window for row in batch])
            passes.append(epoch + min(1.0, number * case.accumulation / len(batches)))
    total = len(steps)
    warmup = case.warmup or {}
    rising = warmup.get("warmup_steps", math.ceil(warmup.get("warmup_ratio", 0) * total))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = load_file(start / "adapter_model.safetensors")
    names = [key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in before if "lora_A" in key]
    layers = reference.inject(model, names, R, ALPHA, rslora=case.kind == "rslora", dora=case.kind == "dora")
    reference.load_adapter_tensors(layers, before)
    wanted = reference.train_reference(
        model,
        steps,
        lambda t: RATE * SCHEDULES[case.schedule](t, total, rising),
        max_grad_norm=case.clip,
        weight_decay=case.weight_decay,
    )

    lines = run.lines()
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    assert [line["tokens"] for line in lines] == [step.tokens for step in wanted]
    assert [line["loss"] for line in lines] == pytest.approx([step.loss for step in wanted], abs=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx([step.grad_norm for step in wanted], rel=1e-4)
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [step.learning_rate for step in wanted], abs=1e-12
    )
    if case.clip is not None:
        assert min(step.grad_norm for step in wanted) > case.clip, "clipping must have something to do"
    assert [line["epoch"] for line in lines] == pytest.approx(passes, abs=1e-6)
    found, after = run.tensors, reference.adapter_tensors(layers)
    assert found.keys() == after.keys()
    for key, tensor in after.items():
        torch.testing.assert_close(found[key], tensor, atol=1e-5, rtol=0, msg=key)
        assert (found[key] - before[key]).abs().max() > 1e-4, f"{key} was trained"


# --- the run's folder ------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files_and_records(tiny_gpt2: Path, tmp_path: Path, write_recipe: Any, lora: Any) -> None:
    result = done(lora("train", write_recipe({"data.validation": 0.2, "training.eval_steps": 2}), "--json")).json
    run = Run(tmp_path / "run")
    assert sorted(path.name for path in run.folder.iterdir()) == [
        *("adapter", "cache", "checkpoints", "metrics.jsonl", "recipe.yaml", "report.html", "run.json", "train.log")
    ]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= {
        path.name for path in (run.folder / "adapter").iterdir()
    }
    assert run.checkpoints == [4]
    assert (run.folder / "checkpoints" / "step-00000004").is_dir()
    assert all(list(line) == TRAIN_KEYS for line in run.lines())
    assert all(list(line) == VALIDATION_KEYS for line in run.lines("validation"))
    assert run.column("step", "validation") == [0, 2, 4]
    for line in run.lines("validation"):
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
    seconds = run.column("seconds")
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert all(rate > 0 for rate in run.column("tokens_per_second"))

    info = run.info
    assert info["seed"] == 42
    assert info["device"] == ("cpu" if not torch.cuda.is_available() else info["device"])
    assert info["versions"]["torch"] == version("torch")
    assert info["base"]["name_or_path"] == str(tiny_gpt2)
    assert len(info["base"]["fingerprint"]) == len(info["data"]["fingerprint"]) == 64
    assert info["data"]["rows"] + info["data"]["validation"]["rows"] == 24
    assert info["started"] <= info["finished"]
    assert info["result"]["loss"] == run.losses[-1]
    assert info["result"]["validation"]["loss"] == run.column("loss", "validation")[-1]
    assert info["result"]["base"]["loss"] == run.column("loss", "validation")[0]
    assert {"run": str(run.folder), **info["result"]} == result
    assert "step 4" in (run.folder / "train.log").read_text()
    report = (run.folder / "report.html").read_text()
    assert "<svg" in report
    for score in (info["result"]["base"], info["result"]["validation"]):
        assert f"{score['perplexity']:.2f}" in report


def test_a_single_logged_step_is_a_point_in_the_report(tmp_path: Path, write_recipe: Any, lora: Any) -> None:
    done(lora("train", write_recipe({"training.max_steps": 1})))
    report = (tmp_path / "run" / "report.html").read_text()
    assert report.count("fill: #2a6f97") == 3, "loss, learning rate and the legend"


def test_a_runs_files_are_for_whom_new_files_are(write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None) -> None:
    """This includes the weights, which safetensors makes readable for their owner alone. In a setgid folder, which a
    team shares, every new folder passes the group on."""
    tmp_path.chmod(0o2755)
    before = os.umask(0o027)
    try:
        done(lora("train", write_recipe({"training.max_steps": 1})))
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert "adapter_model.safetensors" in {path.name for path in files}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    folders = [tmp_path / "run", *(path for path in (tmp_path / "run").rglob("*") if path.is_dir())]
    assert tmp_path / "run" / "adapter" in folders
    assert {oct(path.stat().st_mode & 0o7777) for path in folders} == {"0o2750"}


def test_what_people_are_told_of_a_run_is_what_it_measured(
    tmp_path: Path, write_recipe: Any, lora: Any, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the summary, the model card, the report and the adapter's provenance with the metrics and files."""
    monkeypatch.setattr(Clock, "seconds", 100.0)
    changes = {"data.validation": 0.25, "quantization": {"method": "nf4"}, "adapter.target_modules": ["c_attn"]}
    result = done(lora("train", write_recipe(changes)))
    told = result.stdout
    assert re.findall(r"left ([\d:]+)", result.stderr) == ["5:00", "1:40", "0:33", "0:00"]
    run = Run(tmp_path / "run")
    first, *_, last = run.column("loss", "validation")
    assert first != last
    assert re.match(rf"4 steps in [\d.]+ s, last loss {run.losses[-1]:.4f}\n", told)
    assert f"validation perplexity {math.exp(first):.2f} -> {math.exp(last):.2f}\n" in told
    assert "the best" not in told and "skipped" not in told

    trained = sum(tensor.numel() for tensor in run.tensors.values())
    rows = sum(run.info["data"][key] for key in ("rows", "dropped"))
    assert rows == 18
    card = (run.folder / "adapter" / "README.md").read_text()
    assert f"\nRank 4, alpha 8, trained on the base in nf4; {trained:,} trained parameters, 4 steps at a peak " in card
    assert "learning rate of 0.005.\n" in card and f"Training data: {rows} rows (" in card
    for name, loss in (("base", first), ("with adapter", last)):
        assert f"\n| {name} | {loss:.4f} | {math.exp(loss):.2f} |\n" in card

    report = (run.folder / "report.html").read_text()
    tokens = run.column("tokens", "validation")[0]
    for name, loss in (("base", first), ("with adapter", last)):
        cells = (f"{loss:.4f}", f"{math.exp(loss):.2f}", f"{tokens:,}")
        assert f"<td>{name}</td>" + "".join(f"<td class=n>{cell}</td>" for cell in cells) in report
    peak = run.info["result"]["peak_memory_bytes"] / 1024 / 1024
    supervised = run.info["data"]["supervised_tokens"]
    assert supervised < run.info["data"]["tokens"]
    assert f"<td>{rows} rows, {supervised:,} supervised tokens</td>" in report
    assert f"<td>{peak:,.0f} MiB</td>" in report and 50 < peak < 100_000

    record = json.loads((run.folder / "adapter" / "provenance.json").read_text())
    kept = ("versions", "dtype", "base", "data", "finished", "result")
    assert {key: record[key] for key in kept if key != "base"} == {key: run.info[key] for key in kept if key != "base"}
    assert record["recipe"] == yaml.safe_load((run.folder / "recipe.yaml").read_text())


def on_the_hub(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a model into a hub's cache as somebody/tiny. Return the folder of the copy."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    folder = cache / "models--somebody--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("a" * 40)
    return shutil.copytree(model, folder / "snapshots" / ("a" * 40))


def test_a_base_of_the_hub_is_checked_as_a_folder_is(
    tiny_gpt2: Path, train: Callable[..., Run], write_recipe: Any, lora: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    start = train({"training.max_steps": 1, "training.warmup_steps": 0}).folder
    base = on_the_hub(tiny_gpt2, tmp_path, monkeypatch)
    recipe = write_recipe({"model.name_or_path": "somebody/tiny", "adapter.init_from": start})
    with edited_weights(base) as weights:
        weights["transformer.wte.weight"] += 1
    result = lora("train", recipe)
    assert result.exit_code == 2 and "the adapter belongs to another base" in result.stderr
    (base / "model.safetensors").unlink()  # still to be downloaded
    result = lora("train", recipe, "model.dtype=float16")
    assert result.exit_code == 2 and ("float16 trains on a GPU" in result.stderr) is not torch.cuda.is_available()


def test_a_model_card_names_a_base_of_the_hub_and_no_folder(
    train: Callable[..., Run], tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub refuses a card whose base_model is none of its ids, and a folder's path may name its user."""

    def card(name: str) -> tuple[dict[str, Any], str]:
        run = train({"model.name_or_path": name, "training.max_steps": 1, "training.warmup_steps": 0})
        text = (run.folder / "adapter" / "README.md").read_text()
        assert run.config["base_model_name_or_path"] == name
        return yaml.safe_load(text.split("---")[1]), text

    head, text = card(str(tiny_gpt2))
    assert "base_model" not in head and str(tiny_gpt2.parent) not in text
    assert f"# LoRA adapter for {tiny_gpt2.name}\n" in text
    on_the_hub(tiny_gpt2, tmp_path, monkeypatch)
    asked = "peft.utils.save_and_load.check_file_exists_on_hf_hub"  # it returns None offline
    monkeypatch.setattr(asked, lambda *_, **__: pytest.fail("the hub was asked for the base's vocabulary"))
    assert card("somebody/tiny")[0] == head | {"base_model": "somebody/tiny"}


def test_the_rate_is_of_training_alone(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and evaluations take at least 0.2 s each. Evaluations do not count towards tokens per second."""

    def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: (time.sleep(0.2), function(*given))[1]

    monkeypatch.setattr(validation, "validate", slowed(validation.validate))
    monkeypatch.setattr(loop, "take_step", slowed(loop.take_step))
    run = train({"data": {"validation": 0.2, "train_on": "all"}, "training.eval_steps": 1})
    for before, line in itertools.pairwise(run.lines()):
        took = (line["tokens"] + 4) / line["tokens_per_second"]  # its 4 rows' first tokens are not supervised
        assert 0.19 < took < line["seconds"] - before["seconds"] - 0.19


class Terminal(io.StringIO):
    """A text buffer that claims to be a terminal. ``shown`` is its text without escape sequences."""

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


def test_a_bar_on_a_terminal_and_every_line_in_the_log(
    tmp_path: Path, write_recipe: Any, no_curves: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The progress bar shows what a step's line would show. With --quiet there is neither. The log has every line."""
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)
    recipe = str(write_recipe({"data.validation": 0.25, "training.eval_steps": 2}))
    for options in ([], ["--quiet", "--overwrite"]):
        terminal = Terminal()
        with redirect_stderr(terminal), redirect_stdout(io.StringIO()):
            assert main(["train", recipe, *options]) == 0
        run = Run(tmp_path / "run")
        log = (run.folder / "train.log").read_text()
        for line in run.lines():
            told = f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
            assert re.search(rf" step {line['step']}  {re.escape(told)}  peak [\d,]+ MiB(  left [\d:]+)?\n", log), log
            assert f"step {line['step']}  loss" not in terminal.shown, "on a terminal the bar shows it"
        for line in run.lines("validation"):
            told = f"step {line['step']}  validation loss {line['loss']:.4f}  perplexity {line['perplexity']:.2f}\n"
            assert told in log and (told in terminal.shown) == (not options)
        beforehand = f"measuring the base on {run.info['data']['validation']['rows']} validation rows\n"
        assert beforehand in log and (beforehand in terminal.shown) == (not options)
        for bar in (r"evaluating \S+ 100%", r"0/\d evaluating "):  # of the base; of a step, below the run's bar
            assert bool(re.search(bar, terminal.shown)) == (not options)
        if options:
            assert all(line.startswith("warning: ") for line in terminal.shown.splitlines())
        else:
            last = terminal.shown[terminal.shown.rindex("4/4") :]
            assert last.startswith(f"4/4 loss {run.losses[-1]:.4f}  lr ")


@pytest.mark.parametrize("options", [[], ["--quiet"]])
def test_a_terminal_shows_that_something_goes_on(
    options: list[str],
    tmp_path: Path,
    tiny_gpt2: Path,
    qa_file: Path,
    write_recipe: Any,
    no_curves: None,
    monkeypatch: Any,
) -> None:
    """Commands that may take minutes show a progress line, but not with --quiet."""
    monkeypatch.setenv("TERM", "xterm-256color")
    adapter, merged = tmp_path / "run" / "adapter", tmp_path / "merged"
    verbs: dict[tuple[str, ...], list[Any]] = {
        ("checking base and rows",): ["train", write_recipe({"training.max_steps": 1})],
        ("checking base and rows", "measuring"): ["eval", adapter, "--data", qa_file],
        ("merging",): ["merge", adapter, "--out", merged],
        ("quantizing",): ["quantize", merged, "--out", tmp_path / "nf4"],
        ("extracting",): ["adapters", "extract", tiny_gpt2, merged, "--rank", 4, "--out", tmp_path / "extracted"],
    }
    for words, verb in verbs.items():
        terminal = Terminal()
        with redirect_stderr(terminal), redirect_stdout(io.StringIO()):
            assert main([*map(str, verb), *options]) == 0
        assert all((word in terminal.shown) == (not options) for word in words)


PRINTS_ON_STDOUT = """
import sys
sys.addaudithook(lambda event, about: event == "open" and "config.json" in str(about[0]) and print("a log line"))
"""


def test_stdout_holds_only_the_result_whatever_libraries_print_there(write_recipe: Any) -> None:
    (result,) = map(done, fork_lora(["train", write_recipe(), "--json"], first=PRINTS_ON_STDOUT))
    assert result.json["steps"] == 4 and "a log line" in result.stderr


@pytest.mark.parametrize("environment", [{"COLUMNS": "0"}, {"COLUMNS": "20"}, {"FORCE_COLOR": "1", "TERM": "xterm"}])
def test_a_pipe_gets_whole_lines_whatever_the_environment_says_of_terminals(
    environment: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    display = Display()
    layer = "model.language_model.layers.*.self_attention.projection_of_queries_keys_and_values"
    warning = "warning: 3 rows of [b]data[/b] were dropped\n"
    display.note(warning.removeprefix("warning: ").strip(), warning=True)
    with display.waiting("checking"), display.steps(0, 2):
        assert list(display.through(["rows"], "measuring")) == ["rows"]
        display.table("adapted layers", ["module", "layers"], [[layer, 48]])
    raw = capsys.readouterr().err
    assert raw.startswith(f"\x1b[33m{warning.strip()}\x1b[0m\n" if "FORCE_COLOR" in environment else warning)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", raw)  # colours
    assert shown == f"{warning}adapted layers\n{'module':{len(layer)}}  layers\n{layer}      48\n"


def test_a_python_that_does_not_read_names_as_utf8_is_told_how(lora_process: Any) -> None:
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = lora_process("train", "Rezept für Bären.yaml", env=narrow)
    assert result.exit_code == 2 and "PYTHONUTF8=1" in result.stderr


def test_a_tokenizers_token_does_not_control_a_terminal_or_the_log(
    tiny_gpt2: Path, write_recipe: Any, lora: Any, no_curves: None, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_gpt2, tmp_path / "base")
    token = "\x1b]0;title\x07"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": token}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(base)
    result = done(lora("train", write_recipe({"model.name_or_path": base, "training.max_steps": 1})))
    log = (tmp_path / "run" / "train.log").read_text()
    for shown in (result.stderr, log):
        assert token not in shown
        assert r"answers end in '\x1b]0;title\x07', where generation does not stop" in shown


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "COLUMNS": "0"}])
def test_a_terminal_that_cannot_redraw_or_tells_no_width_shows_what_happens(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    with redirect_stderr(terminal):
        display = Display()
        line = {"loss": 1.5, "learning_rate": 0.1, "tokens_per_second": 3}
        with display.steps(3, 9):
            display.metrics({"step": 4, "split": "train"} | line)
        display.metrics({"step": 5, "split": "train"} | line)
        display.note("done")
    assert "loss 1.5000" in terminal.shown and "done\n" in terminal.shown
    assert "step 5  loss 1.5000" in terminal.shown, "there is no bar any more that could show it"
    assert ("3/9" in terminal.shown) is (environment["TERM"] != "dumb"), "the bar begins where the run goes on"


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_an_error_is_coloured_where_colours_are_shown_and_wanted(
    environment: dict[str, str], coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    with redirect_stderr(terminal):
        assert main(["explain", "adapter.rank"]) == 2
    assert ("\x1b[" in terminal.getvalue()) is coloured
    assert "error: " in terminal.shown


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (3599.4, "59:59"), (3600, "1:00:00"), (90061.0, "25:01:01")],
)
def test_the_time_left_is_told_in_hours_and_minutes(seconds: float, told: str) -> None:
    assert duration(seconds) == told


def test_the_table_of_targets_and_the_share(train: Callable[..., Run], write_recipe: Any, lora: Any) -> None:
    result = done(lora("train", write_recipe({"adapter.target_modules": "attention"}), "--json"))
    trained = 2 * 4 * ((WIDTH + 3 * WIDTH) + (WIDTH + WIDTH))
    assert "transformer.h.*.attn.c_attn" in result.stderr
    assert f"trainable: {trained:,} of" in result.stderr
    assert result.json["trainable_parameters"] == trained


def test_ranks_and_variants_are_told_as_they_are_trained(
    tiny_llama: Path, train: Callable[..., Run], write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    """The table counts DoRA's magnitudes and the ranks of an adapter that gives each layer its own."""
    start = make_adapter(
        "llama",
        tiny_llama,
        tmp_path / "start",
        use_dora=True,
        rank_pattern={"down_proj": 2},
        alpha_pattern={"v_proj": 1},
    )
    adapter = {"r": R, "lora_alpha": ALPHA, "use_dora": True, "target_modules": "all-linear", "init_from": start}
    changes = {"model.name_or_path": tiny_llama, "adapter": adapter, **ONE_STEP}
    result = done(lora("train", write_recipe(changes), "--json"))
    run = Run(tmp_path / "run")
    told = {
        row[1]: int(row[2].replace(",", ""))
        for row in re.findall(r"(\.(\w+)) .* -> \d+ +([\d,]+)$", result.stderr, re.M)
    }
    counted: dict[str, int] = {}
    for name, tensor in run.tensors.items():
        layer = name.partition(".lora_")[0].rpartition(".")[2]
        counted[layer] = counted.get(layer, 0) + tensor.numel()
    assert told == counted and sum(told.values()) == result.json["trainable_parameters"]
    card = (run.folder / "adapter" / "README.md").read_text()
    assert f"\nRank 2-{R}, alpha 1-{ALPHA:g}, DoRA; {sum(told.values()):,} trained parameters" in card
    assert run.config["target_modules"] == sorted(counted), "in one order, whatever the process"


def test_a_rank_above_the_width_of_some_layers_is_trained_and_told(
    tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any
) -> None:
    """k_proj and v_proj have 32 outputs in both layers, the others 64 or more. An adapter is resized to it, too."""
    changes = {"model.name_or_path": tiny_llama, "adapter.r": 48, "adapter.target_modules": "all-linear"}
    told = " ".join(done(lora("train", write_recipe(changes))).stderr.split())
    assert "adapter.r: 48 is more than the width of 4 layers, such as model.layers.0.self_attn.k_proj (32)" in told
    ranks = {tensor.shape[0] for name, tensor in Run(tmp_path / "run").tensors.items() if "lora_A" in name}
    assert ranks == {48}
    assert "checked on" in done(lora("merge", tmp_path / "run", "--out", tmp_path / "merged")).stdout
    wide = done(lora("adapters", "resize", tmp_path / "run", "--rank", "56", "--out", tmp_path / "wide", "--json")).json
    assert {layer["after"] for layer in wide["layers"]} == {56}
    alpha = json.loads((tmp_path / "wide" / "adapter_config.json").read_text())["lora_alpha"]
    start = {"adapter.init_from": tmp_path / "wide", "adapter.r": 56, "adapter.lora_alpha": alpha}
    done(lora("train", write_recipe(changes | start | {"training.output_dir": tmp_path / "further"})))


def test_a_used_folder_is_refused(train: Callable[..., Run], write_recipe: Any, lora: Any) -> None:
    run = train({"training.max_steps": 1})
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    recipe = write_recipe({"training.output_dir": run.folder, "training.max_steps": 2})
    result = lora("train", recipe)
    assert result.exit_code == 2
    assert "already holds a run" in result.stderr and "--resume" in result.stderr and "--overwrite" in result.stderr
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before

    done(lora("train", recipe, "--overwrite"))
    assert len(run.losses) == 2
    assert run.checkpoints == [2]


# --- every key -------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainer of each run of the test, as ``set_up`` returned it, in order."""
    seen: list[Any] = []
    original = loop.set_up

    def remember(*args: Any) -> Any:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(loop, "set_up", remember)
    return seen


def tokens(run: Run) -> list[int]:
    return run.column("tokens")


def rates(run: Run) -> list[float]:
    return run.column("learning_rate")


def modules_of(run: Run) -> set[str]:
    return {key.split(".")[-3] for key in run.tensors}


def layers_of(run: Run) -> set[str]:
    return {key.split(".h.")[1].split(".")[0] for key in run.tensors}


def file_of(name: str, *rows: dict[str, Any]) -> Callable[[Path], str]:
    return lambda folder: write_rows(folder / name, rows)


ONE_STEP = {"training.max_steps": 1}
NO_WARMUP = {"training.warmup_steps": 0}
THREE_COLUMNS = {
    "q": "Why is the sea salt?",
    "a": " Rivers carry salt.",
    "prompt": "P",
    "completion": " C",
    "text": "T",
}


@dataclass(frozen=True)
class Key:
    """A recipe key, two values for it, other changes to the recipe, and the result expected with each value."""

    key: str
    values: tuple[Any, Any]
    observe: Callable[[Run], Any]
    expected: tuple[Any, Any] | None = None  # None: any results that differ
    also: dict[str, Any] | None = None


KEYS = [
    Key("adapter.r", (2, 3), lambda run: {t.shape[0] for k, t in run.tensors.items() if "lora_A" in k}, ({2}, {3})),
    Key("adapter.lora_alpha", (4.0, 16.0), lambda run: run.losses[2:]),
    Key("adapter.lora_dropout", (0.0, 0.5), lambda run: run.losses[2:]),
    Key("adapter.target_modules", ("attention", ["c_fc"]), modules_of, ({"c_attn", "c_proj"}, {"c_fc"})),
    Key("adapter.layers_to_transform", (None, [1]), layers_of, ({"0", "1"}, {"1"})),
    Key("adapter.use_rslora", (False, True), lambda run: (run.config["use_rslora"], run.losses[2:])),
    Key(
        "adapter.use_dora",
        (False, True),
        lambda run: any("lora_magnitude_vector" in key for key in run.tensors),
        (False, True),
    ),
    Key("data.format", ("prompt_completion", "text"), tokens, also={"data.train": file_of("f.jsonl", THREE_COLUMNS)}),
    Key(
        "data.columns",
        ({}, {"prompt": "q", "completion": "a"}),
        tokens,
        also={"data.train": file_of("f.jsonl", THREE_COLUMNS), "data.format": "prompt_completion"},
    ),
    Key(
        "data.template.prompt",
        ("{q}", "Question: {q}"),
        lambda run: run.info["data"]["tokens"],
        also={"data.train": file_of("f.jsonl", THREE_COLUMNS), "data.template.completion": "{a}"},
    ),
    Key(
        "data.template.completion",
        ("{a}", "{a} Really."),
        tokens,
        also={"data.train": file_of("f.jsonl", THREE_COLUMNS), "data.template.prompt": "{q}"},
    ),
    Key("data.train_on", ("completion", "all"), lambda run: run.info["data"]["supervised_tokens"]),
    Key("data.max_length", (12, 24), lambda run: run.info["data"]["tokens"]),
    Key("data.packing", (True, False), tokens, also={"data.shuffle": False}),
    Key("data.shuffle", (True, False), tokens),
    Key("training.seed", (1, 2), lambda run: (tokens(run), run.tensors[next(iter(run.tensors))].sum().item())),
    Key(
        "training.num_train_epochs", (1.0, 1.5), lambda run: len(run.losses), (6, 9), also={"training.max_steps": None}
    ),
    Key("training.max_steps", (2, 3), lambda run: len(run.losses), (2, 3)),
    Key(
        "training.per_device_train_batch_size",
        (1, 3),
        lambda run: run.column("epoch")[0],
        (round(2 / 24, 6), round(6 / 24, 6)),
    ),
    Key(
        "training.gradient_accumulation_steps",
        (1, 3),
        lambda run: run.column("epoch")[0],
        (round(2 / 24, 6), round(6 / 24, 6)),
    ),
    Key("training.learning_rate", (1e-3, 2e-3), lambda run: max(rates(run)), (1e-3, 2e-3)),
    Key("training.warmup_ratio", (0.25, 0.5), lambda run: rates(run).index(max(rates(run))), (1, 2)),
    Key("training.warmup_steps", (1, 3), lambda run: rates(run).index(max(rates(run))), (1, 3)),
    Key("training.weight_decay", (0.0, 1.0), lambda run: run.losses[2:]),
    Key("training.max_grad_norm", (None, 1e-3), lambda run: run.losses[2:]),
    Key("training.logging_steps", (2, 3), lambda run: run.column("step"), ([2, 4], [3, 4])),
    Key(
        "training.eval_steps",
        (1, None),
        lambda run: run.column("step", "validation"),
        ([0, 1, 2, 3, 4], [0, 4]),
        also={"data.validation": 0.2},
    ),
    Key(
        "training.save_steps",
        (1, None),
        lambda run: run.checkpoints,
        ([1, 2, 3, 4], [4]),
        also={"training.save_total_limit": None},
    ),
    Key(
        "training.save_total_limit",
        (1, 3),
        lambda run: run.checkpoints,
        ([4], [2, 3, 4]),
        also={"training.save_steps": 1},
    ),
    Key("data.validation", (0.25, None), lambda run: len(run.lines("validation")), (2, 0), also=ONE_STEP),
    Key("data.train", ("ONE", "TWO"), lambda run: run.info["data"]["rows"], (1, 2)),
]
ELSEWHERE = {  # the test, with its file if it is another
    "model.name_or_path": "test_steps_and_adapter_equal_the_reference",
    "model.dtype": "test_bfloat16_is_computed_in_and_the_adapter_stays_in_float32",
    "model.attn_implementation": "test_what_the_model_and_the_optimizer_are",
    "quantization.method": "test_quantized_bases_train",
    "quantization.double_quant": "test_what_quantization_keys_do",
    "quantization.compute_dtype": "test_what_quantization_keys_do",
    "adapter.fused": "test_adapter_fused_takes_our_products_or_pefts_layers (test_fast_paths.py)",
    "adapter.init_from": "test_steps_and_adapter_equal_the_reference",
    "data.min_supervised_rows": "test_too_few_rows_to_learn_from (test_audit.py)",
    "training.output_dir": "test_the_recipe_alone_repeats_the_run (test_resume.py)",
    "training.lr_scheduler_type": "test_schedules",
    "training.optim": "test_what_the_model_and_the_optimizer_are",
    "training.early_stopping_patience": "test_early_stopping (test_resume.py)",
    "training.on_nonfinite": "test_a_learning_rate_beyond_all_bounds (test_faults.py)",
    "training.load_best_model_at_end": "test_the_best_steps_weights_are_taken_when_asked (test_resume.py)",
    "training.gradient_checkpointing": "test_gradient_checkpointing",
    "training.cache_frozen": "test_runs_with_and_without_take_the_same_steps (test_frozen.py)",
    "training.stream_base": "test_a_streamed_base_trains_as_a_resident_one (test_stream_base.py)",
    "training.torch_compile": "test_true_compiles_all_before_the_first_step_and_false_nothing (test_torch_compile.py)",
    "training.report_to": "test_tensorboard",
    "training.deepspeed": "test_zero_begins_and_goes_on_as_one_process_would (test_processes.py)",
    "training.fsdp": "test_two_processes_take_the_steps_of_one (test_processes.py)",
}


def test_every_key_is_tested() -> None:
    tested = {entry.key for entry in KEYS} | set(ELSEWHERE) | {"adapter.method"}  # has one value
    assert {re.sub("^(data.template)[.].*", r"\1", key) for key in tested} == set(dotted_keys())
    for told in ELSEWHERE.values():
        test, _, file = told.removesuffix(")").partition(" (")
        assert f"def {test}(" in (Path(__file__).parent / (file or "test_train.py")).read_text(), told


@pytest.mark.parametrize("entry", KEYS, ids=lambda entry: entry.key)
def test_a_key_does_something(entry: Key, train: Callable[..., Run], tmp_path: Path) -> None:
    row = {"prompt": "P", "completion": " C"}
    files = {"ONE": file_of("one.jsonl", row), "TWO": file_of("two.jsonl", row, row)}
    seen = []
    for value in entry.values:
        changes = (
            NO_WARMUP | (entry.also or {}) | {entry.key: files.get(value, value) if isinstance(value, str) else value}
        )
        if entry.key == "training.warmup_ratio":
            changes.pop("training.warmup_steps")
        seen.append(entry.observe(train({k: v(tmp_path) if callable(v) else v for k, v in changes.items()})))
    assert seen[0] != seen[1]
    if entry.expected is not None:
        assert tuple(seen) == entry.expected


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_quantized_bases_train(
    base: str, method: str, request: pytest.FixtureRequest, train: Callable[..., Run], trainers: list[Any]
) -> None:
    changes = {"model.name_or_path": request.getfixturevalue(f"tiny_{base}"), "data.shuffle": False} | {
        "data.validation": 0.2,
        "adapter.target_modules": "all-linear",
        "training.eval_steps": 1,
        "training.learning_rate": 0.02,
    }
    plain, quantized = train(changes), train({**changes, "quantization": {"method": method}})
    assert plain.losses != quantized.losses
    assert quantized.losses == pytest.approx(plain.losses, rel=0.2)
    kinds = {type(m).__name__ for m in trainers[-1].model.modules()}
    assert ("Linear8bitLt" if method == "int8" else "Linear4bit") in kinds
    scores = quantized.column("loss", "validation")
    assert scores[-1] < scores[0], "it learned"
    assert all(tensor.dtype == torch.float32 for tensor in quantized.tensors.values())


def test_codes_stored_as_numbers_of_another_type_are_left_as_they_are(
    tiny_llama: Path, tmp_path: Path, train: Callable[..., Run]
) -> None:
    """FSDP needs such storage: two bytes of codes are stored as one bfloat16."""
    losses = []
    for storage in ("uint8", "bfloat16"):
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=getattr(torch, storage)
        )
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config, dtype=torch.float32)
        shutil.copytree(tiny_llama, tmp_path / storage)
        model.save_pretrained(tmp_path / storage)
        losses.append(train({"model": {"name_or_path": tmp_path / storage, "dtype": "float32"}}).losses)
    assert losses[0] == losses[1]


def test_what_quantization_keys_do(
    write_recipe: Any, lora: Any, train: Callable[..., Run], trainers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import Linear4bit

    for double_quant in (True, False):
        train({"quantization": {"method": "nf4", "double_quant": double_quant}} | ONE_STEP)
        layers = [module for module in trainers[-1].model.modules() if isinstance(module, Linear4bit)]
        assert {bool(layer.weight.quant_state.nested) for layer in layers} == {double_quant}
    told = "quantization.compute_dtype: bfloat16 -> float32, faster here"
    for compute, units, used in (
        ("float32", True, "float32"),
        ("bfloat16", True, "bfloat16"),
        ("bfloat16", False, "float32"),
    ):
        monkeypatch.setattr(
            "lora_cli.model.device.has_units_for", lambda dtype, _, units=units: units or dtype == torch.float32
        )
        recipe = write_recipe({"quantization": {"method": "nf4", "compute_dtype": compute}} | ONE_STEP)
        result = done(lora("train", recipe, "--overwrite"))
        layers = [module for module in trainers[-1].model.modules() if isinstance(module, Linear4bit)]
        assert {layer.compute_dtype for layer in layers} == {getattr(torch, used)}
        assert ("compute_dtype" in result.stderr) is (told in result.stderr) is (used != compute)
    result = done(lora("train", write_recipe({"quantization": {"method": "int8"}} | ONE_STEP), "--overwrite"))
    assert "compute_dtype" not in result.stderr, "int8 has none"


def test_bfloat16_is_computed_in_and_the_adapter_stays_in_float32(
    train: Callable[..., Run], trainers: list[Any]
) -> None:
    full, half = train(NO_WARMUP), train(NO_WARMUP | {"model.dtype": "bfloat16"})
    assert half.info["dtype"] == "bfloat16"
    assert trainers[-1].model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in half.tensors.values())


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, *((1 + math.cos(math.pi * t / 4)) / 2 for t in range(4))]),
        ("polynomial", [0, 0.5, *(1 - t / 4 for t in range(4))]),
        ("inverse_sqrt", [0, 0.5, *(math.sqrt(2 / t) for t in range(2, 6))]),
    ],
)
def test_schedules(schedule: str, shares: list[float], train: Callable[..., Run]) -> None:
    run = train({"training": {"lr_scheduler_type": schedule, "warmup_steps": 2, "max_steps": 6}})
    assert rates(run) == pytest.approx([0.005 * share for share in shares], rel=1e-4)


def test_what_the_model_and_the_optimizer_are(train: Callable[..., Run], trainers: list[Any]) -> None:
    losses = []
    for attention in ("eager", "sdpa"):
        losses.append(train({"model.attn_implementation": attention}).losses)
        assert trainers[-1].model.config._attn_implementation == attention
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    big = {"adapter": {"r": 32, "target_modules": "all-linear"}} | NO_WARMUP
    plain = train(big | {"training.optim": "adamw_torch"})
    fused = train(big | {"training.optim": "adamw_torch_fused"})
    assert trainers[-1].optimizer.param_groups[0]["fused"]
    assert fused.losses == pytest.approx(plain.losses, abs=1e-4)
    eight = train(big | {"training.optim": "adamw_8bit"})
    states = [state["state1"].dtype for state in trainers[-1].optimizer.state.values()]
    assert torch.uint8 in states
    assert eight.losses[2:] != plain.losses[2:]
    assert eight.losses == pytest.approx(plain.losses, rel=0.05)
    paged = train(big | {"training.optim": "paged_adamw_8bit"})
    assert trainers[-1].optimizer.optimizer.is_paged
    assert paged.losses == pytest.approx(eight.losses, abs=1e-5)


def test_init_from_takes_the_recipes_dropout_and_no_other_shape(
    tiny_gpt2: Path, train: Callable[..., Run], tmp_path: Path, write_recipe: Any, lora: Any
) -> None:
    start = make_adapter("gpt2", tiny_gpt2, tmp_path / "start")
    same = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear", "init_from": start}
    runs = [train({"adapter": {**same, "lora_dropout": dropout}}) for dropout in (0.0, 0.5)]
    assert runs[0].losses[0] != runs[1].losses[0]
    assert [run.config["lora_dropout"] for run in runs] == [0.0, 0.5]
    other = {"r": 2, "lora_alpha": 1.0, "target_modules": "attention", "use_dora": True, "use_rslora": True}
    result = lora("train", write_recipe({"adapter": {**same, **other}, "training.output_dir": tmp_path / "other"}))
    assert result.exit_code == 2
    assert all(f"adapter.{key}" in result.stderr for key in other)
    assert not (tmp_path / "other").exists()


MORE = {
    "bias: all": {"bias": "all"},
    "bias: lora_only": {"bias": "lora_only"},
    "modules_to_save: lm_head": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices: 1, 2": {"trainable_token_indices": [1, 2]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
    "kasa_config": {"kasa_config": {}},
    "init_lora_weights: pissa": {"init_lora_weights": "pissa"},
    "init_lora_weights: olora": {"init_lora_weights": "olora"},
    "model.embed_tokens.lora_embedding_A": {"target_modules": ["embed_tokens", "q_proj"]},
    "lm_head.weight and 1 more": {"words": 4},
}
"""Adapters that hold more than a recipe trains, or are for another base. The key is what is reported of each."""


@pytest.mark.parametrize("told", [*MORE, "init_lora_weights: corda", "init_lora_weights: loftq"])
def test_init_from_takes_what_training_can_write_and_nothing_more(
    told: str, tiny_llama: Path, tmp_path: Path, write_recipe: Any, lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = tmp_path / "start"
    changes = dict(MORE.get(told, {}))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    if words := changes.pop("words", 0):
        model.resize_token_embeddings(model.config.vocab_size + words)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": R, "target_modules": ["q_proj"], **changes})
    get_peft_model(model, config).save_pretrained(str(start), save_embedding_layers="weight" in told)
    if told not in MORE:  # to make these needs data, or packages that are not installed
        edit_json(start / "adapter_config.json", init_lora_weights=told.split()[-1])
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
        adapter = {"r": 2 * R, "target_modules": ["q_proj"], "init_from": start}
        result = lora("train", write_recipe({"model.name_or_path": tiny_llama, "adapter": adapter}))
    assert result.exit_code == 2, result.stderr
    assert told in result.stderr and f"adapter.r: {2 * R}" in result.stderr, "all of it is told at once"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "mica"])
def test_init_from_begins_with_an_adapter_of_its_base_as_it_is(
    start: Any, tiny_llama: Path, train: Callable[..., Run], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=R, target_modules=["q_proj"], init_lora_weights=start)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "start"))
    file = tmp_path / "start" / "adapter_config.json"
    older = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("use_dora", "use_rslora")}
    file.write_text(json.dumps(older))  # as PEFT wrote it before these keys existed
    adapter = {"r": R, "target_modules": ["q_proj"], "init_from": tmp_path / "start"}
    assert len(train({"model.name_or_path": tiny_llama, "adapter": adapter}).tensors) == 4


@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_gradient_checkpointing(
    base: str, request: pytest.FixtureRequest, train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"model.name_or_path": request.getfixturevalue(f"tiny_{base}"), "adapter.lora_dropout": 0.1} | NO_WARMUP
    calls: list[bool] = []
    layer = {"gpt2": GPT2MLP, "llama": GatedMLP}[base]
    original = layer.forward

    def count(*args: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return original(*args)

    monkeypatch.setattr(layer, "forward", count)
    plain = train(changes | {"training.gradient_checkpointing": False})
    once = 4 * 2 * 2  # steps x batches x layers
    assert sum(calls) == once
    again = train(changes | {"training.gradient_checkpointing": True})
    assert sum(calls) == once + 2 * once, "every layer runs again in the backward pass"
    assert again.losses == pytest.approx(plain.losses, abs=1e-6)
    assert again.tensors.keys() == plain.tensors.keys()


def test_steps_accumulate_as_the_recipe_says_whatever_a_launcher_has_set(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate's launcher passes on its configuration file's number, by which Accelerate would divide gradients."""
    plain = train({"training.max_steps": 2})
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    again = train({"training.max_steps": 2})
    assert again.column("grad_norm") == plain.column("grad_norm")
    assert again.adapter_bytes == plain.adapter_bytes


def test_mixture_weights(train: Callable[..., Run], tmp_path: Path) -> None:
    """Rows of source a have 3 supervised tokens, those of b 5: the token counts show how often each was taken."""
    a = file_of("a.jsonl", *({"prompt": "P", "completion": "xy"} for _ in range(4)))(tmp_path)
    b = file_of("b.jsonl", *({"prompt": "P", "completion": "wxyz"} for _ in range(6)))(tmp_path)
    for weights, rows in (((1.0, 1.0), (4, 6)), ((2.0, 0.5), (8, 3)), ((1.25, 1.5), (5, 9))):
        parts = [{"path": path, "weight": weight} for path, weight in zip((a, b), weights, strict=True)]
        run = train(
            {"data.train": parts, "training": {"max_steps": None, "num_train_epochs": 1.0}}
            | {"training.per_device_train_batch_size": 1, "training.gradient_accumulation_steps": 1}
        )
        assert (tokens(run).count(3), tokens(run).count(5)) == rows


def test_tensorboard(train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's files, in a folder named after the project, hold the values of metrics.jsonl at each step."""
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run = train({"training.report_to": ["tensorboard"], "data.validation": 0.2})
    told = {}
    for path in (run.folder / "mine").rglob("events.out.tfevents.*"):
        data = path.read_bytes()
        while data:  # each record: length, checksum, event, checksum
            size = int.from_bytes(data[:8], "little")
            event, data = events.Event.FromString(data[12 : 12 + size]), data[16 + size :]
            told |= {(event.step, each.tag): each.simple_value for each in event.summary.value}
    for line in run.lines():
        for key in ("loss", "learning_rate"):
            assert told[line["step"], f"train/{key}"] == pytest.approx(line[key])
    assert run.lines() and not list(train().folder.rglob("events.out.tfevents.*"))


def test_recipe_in_the_folder_is_whole(train: Callable[..., Run]) -> None:
    recipe = yaml.safe_load((train(ONE_STEP).folder / "recipe.yaml").read_text())
    assert set(recipe) >= {"model", "adapter", "data", "training"}
    assert recipe["training"]["per_device_train_batch_size"] == 2
    assert recipe["training"]["optim"] == "adamw_torch_fused"


def test_nobody_reading_along_does_not_end_a_run(write_recipe: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lora_cli", "train", str(write_recipe())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None
        assert "loading" in child.stdout.readline()
        child.stdout.close()  # as with: lora train recipe.yaml 2>&1 | head -1
        assert child.wait(timeout=100) == 0
    run = Run(tmp_path / "run")
    assert run.column("step") == [1, 2, 3, 4]
    assert run.adapter_bytes and run.info["finished"]
    log = (run.folder / "train.log").read_text()
    assert all(f"step {step}  loss" in log for step in (1, 2, 3, 4))
