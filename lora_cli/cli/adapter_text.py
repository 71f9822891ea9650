"""Text about adapters: a table row for each, the facts about one, and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_cli.errors import format_range, printable

if TYPE_CHECKING:
    from lora_cli.weights.adapter.catalogue import AdaptedLayer, Entry


def entry_row(entry: Entry) -> list[str]:
    """Return an adapter's row in the table of ``lora adapters list``."""
    return [
        entry.path,
        entry.kind,
        format_range(entry.ranks),
        f"{entry.bytes / 1e6:,.1f}",
        Path(entry.base).name if entry.base else "",
        entry.data or "",
        *("" if loss is None else f"{loss:.4f}" for loss in (entry.validation_loss, entry.best_loss)),
        entry.date[:10],
        " ".join((*entry.targets, *entry.whole)),
    ]


def facts(result: dict[str, Any]) -> dict[str, str]:
    """Return the known facts about an adapter, from label to text, in the order of printing."""
    from lora_cli.weights.adapter.catalogue import nested_value

    config, record = result["config"], result["provenance"]
    scores = {name: nested_value(record, "result", name, "loss") for name in ("validation", "base", "start", "best")}
    losses = [f"{name} {loss:.4f}" for name, loss in scores.items() if isinstance(loss, float)]
    versions = nested_value(record, "versions")
    pattern = " in part" if config.get("alpha_pattern") else ""
    known = {
        "adapter": result["path"],
        "kind": result["kind"],
        "alpha": f"{config['lora_alpha']:g}{pattern}" if isinstance(config.get("lora_alpha"), int | float) else None,
        "besides LoRA": ", ".join(result["whole"]),
        "size": f"{result['parameters']:,} parameters, {result['bytes'] / 1e6:,.1f} MB",
        "base": f"{result['base']} ({result['base_state']})" if result["base"] else None,
        "base fingerprint": nested_value(record, "base", "fingerprint"),
        "began with": nested_value(record, "init_from", "name_or_path"),
        "data": result["data"],
        "data fingerprint": nested_value(record, "data", "fingerprint"),
        "validation loss": ", ".join(losses),
        "best step": nested_value(record, "result", "best", "step"),
        "made": result["date"],
        "made of": _origin(nested_value(record, "made")),
        "with": ", ".join(f"{name} {number}" for name, number in versions.items()) if versions else None,
    }
    return {name: printable(str(value)) for name, value in known.items() if value not in (None, "")}


def _origin(made: Any) -> str | None:
    if not isinstance(made, dict):
        return None
    parts = [str(part.get("name_or_path")) for part in made.get("of", []) if isinstance(part, dict)]
    return f"{made.get('by')} of {', '.join(parts)}"


def layer_rows(layers: list[AdaptedLayer]) -> list[list[str]]:
    """Return one row for all layers with the same last name, widths and rank."""
    alike = Counter(
        (layer.name.rpartition(".")[2], f"{layer.in_features} -> {layer.out_features}", str(layer.rank))
        for layer in layers
    )
    return [[name, str(number), wide, rank] for (name, wide, rank), number in alike.items()]


def table_lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table's lines, one per row, however long: lines folded to the terminal's width would be unreadable."""
    table = [header, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
