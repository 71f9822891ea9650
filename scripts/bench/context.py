"""Find the longest context that trains on this device: rows of one length, batch size 1, each in a fresh process.

Or measure the memory at given lengths, with lora offloading activations. A few short lengths predict the memory of a
longer one. Measuring that would take hours, because attention is most of the work there.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import table
from bench.contestants import Contestant, choose, for_context, read, start
from bench.jobs import MODELS, run_job
from bench.options import Options
from bench.processes import environment, fresh_folder, tail
from bench.shapes import SHAPES
from bench.work import Work

R, QUICK_R = 32, 8
FIRST, QUICK_LIMIT = 2048, 256
GRAIN = 0.01  # relative precision of the search
MULTIPLE = 64  # every length is a multiple of this
ROWS = 2  # one per step: the second step has the optimizer's state in memory
OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "CUBLAS_STATUS_ALLOC_FAILED")
PUBLISHED = {"unsloth": 342_733, "huggingface-flash-attention-2": 28_454}  # 8B, NF4, r=32, all linear layers, 80 GB


def benchmark(options: Options, folder: Path) -> dict[str, Any]:
    """Search for the longest context of each contestant, or try ``options.lengths``."""
    limit = QUICK_LIMIT if options.quick else SHAPES[options.shape].config["max_position_embeddings"]
    env = environment(options.threads, folder / "caches", options.gpu)
    arguments = {"shape": options.shape, "models": str(MODELS), "folder": str(folder), "tokens": limit}
    rows = run_job("prepare_long", arguments | {"rows": ROWS}, folder, env, "rows.json")
    work = long_work(options, rows)
    everyone = for_context(options.gpu, offloads=bool(options.lengths))
    contestants, skipped = choose(everyone, options.only, work, has_bf16=options.gpu)
    probes: dict[str, list[dict[str, Any]]] = {}
    longest: dict[str, int] = {}
    for contestant in contestants:
        tried = probes.setdefault(contestant.name, [])

        def fits(length: int, contestant: Contestant = contestant, tried: list[dict[str, Any]] = tried) -> bool:
            tried.append(probe(contestant, replace(work, max_length=length), folder, options))
            return bool(tried[-1]["fits"])

        if options.lengths:
            longest[contestant.name] = max((each for each in options.lengths if fits(each)), default=0)
        else:
            longest[contestant.name] = search(fits, min(FIRST, limit), limit)
    lines = [["", "longest context", "tokens/s there"]]
    for name, length in longest.items():
        speed = next((f"{each['tokens_per_second']:,.0f}" for each in probes[name] if each["length"] == length), "")
        lines.append([name, f"{length:,}{' or more' if length == limit else ''}", speed])
    print(table.markdown(lines))
    print("published, on 80 GB: " + ", ".join(f"{name} {length:,}" for name, length in PUBLISHED.items()))
    return {
        "shape": options.shape,
        "r": work.r,
        "limit": limit,
        "longest": longest,
        "published": PUBLISHED,
        "probes": probes,
        "skipped": skipped,
        "faults": [],
    }


def long_work(options: Options, rows: dict[str, Any]) -> Work:
    """The work on rows longer than any length tried. ``benchmark`` sets each length as ``max_length``: rows are cut."""
    return Work(
        model=rows["model"],
        train=rows["train"],
        heldout="",
        rows=ROWS,
        tokens=0,
        supervised_tokens=0,
        targets=SHAPES[options.shape].targets,
        batch_size=1,
        packed_batch_size=1,
        max_length=0,
        r=QUICK_R if options.quick else R,
        lora_alpha=R,
        learning_rate=2e-4,
        warmup_steps=1,
        precision="default" if options.gpu else "float32",
        nf4=SHAPES[options.shape].nf4,
    )


def probe(contestant: Contestant, work: Work, folder: Path, options: Options) -> dict[str, Any]:
    """Run two steps of one row of ``work.max_length`` tokens. Return whether they fit, and their speed and memory.

    Raises SystemExit when they fail for another reason than memory, or with other numbers of steps or tokens.
    """
    place = fresh_folder(folder / contestant.name)
    result = start(contestant, work, place, environment(options.threads, place / "caches", options.gpu), options.gpu)
    found: dict[str, Any] = {"length": work.max_length, "fits": result.exit_code == 0, "seconds": result.seconds}
    if found["fits"]:
        report = read(contestant, work, place, result)
        if (report.steps, report.tokens) != (ROWS, ROWS * work.max_length):
            raise SystemExit(
                f"{contestant.name}: {report.tokens:,} tokens in {report.steps} steps at {work.max_length:,}"
            )
        found |= {"tokens_per_second": report.tokens_per_second, "device_bytes": result.device_bytes}
    else:
        log = (place / "log").read_text(encoding="utf-8", errors="replace")
        killed = result.exit_code == -signal.SIGKILL  # out of host memory
        if not killed and not any(word in log for word in OUT_OF_MEMORY):
            raise SystemExit(f"{contestant.name} failed at {work.max_length:,} tokens:\n{tail(place / 'log')}")
    shutil.rmtree(place)
    outcome = f"fits, {found['device_bytes'] / 1e9:.1f} GB" if found["fits"] else "does not fit"
    print(f"{contestant.name:<24} {work.max_length:>9,} {outcome}", flush=True)
    return found


def search(fits: Callable[[int], bool], first: int, limit: int) -> int:
    """The longest length up to ``limit`` that fits, too short by at most GRAIN of it or MULTIPLE. Double from ``first``
    until a length does not fit, then bisect. Return 0 when no multiple of MULTIPLE fits."""
    good, bad, length = 0, limit + MULTIPLE, first
    while good < limit and bad > limit:
        if fits(length):
            good, length = length, min(2 * length, limit)
        else:
            bad = length
    while bad <= limit and bad - good > max(MULTIPLE, GRAIN * good):
        middle = (good + bad) // 2 // MULTIPLE * MULTIPLE
        if middle <= good:
            break
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good
