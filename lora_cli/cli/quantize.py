"""``lora quantize MODEL --out DIR --method nf4|fp4|int8``"""

from __future__ import annotations

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_cli.cli.merge import find_adapter
from lora_cli.cli.options import Base, Debug, Json, MaxShardSize, Quiet, bytes_of, check_base_option
from lora_cli.errors import UserError, pluralize, printable

if TYPE_CHECKING:
    from lora_cli.weights.adapter.origin import AdapterOrigin

WORST = 5
WHOLE = (
    "note: Transformers renames, joins or splits this model's tensors while loading, so it is quantized with the whole "
    "model in memory"
)


def command(
    target: Annotated[
        str,
        typer.Argument(
            help="A model (folder or hub id), or a run or adapter, which is merged first.",
            metavar="MODEL|RUN|ADAPTER",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist.", show_default=False)],
    method: Annotated[Literal["nf4", "fp4", "int8"], typer.Option("--method", help="The type to store.")] = "nf4",
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant/--no-double-quant", help="4 bits: quantize the scales too (default), or not."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            help="Modules not to quantize, besides the head: names or regular expressions, with commas between them, "
            "as in Transformers' llm_int8_skip_modules.",
            metavar="MODULES",
        ),
    ] = None,
    base: Base = None,
    max_shard_size: MaxShardSize = "50GB",
    data: Annotated[str | None, typer.Option("--data", help="Rows to measure perplexity on, before and after.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> str:
    """Store a model's linear layers in 4 or 8 bits."""
    from lora_cli.recipe.schema import Quantization
    from lora_cli.study import measure
    from lora_cli.system.folders import check_out
    from lora_cli.weights.adapter.provenance import recipe_of

    if double_quant is not None and method == "int8":
        raise UserError("--double-quant and --no-double-quant are for --method nf4 and fp4")
    wanted = Quantization(method=method, double_quant=double_quant is not False)
    max_shard = bytes_of(max_shard_size)
    check_out(out)
    folder, origin = _find(target, base)
    adapter = origin.folder if origin else None
    check_out(out, folder, adapter)
    rows = recipe = None
    if data is not None:
        recipe = origin.recipe if origin else recipe_of(folder)
        section = measure.data_section(data, recipe)
        measure.check_rows(section)
        rows = measure.rows_for(folder, adapter, section, recipe)

    from lora_cli.display import Display
    from lora_cli.system.memory import keep_freed_memory
    from lora_cli.weights.files.stored_model import stored_model
    from lora_cli.weights.quantize import is_streamed, quantize, quantize_merged

    keep_freed_memory()
    display = Display(quiet)
    if not quiet and not is_streamed(folder):
        display.note(WHOLE)
    skipped = _split(skip)
    with display.waiting("quantizing"):
        if origin is None:
            result = quantize(stored_model(folder), out, wanted, skipped, max_shard)
        else:
            result = quantize_merged(origin, out, wanted, skipped, max_shard, display.note)
    report: dict[str, Any] = {
        "out": str(out),
        "method": method,
        **({"adapter": str(adapter), "base": origin.base_name} if origin else {}),
        **dataclasses.asdict(result),
    }
    if rows is not None:
        before = measure.measure(folder, adapter, rows, recipe, display).score
        after = measure.measure(out, None, rows, recipe, display).score
        for key, score in (("before", before), ("after", after)):
            report[key] = {"loss": score.loss, "perplexity": score.perplexity, "tokens": score.tokens}
    return jsonlib.dumps(report) if json else _text(report)


def _find(target: str, base: str | None) -> tuple[Path, AdapterOrigin | None]:
    """Return a model's folder, or an adapter's base and the adapter. Raises UserError for what cannot be quantized."""
    from lora_cli.model.files import check_model_type, check_quantizable, locate
    from lora_cli.weights.adapter.origin import adapter_folder
    from lora_cli.weights.files.shards import check_complete

    if adapter_folder(Path(target)) is not None:
        origin = find_adapter(Path(target), base)
        return origin.base, origin
    check_model_type(locate(target))
    check_base_option(base, target)
    check_quantizable(locate(target))
    folder = locate(target, weights=True)
    check_complete(folder)
    return folder, None


def _split(skip: list[str] | None) -> list[str]:
    names = [name.strip() for each in skip or [] for name in each.split(",")]
    if not all(names):
        raise UserError("--skip: a name is empty", hint="give names, with commas between them")
    return names


def _text(report: dict[str, Any]) -> str:
    before, after = report["bytes_before"], report["bytes_after"]
    layers = report["layers"]
    lines = [f"merged {report['adapter']} into {printable(report['base'])}"] if "adapter" in report else []
    lines.append(
        f"{report['out']}: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.0%}), {report['method']}"
    )
    if layers:
        mean = sum(layers.values()) / len(layers)
        lines.append(f"relative error of {pluralize(len(layers), 'layer')}: mean {mean:.4f}; the largest:")
        lines += [f"  {error:.4f}  {name}" for name, error in list(layers.items())[:WORST]]
    if report["in_experts"]:
        lines.append(f"not quantized: {report['in_experts']:,} expert weights, which are stored joined")
    if "before" in report:
        old, new = report["before"]["perplexity"], report["after"]["perplexity"]
        lines.append(f"perplexity {old:.3f} -> {new:.3f} on {report['before']['tokens']:,} tokens")
    return "\n".join(lines)
