"""``lora explain [KEY]``"""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer

from lora_cli.cli.options import Debug, Quiet


def command(
    key: Annotated[str | None, typer.Argument(help="A section or key, e.g. adapter.r; default: all of them.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema, for editors.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> str:
    """Show the recipe's reference: every key, its bounds, its default."""
    from lora_cli.recipe.explain import explain, json_schema

    return jsonlib.dumps(json_schema(), indent=2) if schema else explain(key)
