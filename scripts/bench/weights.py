"""Compare lora merge with PEFT, and lora quantize with Transformers, on a model with random weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench import table
from bench.jobs import prepare_rows, run_job
from bench.options import Options
from bench.processes import environment, run, tail
from bench.shapes import SHAPES

OURS = "lora"
PEERS = {"merge": "PEFT", "quantize": "Transformers"}
TARGET = {"merge": {"seconds": 0.4, "peak_bytes": 0.25}, "quantize": {}}
"""Targets: the largest ratios of lora's medians to the peer's."""
MAX_DIFFERENCE = {"merge": 2**-8, "quantize": 0.0}
"""Largest difference of a tensor from the peer's, relative to its norm: merges round to bfloat16 at other points."""
RANK, ALPHA = 16, 32
PREPARED_ROWS = 16  # training and held-out rows that ``prepare`` writes
MAX_LENGTH = 256


def merge(options: Options, folder: Path) -> dict[str, Any]:
    """Compare lora merge with PEFT's loading, merge_and_unload and save_pretrained."""
    return benchmark("merge", options, folder)


def quantize(options: Options, folder: Path) -> dict[str, Any]:
    """Compare lora quantize to NF4 with from_pretrained, given a BitsAndBytesConfig, and save_pretrained."""
    return benchmark("quantize", options, folder)


def benchmark(verb: str, options: Options, folder: Path) -> dict[str, Any]:
    """Make the model, run both tools once per round in fresh processes, then compare the tensors that they wrote."""
    env = environment(options.threads, folder / "caches", options.gpu)
    made = prepare_rows(options.shape, folder, env, MAX_LENGTH, PREPARED_ROWS, PREPARED_ROWS)
    return measure(verb, options, made["model"], folder, env)


def measure(verb: str, options: Options, model: str, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run all rounds, alternating which tool goes first, then compare the tensors that they wrote."""
    commands = contestants(verb, options, model, folder, env)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(options.rounds):
        for name in list(commands)[:: -1 if number % 2 else 1]:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()  # finish the previous run's writes
            runs[name].append(one_run(commands[name], folder / f"{name}.log", env))
    arguments = {"found": str(folder / OURS), "wanted": str(folder / PEERS[verb]), "folder": str(folder)}
    same = run_job("same_weights", arguments, folder, env, "same.json")
    ratio = ratios(runs, PEERS[verb])
    print(show(runs, ratio, TARGET[verb]))
    print(f"\n{same['tensors']} tensors, the largest relative difference {same['largest']:.1e} ({same['of']})")
    faults = list(same["faults"])
    if same["largest"] > MAX_DIFFERENCE[verb]:
        faults.append(
            f"{same['of']} is {same['largest']:.1e} from {PEERS[verb]}'s, at most {MAX_DIFFERENCE[verb]:.1e} is meant"
        )
    for fault in faults:
        print(f"NOT the same: {fault}")
    return {
        "rounds": options.rounds,
        "shape": {"name": options.shape, **asdict(SHAPES[options.shape])},
        "runs": runs,
        "ratios": ratio,
        "asked": TARGET[verb],
        "same": same,
        "faults": faults,
    }


def contestants(verb: str, options: Options, model: str, folder: Path, env: dict[str, str]) -> dict[str, list[str]]:
    """The Python arguments that start each tool, which writes to a folder of its name. Makes the adapter to merge."""
    target = model
    if verb == "merge":
        job = {"model": model, "targets": SHAPES[options.shape].targets, "r": RANK, "lora_alpha": ALPHA}
        target = run_job("prepare_adapter", job | {"folder": str(folder)}, folder, env, "adapter.json")["adapter"]
    flags = {"merge": ["--no-verify"], "quantize": ["--method", "nf4", "--double-quant"]}[verb]
    return {
        OURS: ["-m", "lora_cli", verb, target, "--out", str(folder / OURS), *flags],
        PEERS[verb]: ["-m", f"bench.peers.{verb}", target, str(folder / PEERS[verb])],
    }


def one_run(arguments: list[str], log: Path, env: dict[str, str]) -> dict[str, float]:
    """Seconds and peak memory of the whole process. Raises SystemExit when it fails."""
    result = run(arguments, env, log)
    if result.exit_code:
        raise SystemExit(f"exit code {result.exit_code}:\n{tail(log)}")
    return {"seconds": result.seconds, "peak_bytes": result.peak_bytes}


def ratios(runs: Mapping[str, Sequence[Mapping[str, float]]], peer: str) -> dict[str, float]:
    """lora's median over the peer's, for each figure."""
    medians = {name: {key: median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}
    return {key: value / medians[peer][key] for key, value in medians[OURS].items()}


def show(
    runs: Mapping[str, Sequence[Mapping[str, float]]], ratio: Mapping[str, float], target: Mapping[str, float]
) -> str:
    """Medians, spread and ratios in Markdown."""
    rows = [["", "s", "least-most", "peak MB"]]
    for name, each in runs.items():
        seconds, peak = ([run[key] for run in each] for key in ("seconds", "peak_bytes"))
        spread = f"{min(seconds):.1f}-{max(seconds):.1f}"
        rows.append([name, f"{median(seconds):.1f}", spread, f"{median(peak) / 1e6:,.0f}"])
    rows.append(["ratio", f"{ratio['seconds']:.2f}", "", f"{ratio['peak_bytes']:.2f}"])
    if target:
        rows.append(["target", f"{target['seconds']:.2f}", "", f"{target['peak_bytes']:.2f}"])
    return table.markdown(rows)
