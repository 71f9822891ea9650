"""Peak memory of lora merge and lora quantize on a model and on one with ten times as many layers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import table
from bench.jobs import MODELS, prepare_rows
from bench.options import Options
from bench.processes import environment
from bench.shapes import DEEPER, SHAPES
from bench.weights import MAX_LENGTH, OURS, PREPARED_ROWS, contestants, one_run

VERBS = ("merge", "quantize")
TARGET = 1.1
"""Target: the largest ratio of the deeper model's peak memory to the other's."""

Runs = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]
"""Runs by verb, then by shape."""


def benchmark(options: Options, folder: Path) -> dict[str, Any]:
    """Make both models and measure on them."""
    env = environment(options.threads, folder / "caches", options.gpu)
    return measure(options, MODELS, folder, env)


def measure(options: Options, models: Path, folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run both verbs on both models once per round, in fresh processes."""
    shapes = (options.shape, options.shape + DEEPER)
    commands, sizes = {}, {}
    for shape in shapes:
        place = folder / shape
        place.mkdir()
        model = prepare_rows(shape, place, env, MAX_LENGTH, PREPARED_ROWS, PREPARED_ROWS, models)["model"]
        sizes[shape] = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
        for verb in VERBS:
            commands[verb, shape] = contestants(verb, replace(options, shape=shape), model, place, env)[OURS]
    runs: dict[str, dict[str, list[dict[str, float]]]] = {verb: {shape: [] for shape in shapes} for verb in VERBS}
    for _ in range(options.rounds):
        for (verb, shape), command in commands.items():
            shutil.rmtree(folder / shape / OURS, ignore_errors=True)
            os.sync()  # finish the previous run's writes
            runs[verb][shape].append(one_run(command, folder / f"{verb}.log", env))
    ratio = ratios(runs)
    print(show(runs, ratio, sizes))
    return {
        "rounds": options.rounds,
        "shapes": {shape: asdict(SHAPES[shape]) for shape in shapes},
        "model_bytes": sizes,
        "runs": runs,
        "ratios": ratio,
        "asked": TARGET,
        "faults": [],
    }


def ratios(runs: Runs) -> dict[str, float]:
    """For each verb, the deeper model's median peak memory over the other's."""
    found = {}
    for verb, shapes in runs.items():
        one, deeper = (median(run["peak_bytes"] for run in each) for each in shapes.values())
        found[verb] = deeper / one
    return found


def show(runs: Runs, ratio: Mapping[str, float], sizes: Mapping[str, int]) -> str:
    """Medians, spread and ratios in Markdown."""
    rows = [["", "model MB", "s", "peak MB", "least-most", "ratio", "target"]]
    for verb, shapes in runs.items():
        for shape, each in shapes.items():
            seconds, peaks = ([run[key] for run in each] for key in ("seconds", "peak_bytes"))
            spread = f"{min(peaks) / 1e6:,.0f}-{max(peaks) / 1e6:,.0f}"
            compared = [f"{ratio[verb]:.2f}", f"{TARGET:.2f}"] if shape.endswith(DEEPER) else ["", ""]
            figures = [f"{sizes[shape] / 1e6:,.0f}", f"{median(seconds):.1f}", f"{median(peaks) / 1e6:,.0f}", spread]
            rows.append([f"{verb} {shape}", *figures, *compared])
    return table.markdown(rows)
