"""``lora adapters list|show|compose|resize|diff|extract``: list and show adapters, and make new ones from others"""

from __future__ import annotations

import dataclasses
import json as jsonlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_cli.cli.adapter_text import entry_row, facts, layer_rows, table_lines
from lora_cli.cli.options import Command, Debug, Json, Quiet
from lora_cli.errors import UserError, format_range, pluralize, printable

if TYPE_CHECKING:
    from lora_cli.weights.algebra.lora_adapter import LoraAdapter

app = typer.Typer(help="List, show and make adapters.", no_args_is_help=True)
Adapter = Annotated[Path, typer.Argument(help="A run or an adapter folder.", show_default=False)]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Rank of each layer.")]
Energy = Annotated[
    float | None,
    typer.Option("--energy", help="Instead of --rank: the share of each update's squared norm to keep, e.g. 0.99."),
]
Out = Annotated[Path, typer.Option("--out", help="The folder to write; must not exist.", show_default=False)]


@app.command("list", cls=Command)
def list_command(
    folder: Annotated[Path, typer.Argument(help="A folder with adapters in it, at any depth.")] = Path("runs"),
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> str:
    """List adapters with their kind, base and data."""
    from lora_cli.weights.adapter.catalogue import find_adapters

    entries, faults = find_adapters(folder)
    for fault in faults:
        typer.echo(f"warning: {fault}", err=True)
    if json:
        messages = [str(fault) for fault in faults]
        return jsonlib.dumps({"adapters": [dataclasses.asdict(entry) for entry in entries], "warnings": messages})
    if not entries:
        return f"no adapters in {folder}"
    header = ["adapter", "kind", "r", "MB", "base", "data", "loss", "best loss", "date", "layers"]
    return "\n".join(table_lines(header, map(entry_row, entries)))


@app.command("show", cls=Command)
def show_command(adapter: Adapter, json: Json = False, quiet: Quiet = False, debug: Debug = False) -> str:
    """Show an adapter: its layers, base, data and origin."""
    from lora_cli.weights.adapter.adapter_config import read_adapter_config
    from lora_cli.weights.adapter.catalogue import base_state, describe, lora_layers
    from lora_cli.weights.adapter.origin import adapter_folder
    from lora_cli.weights.adapter.provenance import read_record

    folder = adapter_folder(adapter) or adapter
    config, entry, layers = read_adapter_config(folder), describe(folder), lora_layers(folder)
    result = dataclasses.asdict(entry) | {
        "base_state": base_state(folder),
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "config": config,
        "provenance": read_record(folder),
    }
    if json:
        return jsonlib.dumps(result)
    known = facts(result)
    width = 1 + max(map(len, known))
    lines = [f"{name + ':':{width}} {value}" for name, value in known.items()]
    if layers:
        lines += table_lines(["layers", "number", "in -> out", "r"], layer_rows(layers))
    return "\n".join(lines)


@app.command("compose", cls=Command)
def compose_command(
    parts: Annotated[
        list[str], typer.Argument(help="Two or more, each as FOLDER=WEIGHT.", metavar="ADAPTER=WEIGHT...")
    ],
    out: Out,
    method: Annotated[
        Literal[
            "cat",
            "svd",
            "linear",
            "ties",
            "dare_ties",
            "dare_linear",
            "magnitude_prune",
            "ties_svd",
            "dare_ties_svd",
            "dare_linear_svd",
            "magnitude_prune_svd",
        ],
        typer.Option(
            "--method",
            help="cat: the exact weighted sum, whose rank is the sum of the ranks. svd: its best approximation of "
            "--rank. Others: as in PEFT's add_weighted_adapter.",
        ),
    ] = "cat",
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="For svd methods: rank of the result; default: the largest.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="For ties, dare, magnitude_prune: share of values to keep.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="For dare: random seed; default: 42.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> str:
    """Make one adapter of several, each with a weight."""
    from lora_cli.system.folders import check_out

    weighted = [_weighted(part) for part in parts]
    if len(weighted) < 2:
        raise UserError("only one adapter is given", parts[0], "give two or more")
    check_out(out, *(folder for folder, _ in weighted))
    adapters = [_read(folder) for folder, _ in weighted]

    from lora_cli.weights.algebra.compose import Composition, check_composition, compose

    how = Composition(tuple(weight for _, weight in weighted), method, rank, density, seed)
    check_composition(how, adapters)
    result = compose(adapters, how, out)
    ranks = format_range(result.ranks)
    text = f"{out}: {pluralize(result.layers, 'layer')} of rank {ranks} by {method}, {result.bytes / 1e6:,.1f} MB"
    return jsonlib.dumps(dataclasses.asdict(result), default=str) if json else text


@app.command("resize", cls=Command)
def resize_command(
    adapter: Adapter,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> str:
    """Change an adapter's rank: lower it, or raise it to train further."""
    from lora_cli.system.folders import check_out

    _check_size(rank, energy)
    check_out(out, adapter)
    read = _read(adapter)

    from lora_cli.weights.algebra.resize import resize

    result = resize(read, rank, energy, out)
    if json:
        return jsonlib.dumps(dataclasses.asdict(result), default=str)
    rows = [[each.name, f"{each.before} -> {each.after}", f"{each.energy:.2%}"] for each in result.layers]
    lines = [] if quiet else table_lines(["layer", "r", "energy kept"], rows)
    ranks = [format_range(tuple(getattr(each, key) for each in result.layers)) for key in ("before", "after")]
    layers = pluralize(len(result.layers), "layer")
    return "\n".join([*lines, f"{out}: {layers}, rank {ranks[0]} -> {ranks[1]}, {result.bytes / 1e6:,.1f} MB"])


@app.command("diff", cls=Command)
def diff_command(
    first: Adapter, second: Adapter, json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> str:
    """Compare two adapters layer by layer: cosine, overlap."""
    adapters = [_read(first), _read(second)]

    from lora_cli.weights.algebra.diff import diff

    result = diff(*adapters)
    if json:
        return jsonlib.dumps(dataclasses.asdict(result))
    rows = [[each.name, *map(_share, (each.cosine, each.overlap_out, each.overlap_in))] for each in result.layers]
    rows.append(["all layers", _share(result.cosine), "", ""])
    lines = table_lines(["layer", "cosine", "overlap out", "overlap in"], rows)
    for folder, names in ((first, result.only_first), (second, result.only_second)):
        if names:
            subject = pluralize(len(names), "layer is", "layers are")
            lines.append(f"{subject} in {folder} only: {', '.join(names[:3])}{' ...' * (len(names) > 3)}")
    return "\n".join(lines)


@app.command("extract", cls=Command)
def extract_command(
    base: Annotated[str, typer.Argument(help="The base model: a folder or hub id.", show_default=False)],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model: a folder or hub id.", show_default=False)],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> str:
    """Make the adapter nearest to the difference of two models."""
    from lora_cli.model.files import check_model_type, locate, stored_quantization
    from lora_cli.system.folders import check_out
    from lora_cli.weights.files.shards import check_complete

    _check_size(rank, energy)
    check_out(out)
    folders = [locate(name, weights=True) for name in (base, tuned)]
    for folder in folders:
        check_out(out, folder)
        check_model_type(folder)
        check_complete(folder)
        if stored := stored_quantization(folder):
            what = f"the model is stored quantized ({stored}), and only unquantized weights can be compared"
            raise UserError(what, str(folder), "give the unquantized model")

    from lora_cli.display import Display
    from lora_cli.weights.algebra.extract import extract

    with Display(quiet).waiting("extracting"):
        result = extract(folders[0], base, folders[1], rank, energy, out)
    if json:
        return jsonlib.dumps(dataclasses.asdict(result), default=str)
    if result.left_out:
        subject = pluralize(len(result.left_out), "other tensor differs", "other tensors differ")
        what = f"{subject} and cannot go into the adapter"
        names = f"{', '.join(result.left_out[:5])}{' ...' * (len(result.left_out) > 5)}"
        typer.echo(f"warning: {printable(f'{what}: {names}')}", err=True)
    ranks = format_range(tuple(each.rank for each in result.layers))
    rows = [[each.name, str(each.rank), f"{each.energy:.2%}"] for each in result.layers]
    lines = [] if quiet else table_lines(["layer", "r", "energy kept"], rows)
    total = f"{out}: {pluralize(len(result.layers), 'layer')} of rank {ranks}, {result.bytes / 1e6:,.1f} MB"
    return "\n".join([*lines, total])


def _check_size(rank: int | None, energy: float | None) -> None:
    """Raises UserError unless exactly one of the two is given, and an energy is above 0 and at most 1."""
    if (rank is None) == (energy is None):
        raise UserError("give either --rank or --energy", hint="e.g. --rank 8, or --energy 0.99")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"--energy {energy:g} is out of range", hint="give a number above 0 and up to 1, e.g. 0.99")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _weighted(part: str) -> tuple[Path, float]:
    """Split FOLDER=WEIGHT. Raises UserError when the folder is missing or the weight is not a finite number."""
    folder, _, number = part.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not folder or not math.isfinite(weight):
        raise UserError(f"{part!r} is not an adapter with a weight", hint="write FOLDER=WEIGHT, e.g. runs/a=0.5")
    return Path(folder), weight


def _read(adapter: Path) -> LoraAdapter:
    from lora_cli.weights.adapter.adapter_config import read_adapter_config
    from lora_cli.weights.adapter.origin import adapter_folder

    folder = adapter_folder(adapter) or adapter
    read_adapter_config(folder)

    from lora_cli.weights.algebra.lora_adapter import read_lora

    return read_lora(folder)
