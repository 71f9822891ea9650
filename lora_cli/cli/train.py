"""``lora train RECIPE [key=value …]``"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.cli.options import Debug, Json, Quiet
from lora_cli.errors import UserError


def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys to change: adapter.r=32 training.learning_rate=1e-4")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
    num_processes: Annotated[int, typer.Option("--num-processes", min=1, help="Number of processes, one per GPU.")] = 1,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> str | None:
    """Fine-tune a model as a recipe says."""
    from lora_cli.recipe.load import load_recipe
    from lora_cli.training.distributed.launch_environment import (
        check_launch_environment,
        end_with_launcher,
        process_count,
        process_index,
    )

    end_with_launcher()
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    loaded = load_recipe(recipe, overrides or ())

    if num_processes > 1 and process_count() == 1:
        from lora_cli.training.launch import launch
        from lora_cli.training.run.run_folder import RunFolder

        flags = {"--resume": resume, "--overwrite": overwrite, "--json": json, "--quiet": quiet, "--debug": debug}
        folder = RunFolder(loaded.training.output_dir)
        options = [flag for flag, given in flags.items() if given]
        raise typer.Exit(launch(["train", str(recipe), *(overrides or ()), *options], num_processes, folder))

    check_launch_environment()
    from lora_cli.display import Display
    from lora_cli.training.prepare import prepare

    display = Display(quiet, silent=process_index() > 0)
    with display.waiting("checking base and rows"):
        job = prepare(loaded, resume, overwrite)

    from lora_cli.study.report import write_report
    from lora_cli.training.loop import train

    info = train(job, display)
    if process_index() > 0:
        return None
    write_report(job.folder)
    run, result = str(job.folder.root), info["result"]
    return jsonlib.dumps({"run": run, **result}) if json else _summary(run, result)


def _summary(run: str, result: dict[str, Any]) -> str:
    from lora_cli.display import format_skipped, format_steps

    loss = "" if result["loss"] is None else f", last loss {result['loss']:.4f}"
    lines = [f"{format_steps(result)}{loss}"]
    if skipped := format_skipped(result):
        lines.append(skipped)
    if result["adapter_step"] != result["steps"]:
        lines.append(f"the adapter has the weights of step {result['adapter_step']:,}, the best")
    base, start, tuned = (result[name] for name in ("base", "start", "validation"))
    if base and tuned:
        before, aside = (start, f" (base {base['perplexity']:.2f})") if start else (base, "")
        lines.append(f"validation perplexity {before['perplexity']:.2f} -> {tuned['perplexity']:.2f}{aside}")
    lines.append(f"adapter: {run}/adapter   report: {run}/report.html")
    return "\n".join(lines)
