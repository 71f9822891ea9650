"""Options that every verb takes."""

from __future__ import annotations

from typing import Annotated

import typer

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and results alone.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Tensors in a file at most, as 500MB or 5GB.")]
