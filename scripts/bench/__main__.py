"""Measure lora beside other tools on the same work.

Every figure is from a fresh process; rounds are interleaved, so that a busy machine is busy for all. What is printed is
kept as JSON under scripts/bench/results, with the chip and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from bench import startup, train
from bench.options import Options
from bench.shapes import SHAPES

RESULTS = Path(__file__).resolve().parent / "results"
BENCHMARKS = {"train": train.benchmark, "startup": startup.benchmark}


def parse(arguments: list[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog="scripts/bench/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", nargs="?", default="train", choices=BENCHMARKS)
    parser.add_argument("--shape", choices=SHAPES, help="the model (llama; with --gpu llama-8b, with --quick tiny)")
    parser.add_argument("--rounds", type=int, help="runs of each contestant (5; with --quick 1)")
    parser.add_argument("--steps", type=int, help="optimizer steps a run (24; with --quick 4)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for everyone (all cores)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32"),
        default="auto",
        help="auto: each library's default where the chip has bfloat16 units; float32: float32 for everyone",
    )
    parser.add_argument("--gpu", action="store_true", help="on CUDA: an 8B shape in NF4, and with context, its search")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps: tries the bench, measures nothing"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these contestants beside lora (all)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (scripts/bench/results; with --quick nowhere)")
    told = vars(parser.parse_args(arguments))
    quick, gpu = told["quick"], told["gpu"]
    told["shape"] = told["shape"] or ("tiny" if quick else "llama-8b" if gpu else "llama")
    told["rounds"] = told["rounds"] or (1 if quick else 5)
    told["steps"] = told["steps"] or (4 if quick else 24)
    return Options(**told | {"only": tuple(told["only"])})


def main(arguments: list[str]) -> int:
    """0 when it was measured; 1 when contestants did not do the same work, or what is asked for is not reached."""
    options = parse(arguments)
    record = BENCHMARKS[options.benchmark](options)
    out = options.out or (None if options.quick else RESULTS / f"{options.benchmark}-{options.shape}.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten: {out}")
    return 1 if record["faults"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
