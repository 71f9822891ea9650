"""Check that all contestants did the same work: equal counts, and losses as close as row order and precision allow."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from bench.contestants import Contestant
from bench.work import Report, Work

STEPS_OF_PACKED = 0.25  # largest relative difference in the number of steps with packing
FIRST_LOSS = 0.02  # largest relative difference of the first loss from the base's held-out loss: weights are random
STEP_LOSS = {"float32": 1e-3, "default": 2e-2}  # largest relative difference of a step's loss, rows in the same order
LEARNED = 0.5  # largest relative difference of the fall in held-out loss from the median: packing changes the steps
LEARNED_IN_ORDER = {"float32": 0.01, "default": 0.1}  # the same, rows in the same order

Shapes = dict[str, tuple[int, ...]]


def tensors(adapter: Path) -> Shapes:
    """Names and shapes of an adapter's tensors, read from the file's header."""
    with (adapter / "adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: tuple(value["shape"]) for name, value in header.items() if name != "__metadata__"}


def count_faults(contestant: Contestant, report: Report, shapes: Shapes, work: Work, expected: Shapes) -> list[str]:
    """Where a run's counts differ from ``work``, or its adapter's ``shapes`` from ``expected``."""
    faults = [
        f"{name} {got:,}, not {wanted:,}"
        for name, got, wanted in (
            ("rows", report.rows, work.rows),
            ("tokens", report.tokens, work.tokens),
            ("supervised tokens", report.supervised_tokens, work.supervised_tokens),
            ("trainable parameters", report.trainable_parameters, sum(map(math.prod, expected.values()))),
        )
        if got != wanted
    ]
    if shapes != expected:
        faults.append(f"its adapter's tensors are others ({len(shapes)}, not {len(expected)})")
    slack = STEPS_OF_PACKED * work.steps if contestant.packs else 0
    if abs(report.steps - work.steps) > slack:
        faults.append(f"{report.steps} steps, not {work.steps}")
    return faults


def loss_faults(reports: Mapping[Contestant, Report], falls: Mapping[str, float], base: float, work: Work) -> list[str]:
    """Losses of one round that differ too much. ``falls`` is how far each adapter lowers the ``base`` held-out loss."""
    faults = []
    model = next((each for each in reports if each.in_order), None)
    middle = median(falls.values())
    for each, report in reports.items():
        fall = falls[each.name]
        if abs(report.losses[0] - base) > FIRST_LOSS * base:
            faults.append(f"{each.name}: first loss {report.losses[0]:.3f}, the base's is {base:.3f}")
        if abs(fall - middle) > LEARNED * abs(middle):
            faults.append(f"{each.name}: held-out loss fell by {fall:.4f}, the median is {middle:.4f}")
        if model is None or not each.in_order:
            continue
        apart = max(abs(a - b) / b for a, b in zip(report.losses, reports[model].losses, strict=False))
        if apart > STEP_LOSS[work.precision]:
            faults.append(f"{each.name}: a step's loss is {apart:.1e} from {model.name}'s")
        if abs(fall - falls[model.name]) > LEARNED_IN_ORDER[work.precision] * abs(falls[model.name]):
            faults.append(f"{each.name}: held-out loss fell by {fall:.4f}, {model.name}'s by {falls[model.name]:.4f}")
    return faults
