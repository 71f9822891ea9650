"""``lora quantize MODEL --out DIR --method nf4|fp4|int8``"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_cli.cli.options import Debug, Json, MaxShardSize, Quiet
from lora_cli.errors import UserError

WORST = 5


def command(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist.", show_default=False)],
    method: Annotated[Literal["nf4", "fp4", "int8"], typer.Option("--method", help="The type to store.")] = "nf4",
    double_quant: Annotated[
        bool, typer.Option("--double-quant/--no-double-quant", help="4 bits: quantize the blocks' scales as well.")
    ] = True,
    max_shard_size: MaxShardSize = "50GB",
    data: Annotated[str | None, typer.Option("--data", help="Rows to measure perplexity on, before and after.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Store a model's linear layers in 4 or 8 bits."""
    from lora_cli.cli import measure
    from lora_cli.model.files import check_model_type, check_quantizable, locate
    from lora_cli.recipe.schema import Quantization
    from lora_cli.weights.shards import bytes_of, check_out, check_whole

    if any((Path(model) / part / "adapter_config.json").is_file() for part in ("", "adapter")):
        raise UserError("this is an adapter, not a model", model, "lora merge makes a model of it first")
    max_shard = bytes_of(max_shard_size)
    check_out(out)
    check_model_type(locate(model))
    check_quantizable(locate(model))
    folder = locate(model, weights=True)
    check_out(out, folder)
    check_whole(folder)
    rows = None
    if data is not None:
        from lora_cli.weights.provenance import recipe_of

        section = measure.data_section(data, recipe_of(folder))
        measure.check(section)
        rows = measure.rows_for(folder, None, section, None)

    from lora_cli.weights.quantize import quantize

    result = quantize(folder, out, Quantization(method=method, double_quant=double_quant), max_shard)
    report: dict[str, Any] = {
        "out": str(out),
        "method": method,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "layers": {layer.name: layer.relative for layer in result.layers},
    }
    if rows is not None:
        for key, place in (("before", folder), ("after", out)):
            score = measure.measure(place, None, rows, None).score
            report[key] = {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}
    typer.echo(jsonlib.dumps(report) if json else _text(report))


def _text(report: dict[str, Any]) -> str:
    before, after = report["bytes_before"], report["bytes_after"]
    layers = report["layers"]
    mean = sum(layers.values()) / len(layers)
    lines = [
        f"{report['out']}: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.0%}), {report['method']}",
        f"relative error of {len(layers)} layers: mean {mean:.4f}; the largest:",
        *(f"  {error:.4f}  {name}" for name, error in list(layers.items())[:WORST]),
    ]
    if "before" in report:
        old, new = report["before"]["perplexity"], report["after"]["perplexity"]
        lines.append(f"perplexity {old:.3f} -> {new:.3f} on {report['before']['tokens']:,} tokens")
    return "\n".join(lines)
