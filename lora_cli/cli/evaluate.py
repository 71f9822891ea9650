"""``lora eval [TARGET] [--data FILE]``"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.cli.options import Base, Debug, Json, Quiet, check_base_option


def command(
    target: Annotated[
        str | None, typer.Argument(help="A run, an adapter or a model; default: the newest finished run in runs/.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to measure on; default: the run's validation rows.")
    ] = None,
    base: Base = None,
    perplexity: Annotated[bool, typer.Option("--perplexity", help="Measure perplexity (the default).")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> str:
    """Measure the perplexity of a model, or of an adapter and its base."""
    from lora_cli.display import Display
    from lora_cli.model.files import check_model_type, locate, stored_quantization
    from lora_cli.study import measure
    from lora_cli.training.run.run_folder import newest_finished, unfinished
    from lora_cli.weights.adapter.adapter_config import REPEATABLE_ON_CODES, check_init
    from lora_cli.weights.adapter.origin import adapter_folder, find_origin
    from lora_cli.weights.adapter.provenance import read_record, recipe_of

    display = Display(quiet)
    if target is None:
        target = str(newest_finished())
        display.note(f"evaluating the newest finished run: {target}")
    adapter = adapter_folder(Path(target))
    warnings = [unfinished(Path(target), adapter)]
    if adapter is None:
        check_model_type(locate(target))
        check_base_option(base, target)
    recipe = recipe_of(adapter or Path(target))
    section = measure.data_section(data, recipe)
    measure.check_rows(section)
    if adapter is None:
        from lora_cli.weights.files.shards import check_complete

        folder = locate(target, weights=True)
        check_complete(folder)
    else:
        check_init(adapter)  # before a base is fetched
        folder = find_origin(adapter, base).base
        if stored_quantization(folder):
            check_init(adapter, REPEATABLE_ON_CODES)
    with display.waiting("checking base and rows"):
        rows = measure.rows_for(folder, adapter, section, recipe)
    if adapter is not None and recipe is None:
        display.note(f"rows are cut to {rows.max_length:,} tokens: the adapter has no record of its data.max_length")
    if data is None:
        warnings.append(measure.changed_rows_warning(rows, read_record(adapter or folder)))
    shown = [warning for warning in warnings if warning]
    for warning in shown:
        display.note(warning, warning=True)
    found = measure.measure(folder, adapter, rows, recipe, display)
    if adapter is not None and found.base is None:
        shown.append("the base is not measured: these rows have tokens that the adapter has added to the vocabulary")
        display.note(shown[-1], warning=True)
    result: dict[str, Any] = {
        "target": target,
        "data": measure.describe(section),
        "tokens": found.score.tokens,
        "loss": found.score.loss,
        "perplexity": found.score.perplexity,
    }
    if found.base is not None:
        result["base"] = {"loss": found.base.loss, "perplexity": found.base.perplexity}
    if shown:
        result["warnings"] = shown
    return jsonlib.dumps(result) if json else _table(result, "with adapter" if adapter else "model")


def _table(result: dict[str, Any], measured: str) -> str:
    rows = [(measured, result)]
    if "base" in result:
        rows.insert(0, ("base", result["base"]))
    lines = [f"{result['tokens']:,} predicted tokens of {result['data']}", f"{'':14}{'loss':>10}{'perplexity':>14}"]
    lines += [f"{name:14}{score['loss']:>10.4f}{score['perplexity']:>14.2f}" for name, score in rows]
    return "\n".join(lines)
