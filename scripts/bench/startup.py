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
from bench.processes import Ended, environment, run, tail
from bench.work import Work, read_did, write_job

LIMITS = {"refused recipe": 1.0, "first step": 5.0}  # target seconds on two cores
LORA = ["-m", "lora_cli"]
IMPORTS = ("import torch", "from transformers import AutoModelForCausalLM", "import peft", "import datasets")
IMPORT = re.compile(r"import time:\s*(\d+) \|\s*(\d+) \|( *)(\S+)")
SHOWN = 20


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
            **{line: timed(["-c", line], env, place) for line in IMPORTS},
            "--help": timed([*LORA, "--help"], env, place),
            "train --help": timed([*LORA, "train", "--help"], env, place),
            "refused recipe": timed([*LORA, "train", str(bad)], env, place, exit_code=2),
            "first step": first_step(recipe, env, place),
        }
        if find_spec("trl"):
            found["first step of TRL"] = first_step_of_trl(folder, env, place)
        for name, value in found.items():
            seconds.setdefault(name, []).append(value)
    rows = [["", "s", "least-most", "asked"]]
    for name, values in seconds.items():
        asked = f"{LIMITS[name]:.0f}" if name in LIMITS else ""
        rows.append([name, f"{median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}", asked])
    print(table.markdown(rows))
    imports = imported(recipe, env, folder)
    rows = [["import", "by", "ms"], *([each["module"], each["by"], each["ms"]] for each in imports)]
    print(f"\nWhat pulls in what, with all that it imports in turn:\n\n{table.markdown(rows)}")
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
        checked(run([str(part) for part in script], env, folder / "demo.log"), folder / "demo.log")
    return [
        "configs/tiny-gpt2.yaml",
        f"model.name_or_path={model}",
        f"data.train={rows / 'train.jsonl'}",
        f"data.validation={rows / 'validation.jsonl'}",
        "training.logging_steps=1",
    ]


def timed(arguments: list[str], env: dict[str, str], folder: Path, exit_code: int = 0) -> float:
    """Seconds that Python takes with these arguments."""
    log = folder / "log"
    return checked(run(arguments, env, log), log, exit_code).seconds


def first_step(recipe: Sequence[str], env: dict[str, str], folder: Path) -> float:
    """Seconds from the start of the process to the end of the first step, in a run of three steps."""
    arguments = [*LORA, "train", *recipe, "training.max_steps=3", f"training.output_dir={folder / 'run'}"]
    ended = checked(run(arguments, env, folder / "log", lambda: bool(ours.metrics(folder))), folder / "log")
    assert ended.sign is not None
    return ended.sign


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
    began = checked(run(["-m", "bench.peers.sft", str(write_job(work, place, {}))], env, log), log).began
    return read_did(place).first_step_at - began


def checked(ended: Ended, log: Path, exit_code: int = 0) -> Ended:
    """Return ``ended``. Raises SystemExit, with the end of the log, when its exit code is not ``exit_code``."""
    if ended.exit_code != exit_code:
        raise SystemExit(f"exit code {ended.exit_code}, expected {exit_code}:\n{tail(log)}")
    return ended


def imported(recipe: Sequence[str], env: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """The slowest imports between packages in a run of one step, from Python's own trace."""
    log = folder / "imports.log"
    told = ["training.max_steps=1", f"training.output_dir={folder / 'run'}"]
    checked(run(["-X", "importtime", *LORA, "train", *recipe, *told], env, log), log)
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
    return sorted(found, key=lambda each: -each["ms"])[:SHOWN]
