"""Kill real runs at random instants, resume each until it ends, and compare its files with an uninterrupted run's.

A kill is SIGKILL, or two SIGTERMs or SIGINTs in a row. The adapter must be equal byte for byte, metrics.jsonl must have
every step once, and no checkpoint may be incomplete. Each run is a process that does what ``lora train`` does, forked
from a process that has imported torch, so that a kill costs one second instead of ten.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """
model: {{name_or_path: {model}, dtype: float32}}
adapter: {{r: 4, target_modules: all-linear, lora_dropout: 0.1}}
data: {{train: {rows}, validation: 0.2, max_length: 64, packing: true}}
training:
  output_dir: {run}
  max_steps: 12
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 0.01
  logging_steps: 1
  eval_steps: 3
  save_steps: 1
  save_total_limit: 2
  load_best_model_at_end: true
"""
PRELOADED = ["lora_cli.cli.app", "lora_cli.study.report", "lora_cli.training.loop", "matplotlib.figure"]
PRELOADED += ["transformers.models.gpt2.modeling_gpt2"]
KINDS = ("any time", "in a write", "after a write", "two signals")
STOPPED = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)
NOT_REPEATED = ("tokens_per_second", "seconds")
LOOK_AGAIN = 0.0003  # seconds between two polls
RACE = 0.004  # seconds: longest delay from the appearance of a file to the kill


def forking() -> Any:
    """A multiprocessing context that forks from a process that has imported what a run needs but computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def lora(arguments: list[str], log: Path) -> None:
    """Run the command line in this process, with stdout and stderr in ``log``, and exit with its code."""
    try:
        with log.open("w", encoding="utf-8") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        from lora_cli.cli.app import main

        code = main(arguments)
        sys.stdout.flush()
        os._exit(code)  # skips multiprocessing's own shutdown, and signals during it: neither is part of lora
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)


def start(context: Any, recipe: Path, run: Path, log: Path, *more: str) -> BaseProcess:
    """Start ``lora train``, with --resume if the run's folder exists."""
    resume = ["--resume"] if run.is_dir() else []
    command = ["train", str(recipe), f"training.output_dir={run}", *more, *resume]
    process: BaseProcess = context.Process(target=lora, args=(command, log))
    process.start()
    return process


def names(folder: Path) -> set[str]:
    """The names in a folder, or none where there is no folder: a run that starts or ends may remove it at any time."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def drafts(run: Path) -> set[str]:
    """The drafts in a run's folder: files that are being written, or were when the process was killed."""
    folders = (run, run / "checkpoints", run / "cache")
    return {name for folder in folders for name in names(folder) if name.startswith(".")}


def checkpoints(run: Path) -> set[str]:
    return {name for name in names(run / "checkpoints") if name.startswith("step-")}


def kill(process: BaseProcess, run: Path, log: Path, kind: str, seconds: float, chance: random.Random) -> None:
    """Wait a random part of ``seconds``, a complete run's duration; then kill the process at an instant of ``kind``."""

    def alive_until(seen: Callable[[], object]) -> None:
        while process.is_alive():
            if seen():
                return
            time.sleep(LOOK_AGAIN)

    process.join(chance.uniform(0, seconds))
    if kind == "two signals":
        alive_until(log.exists)  # before that, the command has not started
        asked = chance.choice((signal.SIGTERM, signal.SIGINT))
        for _ in range(2):
            if process.is_alive():
                with suppress(ProcessLookupError):  # it has ended since
                    os.kill(process.pid or 0, asked)
                time.sleep(chance.uniform(0, 5 * RACE))
        return process.join()
    if kind == "in a write":
        before = drafts(run)
        alive_until(lambda: drafts(run) - before)
    elif kind == "after a write":
        stood = checkpoints(run)
        alive_until(lambda: checkpoints(run) - stood)
    time.sleep(chance.uniform(0, RACE) if kind != "any time" else 0)
    process.kill()
    process.join()


def faults(run: Path, whole: Path) -> list[str]:
    """How ``run`` differs from ``whole``, the uninterrupted run. Includes leftover drafts, incomplete checkpoints."""
    from lora_cli.training.run.checkpoint import is_complete

    found = [f"left behind: {name}" for name in sorted(drafts(run))]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if (run / "adapter" / name).read_bytes() != (whole / "adapter" / name).read_bytes():
            found.append(f"another {name}")
    if measured(run) != measured(whole):
        found.append("other lines in metrics.jsonl")
    if checkpoints(run) != checkpoints(whole):
        found.append(f"checkpoints {sorted(checkpoints(run))}, not {sorted(checkpoints(whole))}")
    found += [f"{name} is torn" for name in sorted(checkpoints(run)) if not is_complete(run / "checkpoints" / name)]
    if not json.loads((run / "run.json").read_text(encoding="utf-8"))["finished"]:
        found.append("run.json is not finished")
    return found


def measured(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and speeds, which differ from run to run."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in NOT_REPEATED} for line in lines]


def soak(recipe: Path, folder: Path, rounds: int, seed: int) -> Counter[str]:
    """Kill runs of the recipe ``rounds`` times. Return how often each event occurred.

    Raises AssertionError, with the log's end, when a run cannot be resumed or differs from an uninterrupted one.
    """
    folder.mkdir(exist_ok=True)
    context, chance, seen = forking(), random.Random(seed), Counter[str]()
    whole, log = folder / "whole", folder / "log"
    for _ in range(2):  # only the second is timed: the first waits for the imports
        shutil.rmtree(whole, ignore_errors=True)
        began = time.monotonic()
        process = start(context, recipe, whole, log)
        process.join()
        assert process.exitcode == 0, log.read_text(encoding="utf-8")[-3000:]
    seconds = time.monotonic() - began
    while seen["kills"] < rounds:
        run = folder / f"run{seen['runs']}"
        spared = False
        while not spared:
            log = folder / f"{run.name}-{seen['kills in a row']}.log"
            process = start(context, recipe, run, log)
            kind = chance.choice(KINDS)
            if seen["kills"] < rounds and seen["kills in a row"] < 8:
                kill(process, run, log, kind, seconds, chance)
            process.join()
            spared = process.exitcode not in STOPPED
            if not spared:
                seen.update(["kills", "kills in a row", kind])
                seen["drafts left"] += bool(drafts(run))
                seen["before the first checkpoint"] += not checkpoints(run)
        told = f"seed {seed}, {run.name}: {log.read_text(encoding='utf-8')[-3000:]}"
        assert process.exitcode == 0, f"exit code {process.exitcode}, {told}"
        found = faults(run, whole)
        assert not found, f"{found}, {told}"
        seen.update(["runs"])
        seen["kills in a row"] = 0
        shutil.rmtree(run)
        print(f"{seen['kills']} of {rounds} kills, {seen['runs']} runs ended as the one left alone")
    del seen["kills in a row"]
    return seen


def prepare(folder: Path) -> Path:
    """Write a tiny model, rows and a recipe to ``folder``. Return the recipe's path."""
    from demo_model import make_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = [f"In the year {1900 + number} the harbour had {number * 7 % 50} boats and a bell." for number in range(60)]
    tokenizer = make_tokenizer(rows)
    tokenizer.save_pretrained(folder / "model")
    shape = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(shape).save_pretrained(folder / "model")
    text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(model=folder / "model", rows=folder / "rows.jsonl", run=folder / "run"), encoding="utf-8"
    )
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="how many kills")
    parser.add_argument("--seed", type=int, default=0, help="of the instants; the machine's timing is its own")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lora-soak-") as folder:
        seen = soak(prepare(Path(folder)), Path(folder), options.rounds, options.seed)
    kinds = ", ".join(f"{seen[kind]} {kind}" for kind in KINDS)
    print(
        f"{seen['kills']} kills ({kinds}), {seen['drafts left']} with a write half done, "
        f"{seen['before the first checkpoint']} before a checkpoint; {seen['runs']} runs resumed to the end, all equal "
        f"to the run left alone; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
