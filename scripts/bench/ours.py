"""lora as a contestant: recipes for its command line, and its report, read from the files of the run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from bench.options import Options
from bench.processes import ProcessResult
from bench.shapes import SHAPES
from bench.work import Report, Work


def write_recipe(work: Work, folder: Path, options: dict[str, Any]) -> Path:
    """Write the recipe for ``work``. ``options`` are dotted keys to set; other settings keep lora's defaults."""
    packing = options.get("data.packing", True)
    recipe: dict[str, Any] = {
        "model": {"name_or_path": work.model},
        "adapter": {"r": work.r, "lora_alpha": work.lora_alpha, "target_modules": list(work.targets)},
        "data": {"train": work.train, "max_length": work.max_length},
        "training": {
            "output_dir": str(folder / "run"),
            "num_train_epochs": 1,
            "per_device_train_batch_size": work.packed_batch_size if packing else work.batch_size,
            "gradient_accumulation_steps": 1,
            "learning_rate": work.learning_rate,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "seed": work.seed,
            "logging_steps": 1,
            "save_steps": None,
        },
    }
    if work.precision == "float32":
        recipe["model"]["dtype"] = "float32"
    for dotted, value in options.items():
        section, key = dotted.split(".")
        recipe[section][key] = value
    return _write(recipe, folder)


def write_steps(
    options: Options, model: str, rows: str, folder: Path, max_length: int, r: int, training: dict[str, Any]
) -> Path:
    """Write a recipe for some steps on ``rows``, with an adapter on the shape's layers and these ``training`` keys."""
    recipe = {
        "model": {"name_or_path": model} | ({} if options.dtype == "auto" else {"dtype": options.dtype}),
        "adapter": {"r": r, "target_modules": list(SHAPES[options.shape].targets)},
        "data": {"train": rows, "max_length": max_length},
        "training": {
            "output_dir": str(folder / "run"),
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "save_steps": None,
            **training,
        },
    }
    return _write(recipe, folder)


def _write(recipe: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The training lines that metrics.jsonl has so far."""
    path = folder / "run" / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in map(json.loads, whole) if line["split"] == "train"]


def rate(lines: list[dict[str, Any]], warmup: int) -> float:
    """Real tokens per second after ``warmup`` steps. A line's tokens_per_second is that since the previous line."""
    ends = [0.0, *(line["seconds"] for line in lines)]
    spans = [end - start for start, end in pairwise(ends)]
    tokens = [line["tokens_per_second"] * span for line, span in zip(lines, spans, strict=True)]
    return float(sum(tokens[warmup:]) / (ends[-1] - ends[warmup]))


def read_run(work: Work, folder: Path, result: ProcessResult) -> Report:
    """The report of the run, from its files."""
    lines = metrics(folder)
    info = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    assert result.ready_seconds is not None
    return Report(
        steps=len(lines),
        rows=info["data"]["rows"],
        tokens=info["data"]["tokens"],
        supervised_tokens=sum(line["tokens"] for line in lines),
        trainable_parameters=info["result"]["trainable_parameters"],
        losses=[line["loss"] for line in lines],
        tokens_per_second=rate(lines, work.warmup_steps),
        first_step_at=result.began + result.ready_seconds,
        adapter=str(folder / "run" / "adapter"),
        settings={"weights": [info["dtype"]], "packed": info["data"]["packed"]},
    )
