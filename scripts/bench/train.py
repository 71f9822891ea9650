"""Measure training: each round runs every contestant on the same work in a fresh process, one after another."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import table
from bench.contestants import CPU, OURS, Contestant, choose, on_gpu, read, start
from bench.jobs import prepare_rows, run_job, run_module
from bench.options import Options
from bench.processes import environment, tail
from bench.same_work import count_faults, loss_faults, tensors
from bench.shapes import SHAPES
from bench.work import Report, Work, write_job

BASE = "base"  # the name of the model without an adapter in ``heldout``
WARMUP_STEPS = 3
HELDOUT_ROWS = 32
SIZES = {  # rows per step, max_length, r, lora_alpha, learning rate
    "tiny": (8, 128, 4, 8, 1e-2),
    "tiny-nf4": (8, 128, 4, 8, 1e-2),
    "gpt2": (8, 512, 8, 16, 2e-3),
    "llama": (8, 512, 8, 16, 2e-3),
    "llama-8b": (16, 2048, 16, 32, 2e-4),
    "llama-8b-2-layers": (8, 512, 16, 32, 2e-4),
}


def benchmark(options: Options, folder: Path) -> dict[str, Any]:
    """Run all rounds, compute held-out losses, check the work, print the table. Return the record for the JSON file."""
    env = environment(options.threads, folder / "caches", options.gpu)
    size, max_length, *_ = SIZES[options.shape]
    rows = prepare_rows(options.shape, folder, env, max_length, options.steps * size, HELDOUT_ROWS)
    ceiling = measure_ceiling(options, rows, folder, env)
    work = make_work(options, rows, ceiling["bf16_units"])
    contestants, skipped = choose(on_gpu() if options.gpu else CPU, options.only, work, ceiling["bf16_units"])
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}")
    rounds: list[Round] = []
    failed: dict[str, str] = {}
    for number in range(options.rounds):
        rounds.append(one_round(number, contestants, work, folder / f"round{number}", options, failed))
        contestants = [each for each in contestants if each.name not in failed]
        if not options.gpu:  # on a CPU, other work may have lowered the first one; a GPU is not shared
            ceiling = higher_ceiling(ceiling, measure_ceiling(options, rows, folder, env))
    rounds = [{each: round_[each] for each in contestants} for round_ in rounds]
    losses = heldout_losses(work, rounds, folder, env)
    faults = work_faults(work, rounds, losses)
    runs = {
        each.name: [
            {**figures, "heldout_loss": losses[f"{each.name}-{number}"]}
            for number, (_, figures) in enumerate(round_[each] for round_ in rounds)
        ]
        for each in contestants
    }
    summaries = {name: table.summary(each) for name, each in runs.items()}
    own = summaries[OURS]["tokens_per_second"]["median"]
    reached = {name: own / each["tokens_per_second"] for name, each in ceiling["ceilings"].items()}
    print(
        f"\n{options.shape}, {rows['source']}, {work.rows} rows, {work.tokens:,} tokens, base loss {losses[BASE]:.4f}\n"
    )
    print(table.show(summaries, OURS))
    for name, share in reached.items():
        flop = f"{ceiling['flop_per_token']:,} FLOP (4N) a token"
        print(f"\n{OURS} reaches {share:.0%} of what {name} matmuls allow at {flop}")
    print("\nthe same work was done by all" if not faults else "\nNOT the same work:\n  " + "\n  ".join(faults))
    return {
        "shape": {"name": options.shape, **asdict(SHAPES[options.shape])},
        "data": rows["source"],
        "work": {key: value for key, value in asdict(work).items() if key not in ("model", "train", "heldout")},
        "ceiling": ceiling | {"reached": reached},
        "base_heldout_loss": losses[BASE],
        "rounds": options.rounds,
        "summary": summaries,
        "ratios": table.ratios(summaries, OURS),
        "runs": runs,
        "settings": {each.name: rounds[0][each][0].settings for each in contestants},
        "skipped": skipped,
        "failed": failed,
        "faults": faults,
    }


def measure_ceiling(options: Options, rows: dict[str, Any], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Measure the speed that the chip's matmuls allow on a step's tokens."""
    arguments = {"model": rows["model"], "folder": str(folder), "tokens": rows["tokens"] // options.steps}
    return run_job("machine", arguments, folder, env, "ceiling.json")


def higher_ceiling(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measured ceilings for each dtype: disturbances only lower a measurement."""
    pairs = ((name, one["ceilings"][name], other["ceilings"][name]) for name in one["ceilings"])
    return one | {"ceilings": {name: max(a, b, key=lambda each: each["tflops"]) for name, a, b in pairs}}


def make_work(options: Options, rows: dict[str, Any], has_bf16: bool) -> Work:
    """The work that every contestant is given."""
    batch_size, max_length, r, lora_alpha, learning_rate = SIZES[options.shape]
    if options.dtype == "auto" and not has_bf16:
        print("this chip has no units for bfloat16: float32 for everyone")
    return Work(
        model=rows["model"],
        train=rows["train"],
        heldout=rows["heldout"],
        rows=rows["rows"],
        tokens=rows["tokens"],
        supervised_tokens=rows["supervised_tokens"],
        targets=SHAPES[options.shape].targets,
        batch_size=batch_size,
        packed_batch_size=max(1, round(rows["tokens"] / options.steps / max_length)),
        max_length=max_length,
        r=r,
        lora_alpha=lora_alpha,
        learning_rate=learning_rate,
        warmup_steps=min(WARMUP_STEPS, options.steps - 1),
        precision="default" if options.dtype == "auto" and has_bf16 else "float32",
        nf4=SHAPES[options.shape].nf4,
    )


Round = dict[Contestant, tuple[Report, dict[str, float]]]


def one_round(
    number: int, contestants: list[Contestant], work: Work, folder: Path, options: Options, failed: dict[str, str]
) -> Round:
    """Run each contestant once, starting with a different one each round. Add those that fail to ``failed``.

    Raises SystemExit when lora itself fails.
    """
    turn = number % len(contestants)
    done: Round = {}
    for contestant in contestants[turn:] + contestants[:turn]:
        place = folder / contestant.name
        place.mkdir(parents=True)
        result = start(
            contestant, work, place, environment(options.threads, place / "caches", options.gpu), options.gpu
        )
        if result.exit_code:
            failed[contestant.name] = tail(place / "log")
            print(f"{contestant.name} failed:\n{failed[contestant.name]}", flush=True)
            if contestant.name == OURS:
                raise SystemExit(1)
            continue
        report = read(contestant, work, place, result)
        figures = {
            "tokens_per_second": report.tokens_per_second,
            "peak_bytes": result.peak_bytes,
            "device_bytes": result.device_bytes,
            "first_step_seconds": report.first_step_at - result.began,
            "seconds": result.seconds,
            "steps": report.steps,
        }
        megabytes, first = (result.device_bytes or result.peak_bytes) / 1e6, figures["first_step_seconds"]
        speed = f"{report.tokens_per_second:8,.0f} tokens/s  {megabytes:8,.0f} MB  first step {first:5.1f} s"
        print(f"round {number + 1}  {contestant.name:<22} {speed}", flush=True)
        done[contestant] = report, figures
    return done


def heldout_losses(work: Work, rounds: list[Round], folder: Path, env: dict[str, str]) -> dict[str, float]:
    """The held-out loss of the base and of every adapter, all computed by ``heldout``."""
    adapters = {
        f"{each.name}-{n}": report.adapter for n, round_ in enumerate(rounds) for each, (report, _) in round_.items()
    }
    return run_module("heldout", write_job(work, folder, adapters), env, folder / "losses.json")


def work_faults(work: Work, rounds: list[Round], losses: dict[str, float]) -> list[str]:
    """All ways in which a contestant's work differs too much from ``work`` or from that of the others."""
    expected = tensors(Path(next(iter(rounds[0].values()))[0].adapter))
    faults = []
    for number, round_ in enumerate(rounds):
        for each, (report, _) in round_.items():
            found = count_faults(each, report, tensors(Path(report.adapter)), work, expected)
            faults += [f"round {number + 1}, {each.name}: {fault}" for fault in found]
        reports = {each: report for each, (report, _) in round_.items()}
        falls = {each.name: losses[BASE] - losses[f"{each.name}-{number}"] for each in round_}
        faults += [f"round {number + 1}, {fault}" for fault in loss_faults(reports, falls, losses[BASE], work)]
    return faults
