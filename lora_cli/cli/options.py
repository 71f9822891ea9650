"""Options that several commands share, and the class of all commands."""

from __future__ import annotations

import re
import sys
from collections import Counter
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lora_cli.errors import RunError, UserError, printable_lines

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show only warnings and results.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Base = Annotated[
    str | None, typer.Option("--base", help="The adapter's base, a folder or hub id; default: the one it names.")
]
MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="Maximum size of one file, e.g. 500MB or 5GB.")]
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def bytes_of(size: str) -> int:
    """Parse a size such as 500MB, 5GB or 1000 to bytes. Raises UserError for any other text."""
    found = re.fullmatch(r"([1-9][0-9]*)(KB|MB|GB|)", size)
    if found is None:
        raise UserError(f"--max-shard-size: {size!r} is not a size", hint="write it as 5GB, 500MB, 64KB or in bytes")
    return int(found[1]) * UNITS[found[2]]


def check_base_option(base: str | None, target: str) -> None:
    """Raises UserError when ``--base`` is given although the ``target`` is no adapter."""
    if base is not None:
        what = f"--base is for an adapter, and {target} is not one"
        raise UserError(what, hint="remove it, or name a run or an adapter")


class Command(TyperCommand):
    """A command that prints the text it returns, and refuses an option given twice: otherwise the last one would be
    used silently."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, times in Counter(given).items():
            if times > 1 and not (parameter.multiple or getattr(parameter, "is_flag", True)):
                raise UserError("given more than once", max(parameter.opts, key=len), "keep one of them")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> None:
        """Run the command and print its result. What libraries print on stdout goes to stderr: DeepSpeed logs there."""
        with redirect_stdout(sys.stderr):
            result: str | None = super().invoke(ctx)
        if result is not None:
            is_json = ctx.params.get("json", False)  # which is escaped already
            self.show(result if is_json else printable_lines(result))

    def show(self, result: str) -> None:
        """Print the command's result. Raises BrokenPipeError when nobody reads it, RunError when a write fails."""
        try:
            typer.echo(result)
        except BrokenPipeError:
            raise
        except OSError as error:
            from lora_cli.display import silence

            silence(sys.stdout)  # otherwise Python fails again to write it as it ends, with an exit code of its own
            hint = "files that were complete are intact"
            raise RunError(f"the result could not be printed: {error.strerror}", "stdout", hint) from error


class TrainCommand(Command):
    """``lora train``, whose arguments set keys of the recipe. For an option named like a key (--learning_rate), the
    error says how to set the key."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {*ctx.help_option_names, *(name for parameter in self.params for name in parameter.opts)}
        for option in (arg.partition("=")[0] for arg in args if arg.startswith("--")):
            if option not in own and (hint := _key_hint(option)):
                raise UserError("no such option", option, hint)
        return super().parse_args(ctx, args)

    def show(self, result: str) -> None:
        """Print the command's result, if anybody reads it: the run itself has succeeded."""
        from lora_cli.display import silence

        try:
            super().show(result)
        except BrokenPipeError:
            silence(sys.stdout)


def _key_hint(option: str) -> str | None:
    """Return a hint for an option with the name of a recipe's key, here or in another tool."""
    from lora_cli.recipe.explain import dotted_keys, keys_named
    from lora_cli.recipe.peers import WITHOUT_KEY, peers_hint

    name = option.removeprefix("--").replace("-", "_")
    keys = (name,) if name in dotted_keys() else keys_named(name)
    if not keys or name in WITHOUT_KEY:
        return peers_hint("", name)
    return f"to set this key of the recipe, write {keys[0]}=VALUE"
