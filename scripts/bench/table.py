"""Medians, spread and ratios, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

FIGURES = ("tokens_per_second", "peak_bytes", "device_bytes", "first_step_seconds", "heldout_loss", "steps")


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The median, minimum and maximum of each figure over a contestant's runs."""
    columns = {name: [run[name] for run in runs] for name in FIGURES}
    return {
        name: {"median": median(values), "least": min(values), "most": max(values)} for name, values in columns.items()
    }


def ratios(summaries: Mapping[str, dict[str, dict[str, float]]], ours: str) -> dict[str, dict[str, float]]:
    """Our median over each contestant's. Above 1 means more tokens per second, more memory, or a later first step."""
    own = summaries[ours]
    return {
        name: {
            figure: own[figure]["median"] / other[figure]["median"]
            for figure in ("tokens_per_second", "peak_bytes", "device_bytes", "first_step_seconds")
            if other[figure]["median"]
        }
        for name, other in summaries.items()
        if name != ours
    }


def show(summaries: Mapping[str, dict[str, dict[str, float]]], ours: str) -> str:
    """The table in Markdown. Its ratios are ``ours`` over each contestant, for speed and for memory."""
    compared = ratios(summaries, ours)
    gpu = any(each["device_bytes"]["median"] for each in summaries.values())
    memory = "device_bytes" if gpu else "peak_bytes"
    heads = ["", "tokens/s", "least-most", f"{ours} is", "peak MB", f"{ours} takes", "first step s"]
    rows = [[*heads, "held-out loss", "steps"]]
    for name, each in summaries.items():
        speed, first = each["tokens_per_second"], each["first_step_seconds"]
        other = compared.get(name)
        rows.append(
            [
                name,
                f"{speed['median']:,.0f}",
                f"{speed['least']:,.0f}-{speed['most']:,.0f}",
                f"{other['tokens_per_second']:.2f}x" if other else "",
                f"{each[memory]['median'] / 1e6:,.0f}",
                f"{other[memory]:.2f}x" if other else "",
                f"{first['median']:.1f}",
                f"{each['heldout_loss']['median']:.4f}",
                f"{each['steps']['median']:.0f}",
            ]
        )
    return markdown(rows)


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as a Markdown table. The first row is the header; all columns except the first are right-aligned."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    rule = ["-" * max(widths[0], 1), *(f"{'-' * max(width - 1, 1)}:" for width in widths[1:])]
    lines = [
        " | ".join(
            f"{cell!s:<{width}}" if not at else f"{cell!s:>{width}}"
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (rows[0], rule, *rows[1:])
    ]
    return "\n".join(f"| {line} |" for line in lines)
