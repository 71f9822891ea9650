"""The cost per token as rows get longer while the tokens per step stay the same."""

from __future__ import annotations

import json
import shutil
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from bench import data, table
from bench.jobs import prepare_rows
from bench.options import Options
from bench.processes import environment
from bench.scale import SEED, TOKENS, one_run, write_recipe
from bench.shapes import SHAPES

LENGTHS, QUICK_LENGTHS = (128, 256, 512, 1024), (64, 128)
CHARACTERS = 10  # of text per token that a row is truncated to: more than any tokenizer needs
ROWS = 64  # training and held-out rows that ``prepare`` writes


def benchmark(options: Options, folder: Path) -> dict[str, Any]:
    """Run once per length in each round, with rows from the same texts truncated to that length."""
    env = environment(options.threads, folder / "caches", options.gpu)
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    made = prepare_rows(options.shape, folder, env, lengths[-1], ROWS, ROWS)
    source, texts, _ = data.texts(SEED)
    runs: dict[int, list[dict[str, float]]] = {length: [] for length in lengths}
    for length in lengths:
        (folder / str(length)).mkdir()
        needed = (options.steps + 8) * TOKENS // length
        write_rows(texts, needed, length * CHARACTERS, folder / str(length) / "rows.jsonl")
    for _ in range(options.rounds):
        for length, found in runs.items():
            shutil.rmtree(folder / str(length) / "run", ignore_errors=True)
            found.append(one_run(write_recipe(folder / str(length), made["model"], options, length), env))
    record = {
        "rounds": options.rounds,
        "shape": options.shape,
        "rows_from": source,
        "tokens_per_step": TOKENS,
        "runs": runs,
        "faults": [],
    }
    print(show(record))
    return record


def write_rows(texts: list[dict[str, str]], count: int, characters: int, path: Path) -> None:
    """Write ``count`` rows to ``path``, each with a completion of ``characters`` characters joined from ``texts``."""
    pieces = cycle(texts)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            first = next(pieces)
            completion = first["completion"]
            while len(completion) < characters:
                completion += next(pieces)["completion"]
            row = {"prompt": f"{number}. {first['prompt']}", "completion": completion[:characters]}
            file.write(json.dumps(row) + "\n")


def arithmetic(shape: str, length: int) -> float:
    """Multiplications to train on a token: two passes of each frozen layer (forward, and gradient w.r.t. its input) and
    three of causal attention, whose two products need the gradients w.r.t. both their inputs."""
    config = SHAPES[shape].config
    if "n_embd" in config:
        width, layers = config["n_embd"], config["n_layer"]
        linear = 12 * width * width
    else:
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        narrow = width * config["num_key_value_heads"] // config["num_attention_heads"]
        linear = 2 * width * width + 2 * width * narrow + 3 * width * config["intermediate_size"]
    return float(2 * layers * linear + 3 * layers * width * length + 2 * width * config["vocab_size"])


def show(record: dict[str, Any]) -> str:
    """The table in Markdown: the time per token, measured and by ``arithmetic``, relative to the shortest rows."""
    runs = record["runs"]
    shortest = min(runs)
    base = median(each["tokens_per_second"] for each in runs[shortest])
    lines = [["length", "tokens/s", "least-most", "time of a token", "its arithmetic", "peak MB"]]
    for length, found in runs.items():
        rates = [each["tokens_per_second"] for each in found]
        counted = arithmetic(record["shape"], length) / arithmetic(record["shape"], shortest)
        peak = median(each["peak_bytes"] for each in found)
        cells = [f"{length:,}", f"{median(rates):,.0f}", f"{min(rates):,.0f}-{max(rates):,.0f}"]
        lines.append([*cells, f"{base / median(rates):.2f}", f"{counted:.2f}", f"{peak / 1e6:,.0f}"])
    return table.markdown(lines)
