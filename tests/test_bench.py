"""The benchmarks' code: lora alone goes through all of it; unequal work is reported. No other tool, no timed claim."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import __main__ as command
from bench import (
    contestants,
    context,
    flat,
    heldout,
    jobs,
    lengths,
    same_weights,
    same_work,
    scale,
    stages,
    startup,
    stream,
    table,
    train,
    weights,
)
from bench.options import Options
from bench.processes import environment, run
from bench.work import Report, Work, write_job
from safetensors.torch import save_file

OPTIONS = Options(
    "tiny", rounds=1, steps=2, threads=1, dtype="float32", gpu=False, quick=True, only=(), lengths=(), out=None
)
LORA = contestants.CPU[0]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny model and 16 rows, prepared by the benchmark's own code."""
    folder = tmp_path_factory.mktemp("bench")
    return jobs.prepare_rows("tiny", folder, environment(1, folder), 128, 16, heldout_rows=8, models=folder)


@pytest.fixture(scope="module")
def work(rows: dict[str, Any]) -> Work:
    return train.make_work(OPTIONS, rows, has_bf16=False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the benchmark's own jobs in this process, and do not wait for the disk."""

    def run_module(module: str, job: Path, _: Any, result: Path) -> Any:
        import_module(f"bench.{module}").main(str(job))
        return json.loads(result.read_text(encoding="utf-8"))

    monkeypatch.setattr(jobs, "run_module", run_module)
    monkeypatch.setattr("os.sync", lambda: None)


def test_a_round_is_run_judged_and_checked(work: Work, tmp_path: Path) -> None:
    round_ = train.one_round(0, [LORA], work, tmp_path / "round", OPTIONS, {})
    report, figures = round_[LORA]
    heldout.main(str(write_job(work, tmp_path, {"lora-0": report.adapter})))
    losses = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    assert losses["lora-0"] < losses[heldout.BASE]
    assert train.work_faults(work, [round_], losses) == []

    assert report.tokens_per_second > 0
    assert 0 < figures["first_step_seconds"] < figures["seconds"]
    assert figures["peak_bytes"] > 100e6  # includes torch
    summary = table.summary([{**figures, "heldout_loss": losses["lora-0"]}])
    assert f"{report.tokens_per_second:,.0f}" in table.show({"lora": summary, "other": summary}, "lora")


GOOD = Report(2, 16, 1000, 900, 64, [6.9, 6.8], 100.0, 0.0, "")
SHAPES = {"layer.lora_A.weight": (4, 8), "layer.lora_B.weight": (8, 4)}


@pytest.mark.parametrize(
    ("changed", "faults"),
    [
        ({}, []),
        ({"rows": 15}, ["rows 15, not 16"]),
        ({"tokens": 999}, ["tokens 999, not 1,000"]),
        ({"supervised_tokens": 1}, ["supervised tokens 1, not 900"]),
        ({"trainable_parameters": 32}, ["trainable parameters 32, not 64"]),
        ({"steps": 3}, ["3 steps, not 2"]),
    ],
)
def test_other_work_is_reported(work: Work, changed: dict[str, Any], faults: list[str]) -> None:
    counted = replace(work, rows=16, tokens=1000, supervised_tokens=900)
    assert same_work.count_faults(LORA, replace(GOOD, **changed), SHAPES, counted, SHAPES) == faults


def test_other_targets_are_reported(work: Work) -> None:
    counted = replace(work, rows=16, tokens=1000, supervised_tokens=900)
    others = {"other.lora_A.weight": (4, 8), "other.lora_B.weight": (8, 4)}
    (fault,) = same_work.count_faults(LORA, GOOD, others, counted, SHAPES)
    assert "tensors are others" in fault


def test_losses_that_disagree_are_reported(work: Work) -> None:
    one, other = [each for each in contestants.CPU if each.in_order][:2]
    same, falls = {one: GOOD, other: GOOD}, {one.name: 0.1, other.name: 0.1}
    assert same_work.loss_faults(same, falls, 6.9, work) == []
    (fault,) = same_work.loss_faults(same | {other: replace(GOOD, losses=[6.9, 6.9])}, falls, 6.9, work)
    assert fault.startswith(f"{other.name}: a step's loss is 1.5e-02 from {one.name}'s")
    (fault,) = same_work.loss_faults(same, falls | {other.name: 0.11}, 6.9, work)
    assert fault == f"{other.name}: held-out loss fell by 0.1100, {one.name}'s by 0.1000"
    assert same_work.loss_faults(same | {LORA: GOOD}, falls | {"lora": 0.11}, 6.9, work) == []  # packed: a looser bound
    (fault,) = same_work.loss_faults(same | {LORA: GOOD}, falls | {"lora": 0.2}, 6.9, work)
    assert fault.startswith("lora: held-out loss fell by 0.2000, the median")
    assert len(same_work.loss_faults(same, falls, 5.0, work)) == 2


def test_memory_counts_children_and_readiness_is_timed(tmp_path: Path) -> None:
    """The process goes on once it is seen to be ready, however late that is."""
    ready, seen = tmp_path / "ready", tmp_path / "seen"
    hold = "x = b'1' * 60_000_000"
    child = f"import time; {hold}; time.sleep(1)"
    script = f"""
import os, subprocess, sys, time
open({str(ready)!r}, "w").close()
while not os.path.exists({str(seen)!r}):
    time.sleep(0.01)
{hold}
subprocess.run([sys.executable, "-c", {child!r}])
"""
    result = run(
        ["-c", script], environment(1, tmp_path), tmp_path / "log", lambda: ready.exists() and seen.touch() is None
    )
    assert result.exit_code == 0
    assert 120e6 < result.peak_bytes < 200e6
    assert result.ready_seconds is not None
    assert 0 < result.ready_seconds < result.seconds - 1


def test_a_trace_of_imports_shows_which_package_imports_which() -> None:
    trace = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       100 |        100 |     heavy.part\n"
        "import time:      2000 |       2100 |   heavy\n"
        "import time:       500 |       2600 | light\n"
    )
    assert startup.crossings(trace) == [
        {"module": "light", "by": "(at run time)", "ms": 3},
        {"module": "heavy", "by": "light", "ms": 2},
    ]


@pytest.mark.parametrize("fit", [50, 64, 1000, 2048, 3000, 99_999, 100_000])
def test_the_longest_that_fits_is_found(fit: int) -> None:
    tried = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= fit

    longest = context.search(fits, 2048, limit=100_000)
    assert longest <= fit
    assert fit - longest <= max(64, 0.01 * fit)
    assert len(tried) == len(set(tried)) < 20


def test_given_lengths_are_tried_with_activations_offloaded() -> None:
    names, options = command.parse(["context", "--gpu", "--lengths", "4096", "8192"])
    assert (names, options.lengths) == (["context"], (4096, 8192))
    options = [contestants.for_context(True, offloads)[0].options for offloads in (False, True)]
    assert options == [{}, {"training.gradient_checkpointing": "offload"}]


def test_stages_and_runs_of_few_rows(rows: dict[str, Any], tmp_path: Path) -> None:
    texts = [{"prompt": f"Question: {word}?\nAnswer:", "completion": f" The {word}."} for word in ("boat", "net")]
    scale.write_rows(texts, 5, tmp_path / "rows.jsonl")
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["prompt"] for row in written}) == 5
    job = {"rows": str(tmp_path / "rows.jsonl"), "model": rows["model"], "folder": str(tmp_path), "max_length": 64}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    stages.main(str(tmp_path / "job.json"))
    found = json.loads((tmp_path / "stages.json").read_text(encoding="utf-8"))
    assert found["rows"] == 5
    assert found["filled"] == pytest.approx(found["tokens"] / (stages.BATCH_SIZE * 64))
    assert all(each["seconds"] > 0 and each["peak_bytes"] > 50e6 for each in found["stages"].values())
    recipe = scale.write_recipe(tmp_path, rows["model"], replace(OPTIONS, steps=1))
    figures = scale.one_run(recipe, environment(1, tmp_path / "caches"))
    assert figures["tokens_per_second"] > 0 and figures["peak_bytes"] > 100e6
    shown = scale.show({"stages": {5: found}, "runs": {5: {"new": [figures], "cached": [figures]}}})
    assert "| pack: s, peak MB |" in shown and f"{figures['tokens_per_second']:,.0f}" in shown


def test_runs_of_short_rows_and_long(rows: dict[str, Any], tmp_path: Path) -> None:
    texts = [{"prompt": f"Question: {word}?\nAnswer:", "completion": f" The {word}."} for word in ("boat", "net")]
    runs = {}
    for length in (16, 32):
        folder = tmp_path / str(length)
        folder.mkdir()
        lengths.write_rows(texts, 6, lengths.CHARACTERS * length, folder / "rows.jsonl")
        recipe = scale.write_recipe(folder, rows["model"], replace(OPTIONS, steps=1), length)
        runs[length] = [scale.one_run(recipe, environment(1, tmp_path / "caches"))]
        info = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
        assert info["data"]["tokens"] == 6 * length
    shown = lengths.show({"shape": "llama", "runs": {16: runs[16], 1024: runs[32]}}).splitlines()
    layers = 8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1344)
    fixed = 2 * (layers + 512 * 32_000)
    counted = (fixed + 3 * 8 * 512 * 1024) / (fixed + 3 * 8 * 512 * 16)
    assert (
        counted > 1.1
        and f"| {counted:.2f} |" in shown[-1].replace("  ", "")
        and f"{runs[32][0]['tokens_per_second']:,.0f}" in shown[-1]
    )
    assert lengths.arithmetic("gpt2", 64) == 2 * (6 * 12 * 256 * 256 + 256 * 50_257) + 3 * 6 * 256 * 64


def test_a_streamed_base_is_set_against_a_resident_one(rows: dict[str, Any], tmp_path: Path) -> None:
    env = environment(1, tmp_path / "caches")
    runs = {
        name: [stream.one_run(stream.write_recipe(tmp_path, rows, OPTIONS, streams), env)]
        for name, streams in stream.KINDS.items()
    }
    assert stream.faults(runs) == []
    for (each,) in runs.values():
        assert 0 < each["own_bytes"] < each["peak_bytes"] and each["seconds_per_step"] > 0
    assert "resident" in stream.show({"model_bytes": 1, "runs": runs})
    runs["streamed"][0]["losses"][0] += 1
    assert len(stream.faults(runs)) == 1


def test_merge_is_measured_beside_peft(rows: dict[str, Any], tmp_path: Path) -> None:
    record = weights.measure("merge", OPTIONS, rows["model"], tmp_path, environment(1, tmp_path))
    assert record["faults"] == []
    assert record["same"]["tensors"] > 10 and record["same"]["largest"] < 1e-6
    assert record["ratios"].keys() == {"seconds", "peak_bytes"}
    assert all(run["peak_bytes"] > 50e6 and run["seconds"] > 0 for each in record["runs"].values() for run in each)


def test_quantize_is_measured_beside_transformers(rows: dict[str, Any], tmp_path: Path, here: None) -> None:
    record = weights.measure("quantize", OPTIONS, rows["model"], tmp_path, environment(1, tmp_path))
    assert record["faults"] == []
    assert record["same"]["tensors"] > 10 and record["same"]["largest"] == 0
    assert record["ratios"].keys() == {"seconds", "peak_bytes"}


def test_memory_is_measured_as_layers_are_added(tmp_path: Path, here: None) -> None:
    record = flat.measure(OPTIONS, tmp_path / "models", tmp_path, environment(1, tmp_path))
    layers = [shape["config"]["num_hidden_layers"] for shape in record["shapes"].values()]
    assert layers == [2, 20]
    small, deep = record["model_bytes"].values()
    assert deep > 2 * small
    assert record["ratios"].keys() == {"merge", "quantize"}
    assert all(0.8 < ratio < 1.2 for ratio in record["ratios"].values())
    assert all(run["peak_bytes"] > 50e6 for each in record["runs"].values() for runs in each.values() for run in runs)
    runs = {"merge": {"a": [{"seconds": 1, "peak_bytes": 4e6}], "a-10x": [{"seconds": 9, "peak_bytes": 5e6}]}}
    assert flat.ratios(runs) == {"merge": 1.25}
    assert "|  1.25 |   1.10 |" in flat.show(runs, {"merge": 1.25}, {"a": 1, "a-10x": 2})


def test_where_records_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("merge", "quantize", "flat"):
        monkeypatch.setitem(command.BENCHMARKS, name, lambda *_: {"faults": []})
        assert command.main([name, "--out", str(tmp_path)]) == 0
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"merge-llama-500m.json", "quantize-llama-500m.json", "flat-llama-40m.json"}
    record = json.loads((tmp_path / "flat-llama-40m.json").read_text(encoding="utf-8"))
    assert record["benchmark"] == "flat" and {"load", "load_after"} <= record["machine"].keys()
    assert record["versions"]["torch"] == version("torch") and record["faults"] == []
    assert command.RESULTS.parts[-3:] == ("scripts", "bench", "results")


def test_weights_that_differ_are_reported(tmp_path: Path) -> None:
    one = {"a": torch.ones(4), "b": torch.ones(2), "c": torch.ones(3)}
    other = {"a": torch.tensor([1.0, 1.0, 1.0, 2.0]), "b": torch.ones(2).bfloat16(), "d": torch.ones(3)}
    for name, tensors in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    found = same_weights.compare(tmp_path / "one", tmp_path / "other")
    assert found["largest"] == pytest.approx(1 / 7**0.5) and found["of"] == "a"
    assert [fault.split(" ")[1] for fault in found["faults"]] == ["c", "d", "b"]


def test_ratios_are_of_medians() -> None:
    def runs(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": each, "peak_bytes": 2 * each} for each in seconds]

    found = weights.ratios({"lora": runs(1, 2, 30), "PEFT": runs(4, 4, 9)}, "PEFT")
    assert found == {"seconds": 0.5, "peak_bytes": 0.5}
