"""``lora merge ADAPTER --out DIR``"""

from __future__ import annotations

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.options import Debug, Json, Quiet


def command(
    adapter: Annotated[Path, typer.Argument(help="A run or an adapter folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist.", show_default=False)],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fold an adapter into its base model's weights."""
    from lora_cli.training.run import unfinished
    from lora_cli.weights.check import check_mergeable
    from lora_cli.weights.provenance import adapter_folder, trace
    from lora_cli.weights.shards import check_out

    check_out(out)
    found = adapter_folder(adapter)
    warning = unfinished(adapter, found)
    if warning:
        typer.echo(f"warning: {warning}", err=True)
    origin = trace(found or adapter)
    check_out(out, origin.base, origin.folder)
    check_mergeable(origin.base)

    from lora_cli.weights.merge import merge

    result = merge(origin, out)
    if json:
        typer.echo(jsonlib.dumps(dataclasses.asdict(result), default=str))
    else:
        typer.echo(
            f"merged {result.modules} layers into {result.into} ({result.base})\n"
            f"{result.out}: {result.bytes / 1e6:,.1f} MB in {result.dtype}"
        )
