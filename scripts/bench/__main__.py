"""Compare lora with other tools on the same work.

Every figure is from a fresh process. Rounds are interleaved, so that a busy machine affects all tools alike. Results
are also written as JSON to scripts/bench/results, with the chip and the package versions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import context, flat, lengths, machine, scale, startup, stream, train, weights
from bench.jobs import BENCH_FOLDER
from bench.options import Options
from bench.shapes import SHAPES

RESULTS = Path(__file__).resolve().parent / "results"
BENCHMARKS = {
    "train": train.benchmark,
    "context": context.benchmark,
    "startup": startup.benchmark,
    "scale": scale.benchmark,
    "lengths": lengths.benchmark,
    "merge": weights.merge,
    "quantize": weights.quantize,
    "flat": flat.benchmark,
    "stream": stream.benchmark,
}
SHAPE_FOR = {"merge": "llama-500m", "quantize": "llama-500m", "flat": "llama-40m", "stream": "llama-8b"}


def parse(arguments: list[str]) -> tuple[list[str], Options]:
    """The requested benchmarks and their options."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", nargs="?", choices=BENCHMARKS, help="train; with --gpu train and context")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        help="the model (llama; merge, quantize llama-500m; flat llama-40m; stream, --gpu llama-8b; with --quick tiny)",
    )
    parser.add_argument("--rounds", type=int, help="runs of each contestant (5; with --quick 1)")
    parser.add_argument("--steps", type=int, help="optimizer steps a run (24; with --quick 4)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for everyone (all cores)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32"),
        default="auto",
        help="auto: each library's default where the chip has bfloat16 units; float32: float32 for everyone",
    )
    parser.add_argument("--gpu", action="store_true", help="on CUDA: an 8B shape in NF4")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps: tries the bench, measures nothing"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these contestants besides lora (all)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="context: try these lengths, in place of a search",
    )
    parser.add_argument(
        "--out", type=Path, help="folder that the JSON goes to (scripts/bench/results; with --quick none)"
    )
    parsed = vars(parser.parse_args(arguments))
    quick, gpu = parsed["quick"], parsed["gpu"]
    shape = "llama-8b" if gpu else SHAPE_FOR.get(parsed["benchmark"], "llama")
    parsed["shape"] = parsed["shape"] or (("tiny-nf4" if gpu else "tiny") if quick else shape)
    parsed["rounds"] = parsed["rounds"] or (1 if quick else 5)
    parsed["steps"] = parsed["steps"] or (4 if quick else 24)
    asked = parsed.pop("benchmark")
    names = [asked] if asked else ["train", "context"] if gpu else ["train"]
    return names, Options(**parsed | {name: tuple(parsed[name]) for name in ("only", "lengths")})


def main(arguments: list[str]) -> int:
    """Return 0 when all was measured, 1 when contestants failed or did not do the same work."""
    names, options = parse(arguments)
    records = {name: run_benchmark(name, options) for name in names}
    folder = options.out or (None if options.quick else RESULTS)
    for name, record in records.items():
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}-{options.shape}.json"
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            print(f"\nwritten: {path}")
    return 1 if any(record["faults"] or record.get("failed") for record in records.values()) else 0


def run_benchmark(name: str, options: Options) -> dict[str, Any]:
    """Run a benchmark in a temporary folder. Return its record with the machine and the package versions."""
    BENCH_FOLDER.mkdir(exist_ok=True)
    before = machine.describe(options.threads)
    with tempfile.TemporaryDirectory(dir=BENCH_FOLDER) as folder:
        found = BENCHMARKS[name](options, Path(folder))
    description = before | {"load_after": machine.describe(options.threads)["load"]}
    description["gpu"] = machine.gpu_name() if options.gpu else None
    return {"benchmark": name, "machine": description, "versions": machine.versions(), **found}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
