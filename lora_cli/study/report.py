"""Report a finished run as one HTML page: scores of base and adapter, curves, facts and recipe."""

from __future__ import annotations

import html
import io
from typing import Any

from lora_cli.display import format_skipped, format_steps
from lora_cli.errors import pluralize
from lora_cli.training.record import labelled_scores
from lora_cli.training.run.run_folder import RunFolder, write_atomic

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2733}"
    "table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{vertical-align:top;"
    "padding:.25rem .9rem .25rem 0;text-align:left;border-bottom:1px solid #dde3ea}"
    ".n{text-align:right;font-variant-numeric:tabular-nums}"
    "pre{background:#f5f7f9;padding:1rem;overflow:auto}svg{max-width:100%;height:auto}"
)


def write_report(folder: RunFolder) -> None:
    """Write report.html from run.json, metrics.jsonl and recipe.yaml."""
    info = folder.read_info()
    lines = folder.read_metrics()
    result, base = info["result"], info["base"]
    facts = [
        ("base", base["name_or_path"]),
        ("base fingerprint", base["fingerprint"][:16]),
        ("data", f"{pluralize(info['data']['rows'], 'row')}, {info['data']['supervised_tokens']:,} supervised tokens"),
        ("trained", f"{result['trainable_parameters']:,} of {result['total_parameters']:,} parameters"),
        ("steps", "; ".join(filter(None, (format_steps(result), format_skipped(result))))),
        ("adapter", f"weights of step {result['adapter_step']:,}"),
        ("peak memory", f"{result['peak_memory_bytes'] / 2**20:,.0f} MiB"),
        ("device", info["device"]),
        ("finished", info["finished"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in info["versions"].items())),
    ]
    recipe = html.escape(folder.recipe.read_text(encoding="utf-8"))
    page = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(folder.root.name)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(folder.root.name)}</h1>",
        _scores(result),
        _curves(lines),
        "<h2>The run</h2>",
        _table([[html.escape(name), html.escape(str(value))] for name, value in facts]),
        f"<h2>The recipe</h2><pre>{recipe}</pre>",
        "</body></html>",
    ]
    write_atomic(folder.report, "\n".join(page) + "\n")


def _scores(result: dict[str, Any]) -> str:
    rows = [
        [label, f"{score['loss']:.4f}", f"{score['perplexity']:.2f}", f"{score['tokens']:,}"]
        for label, score in labelled_scores(result).items()
    ]
    if not rows:
        return "<p>No validation rows were given.</p>"
    head = "".join(f"<th class=n>{name}</th>" for name in ("loss", "perplexity", "tokens"))
    return _table(rows, f"<tr><th>validation</th>{head}</tr>")


def _table(rows: list[list[str]], head: str = "") -> str:
    body = "".join(
        "<tr>" + "".join(f"<td{' class=n' if head and i else ''}>{c}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table>{head}{body}</table>"


def _curves(lines: list[dict[str, Any]]) -> str:
    """Loss and learning rate over the steps, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, rate = figure.subplots(1, 2)
    train = [line for line in lines if line["split"] == "train" and line["loss"] is not None]
    validation = [line for line in lines if line["split"] == "validation"]
    style = {"color": "#2a6f97", "marker": "o" if len(train) == 1 else ""}  # a single point draws no line
    loss.plot([line["step"] for line in train], [line["loss"] for line in train], label="train", **style)
    if validation:
        steps = [line["step"] for line in validation]
        loss.plot(steps, [line["loss"] for line in validation], "o-", label="validation", color="#d1495b", markersize=4)
    loss.set(xlabel="step", ylabel="loss", title="Loss")
    loss.legend(frameon=False)
    rate.plot([line["step"] for line in train], [line["learning_rate"] for line in train], **style)
    rate.set(xlabel="step", title="Learning rate")
    for axes in (loss, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :]
