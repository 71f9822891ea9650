"""Time and memory as the number of rows grows: each data stage before the first step, and the speed of the steps."""

from __future__ import annotations

import json
import shutil
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from bench import data, ours, table
from bench.jobs import prepare_rows, run_job
from bench.options import Options
from bench.processes import environment, run, tail

ROWS, QUICK_ROWS = (1_000, 10_000, 100_000), (40, 80)
MOST_ROWS, QUICK_MOST_ROWS = 1_000_000, 160  # only for the data stages
MAX_LENGTH = 256
TOKENS = 4096  # per step
WARMUP = 4  # steps that do not count for tokens per second
PREPARED_ROWS = 16  # training and held-out rows that ``prepare`` writes
SEED = 0


def benchmark(options: Options, folder: Path) -> dict[str, Any]:
    """Measure the stages once, and in each round two runs: on new rows, and on the same rows read from the cache.

    Each is a fresh process. Rounds are interleaved over the numbers of rows.
    """
    env = environment(options.threads, folder / "caches", options.gpu)
    made = prepare_rows(options.shape, folder, env, MAX_LENGTH, PREPARED_ROWS, PREPARED_ROWS)
    source, texts, _ = data.texts(SEED)
    stages, runs = {}, {}
    trained = QUICK_ROWS if options.quick else ROWS
    for count in (*trained, QUICK_MOST_ROWS if options.quick else MOST_ROWS):
        place = folder / str(count)
        place.mkdir()
        write_rows(texts, count, place / "rows.jsonl")
        job = {"rows": str(place / "rows.jsonl"), "model": made["model"], "folder": str(place)}
        stages[count] = run_job("stages", job | {"max_length": MAX_LENGTH}, place, env, "stages.json")
    for count in trained:
        runs[count] = {"new": [], "cached": []}
    for _ in range(options.rounds):
        for count, found in runs.items():
            recipe = write_recipe(folder / str(count), made["model"], options)
            shutil.rmtree(folder / str(count) / "run", ignore_errors=True)
            for name in found:
                found[name].append(one_run(recipe, env))
    record = {
        "rounds": options.rounds,
        "shape": options.shape,
        "rows_from": source,
        "max_length": MAX_LENGTH,
        "tokens_per_step": TOKENS,
        "stages": stages,
        "runs": runs,
        "faults": [],
    }
    print(show(record))
    return record


def write_rows(texts: list[dict[str, str]], count: int, path: Path) -> None:
    """Write ``count`` rows to ``path``. The number in its prompt makes each row distinct."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(texts), count)):
            file.write(json.dumps({**row, "prompt": f"{number}. {row['prompt']}"}) + "\n")


def write_recipe(folder: Path, model: str, options: Options, max_length: int = MAX_LENGTH) -> Path:
    """Write a recipe for some steps on the folder's rows, packed to TOKENS tokens per step for every ``max_length``."""
    training = {"max_steps": options.steps + WARMUP, "per_device_train_batch_size": TOKENS // max_length}
    return ours.write_steps(options, model, str(folder / "rows.jsonl"), folder, max_length, r=8, training=training)


def one_run(recipe: Path, env: dict[str, str]) -> dict[str, float]:
    """Run ``lora train``: seconds to the first step, real tokens per second after the warm-up, peak resident memory."""
    folder, log = recipe.parent, recipe.parent / "log"
    (folder / "run" / "metrics.jsonl").unlink(missing_ok=True)
    result = run(["-m", "lora_cli", "train", str(recipe), "--overwrite"], env, log, lambda: bool(ours.metrics(folder)))
    if result.exit_code or result.ready_seconds is None:
        raise SystemExit(f"lora ended with {result.exit_code}:\n{tail(log)}")
    rate = ours.rate(ours.metrics(folder), WARMUP)
    return {"first_step_seconds": result.ready_seconds, "tokens_per_second": rate, "peak_bytes": result.peak_bytes}


def show(record: dict[str, Any]) -> str:
    """Both tables in Markdown."""
    names = list(next(iter(record["stages"].values()))["stages"])
    lines = [["rows", "tokens", *(f"{name}: s, peak MB" for name in names), "filled"]]
    for count, found in record["stages"].items():
        cells = (f"{each['seconds']:.2f}, {each['peak_bytes'] / 1e6:,.0f}" for each in found["stages"].values())
        lines.append([f"{count:,}", f"{found['tokens']:,}", *cells, f"{found['filled']:.1%}"])
    runs = [["rows", "tokens/s", "least-most", "first step s: new, cached", "peak MB: new, cached"]]
    for count, found in record["runs"].items():
        rates = [each["tokens_per_second"] for kind in found.values() for each in kind]
        first, peak = (
            [median(each[figure] for each in kind) for kind in found.values()]
            for figure in ("first_step_seconds", "peak_bytes")
        )
        runs.append(
            [
                f"{count:,}",
                f"{median(rates):,.0f}",
                f"{min(rates):,.0f}-{max(rates):,.0f}",
                ", ".join(f"{each:.1f}" for each in first),
                ", ".join(f"{each / 1e6:,.0f}" for each in peak),
            ]
        )
    return f"{table.markdown(lines)}\n\n{table.markdown(runs)}"
