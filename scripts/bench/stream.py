"""Compare a frozen base in memory with one whose layers are read from disk as they run: memory, time, losses."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from bench import ours, table
from bench.jobs import prepare_rows
from bench.options import Options
from bench.processes import environment, run, tail
from bench.shapes import SHAPES

MAX_LENGTH = 256
ROWS = 192
CLOSE = 1e-3
"""Largest absolute difference between losses: the matrix products are the same, in 16 bits."""
KINDS = {"resident": False, "streamed": True}


def benchmark(options: Options, folder: Path) -> dict[str, Any]:
    """Run both once per round in fresh processes, both with gradient checkpointing."""
    env = environment(options.threads, folder / "caches", options.gpu)
    made = prepare_rows(options.shape, folder, env, MAX_LENGTH, ROWS, heldout_rows=1)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
    for _ in range(options.rounds):
        for name, found in runs.items():
            found.append(one_run(write_recipe(folder, made, options, KINDS[name]), env))
    record = {
        "rounds": options.rounds,
        "shape": asdict(SHAPES[options.shape]),
        "max_length": MAX_LENGTH,
        "model_bytes": sum(file.stat().st_size for file in Path(made["model"]).glob("*.safetensors")),
        "runs": runs,
        "faults": faults(runs),
    }
    print(show(record))
    return record


def write_recipe(folder: Path, made: dict[str, Any], options: Options, streams: bool) -> Path:
    """Write a recipe for some steps with a batch size of 1 and an adapter of rank 16 on the shape's layers."""
    training = {
        "max_steps": options.steps,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
        "stream_base": streams,
        "warmup_steps": 0,
    }
    return ours.write_steps(options, made["model"], made["train"], folder, MAX_LENGTH, r=16, training=training)


def one_run(recipe: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run ``lora train``: losses, seconds per step after the first, and peak memory with and without mapped files."""
    folder, log = recipe.parent, recipe.parent / "log"
    shutil.rmtree(folder / "run", ignore_errors=True)
    result = run(["-m", "lora_cli", "train", str(recipe)], env, log)
    if result.exit_code:
        raise SystemExit(f"lora ended with {result.exit_code}:\n{tail(log)}")
    lines = ours.metrics(folder)
    seconds = [line["seconds"] for line in lines]
    return {
        "losses": [line["loss"] for line in lines],
        "seconds_per_step": (seconds[-1] - seconds[0]) / (len(seconds) - 1),
        "peak_bytes": result.peak_bytes,
        "own_bytes": result.own_bytes,
        "device_bytes": result.device_bytes,
    }


def faults(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The runs whose losses differ from the first resident run's."""
    first = runs["resident"][0]["losses"]
    return [
        f"{name}: losses {each['losses']}, not {first}"
        for name, found in runs.items()
        for each in found
        if any(abs(one - other) > CLOSE for one, other in zip(each["losses"], first, strict=True))
    ]


def show(record: dict[str, Any]) -> str:
    """Medians in Markdown."""
    lines = [["", "s a step", "own peak MB", "with mapped files", "last loss"]]
    for name, found in record["runs"].items():
        step, own, peak = (
            median(each[key] for each in found) for key in ("seconds_per_step", "own_bytes", "peak_bytes")
        )
        lines.append([name, f"{step:.1f}", f"{own / 1e6:,.0f}", f"{peak / 1e6:,.0f}", f"{found[0]['losses'][-1]:.4f}"])
    return f"weights of {record['model_bytes'] / 1e6:,.0f} MB\n\n{table.markdown(lines)}"
