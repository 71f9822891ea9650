"""Time the start-up: help, a rejected recipe, the first step of the demo's recipe, and the slowest imports."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from bench import data, ours, table
from bench.options import Options
from bench.processes import ProcessResult, environment, run, tail
from bench.work import Work, read_report, write_job

LIMITS = {"refused recipe": 1.0, "first step": 5.0}  # target seconds on two cores
LORA = ["-m", "lora_cli"]
IMPORTS = ("import torch", "from transformers import AutoModelForCausalLM", "import peft", "import datasets")
IMPORT = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \|( *)(\S+)")
SHOWN_IMPORTS = 20


def benchmark(options: Options, folder: Path) -> dict[str, Any]:
    """Time each command once per round in a fresh process; then trace the imports of one run."""
    env = environment(options.threads, folder / "caches")
    recipe = demo_recipe(folder, env)
    bad = folder / "bad.yaml"
    bad.write_text(
        "model: {name_or_path: nowhere}\nadapter: {rank: 8}\ndata: {train: nowhere.jsonl}\n", encoding="utf-8"
    )
    seconds: dict[str, list[float]] = {}
    for number in range(options.rounds):
        place = folder / f"round{number}"
        place.mkdir()
        found = {
            **{line: seconds_of(["-c", line], env, place) for line in IMPORTS},
            "--help": seconds_of([*LORA, "--help"], env, place),
            "train --help": seconds_of([*LORA, "train", "--help"], env, place),
            "refused recipe": seconds_of([*LORA, "train", str(bad)], env, place, exit_code=2),
            "first step": first_step(recipe, env, place),
        }
        if find_spec("trl"):
            found["first step of TRL"] = first_step_of_trl(folder, env, place)
        for name, value in found.items():
            seconds.setdefault(name, []).append(value)
    rows = [["", "s", "least-most", "target"]]
    for name, values in seconds.items():
        target = f"{LIMITS[name]:.0f}" if name in LIMITS else ""
        rows.append([name, f"{median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}", target])
    print(table.markdown(rows))
    imports = slowest_imports(recipe, env, folder)
    rows = [["import", "by", "ms"], *([each["module"], each["by"], each["ms"]] for each in imports)]
    print(f"\nWhich package imports which, with all nested imports:\n\n{table.markdown(rows)}")
    return {
        "rounds": options.rounds,
        "seconds": seconds,
        "limits": LIMITS,
        "imports": imports,
        "faults": [],
    }


def demo_recipe(folder: Path, env: dict[str, str]) -> list[str]:
    """Arguments that train configs/tiny-gpt2.yaml on a model and rows made here by the demo's scripts. The model is
    pretrained for only one step, which does not affect the times."""
    rows, model = folder / "data", folder / "base"
    for script in (
        ["scripts/demo_data.py", "--out", rows],
        ["scripts/demo_model.py", "--data", rows, "--out", model, "--steps", "1"],
    ):
        require_exit_code(run([str(part) for part in script], env, folder / "demo.log"), folder / "demo.log")
    return [
        "configs/tiny-gpt2.yaml",
        f"model.name_or_path={model}",
        f"data.train={rows / 'train.jsonl'}",
        f"data.validation={rows / 'validation.jsonl'}",
        "training.logging_steps=1",
    ]


def seconds_of(arguments: list[str], env: dict[str, str], folder: Path, exit_code: int = 0) -> float:
    """Seconds that Python takes with these arguments."""
    log = folder / "log"
    return require_exit_code(run(arguments, env, log), log, exit_code).seconds


def first_step(recipe: Sequence[str], env: dict[str, str], folder: Path) -> float:
    """Seconds from the start of the process to the end of the first step, in a run of three steps."""
    arguments = [*LORA, "train", *recipe, "training.max_steps=3", f"training.output_dir={folder / 'run'}"]
    result = require_exit_code(run(arguments, env, folder / "log", lambda: bool(ours.metrics(folder))), folder / "log")
    assert result.ready_seconds is not None
    return result.ready_seconds


def first_step_of_trl(folder: Path, env: dict[str, str], place: Path) -> float:
    """The same for SFTTrainer with the demo's model, adapter and first 48 rows, without an evaluation before it."""
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    work = Work(
        model=str(folder / "base"),
        train=data.write(place / "train.jsonl", [data.row(each["question"], each["answer"]) for each in rows], 48),
        heldout="",
        rows=48,
        tokens=0,
        supervised_tokens=0,
        targets=("c_attn", "c_proj", "c_fc"),
        batch_size=16,
        packed_batch_size=16,
        max_length=128,
        r=16,
        lora_alpha=32,
        learning_rate=5e-3,
        warmup_steps=1,
        precision="float32",
    )
    log = place / "log"
    began = require_exit_code(run(["-m", "bench.peers.sft", str(write_job(work, place, {}))], env, log), log).began
    return read_report(place).first_step_at - began


def require_exit_code(result: ProcessResult, log: Path, exit_code: int = 0) -> ProcessResult:
    """Return ``result``. Raises SystemExit, with the end of the log, when its exit code is not ``exit_code``."""
    if result.exit_code != exit_code:
        raise SystemExit(f"exit code {result.exit_code}, expected {exit_code}:\n{tail(log)}")
    return result


def slowest_imports(recipe: Sequence[str], env: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """The slowest imports between packages in a run of one step, from Python's own trace."""
    log = folder / "imports.log"
    overrides = ["training.max_steps=1", f"training.output_dir={folder / 'run'}"]
    require_exit_code(run(["-X", "importtime", *LORA, "train", *recipe, *overrides], env, log), log)
    return crossings(log.read_text(encoding="utf-8", errors="replace"))


def crossings(trace: str) -> list[dict[str, Any]]:
    """The slowest imports of one package by another, slowest first. Times include all nested imports.

    ``trace`` is the output of -X importtime. It lists a module after the modules that it imports, so that read
    backwards each module follows its importer.
    """
    found = []
    chain: list[str] = []
    for _, whole, indent, module in reversed(IMPORT.findall(trace)):
        depth = (len(indent) - 1) // 2
        chain[depth:] = [module]
        importer = chain[depth - 1] if depth else "(at run time)"
        if importer.partition(".")[0] != module.partition(".")[0]:
            found.append({"module": module, "by": importer, "ms": round(int(whole) / 1000)})
    return sorted(found, key=lambda each: -each["ms"])[:SHOWN_IMPORTS]
