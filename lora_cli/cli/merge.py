"""``lora merge ADAPTER [ADAPTER ...] --out DIR``"""

from __future__ import annotations

import dataclasses
import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_cli.cli.options import Base, Debug, Json, MaxShardSize, Quiet, bytes_of
from lora_cli.errors import UserError, pluralize, printable

if TYPE_CHECKING:
    from lora_cli.study.verify import Sample, Verified
    from lora_cli.weights.adapter.origin import AdapterOrigin
    from lora_cli.weights.merge import Merged

WORTH_TELLING, MANY_UNCHANGED = 0.01, 0.5


def command(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="Runs or adapter folders; several are added up.", metavar="ADAPTER...", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist.", show_default=False)],
    base: Base = None,
    into: Annotated[
        Literal["expanded", "original", "quantized"] | None,
        typer.Option(
            "--into",
            help="For a base that was quantized in training: what to merge into. expanded (default): its dequantized "
            "weights, which the adapter was trained on; original: its original weights; quantized: as expanded, and "
            "the result is quantized again.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="The dtype to store; default: the base's."),
    ] = None,
    max_shard_size: MaxShardSize = "50GB",
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the merged model's logits with base and adapter on a few rows; default: if these fit in "
            "memory.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="The rows to verify on; default: the adapter's own, or a few sentences."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> str:
    """Fold adapters into their base model's weights."""
    from lora_cli.system.folders import check_out

    if data is not None and verify is False:
        raise UserError("--data is for verifying, which --no-verify turns off", hint="leave one of them out")
    max_shard = bytes_of(max_shard_size)
    check_out(out)
    origins = [find_adapter(adapter, base) for adapter in adapters]
    for origin in origins:
        check_out(out, origin.base, origin.folder)
    _check_compatible(origins, into)

    from lora_cli.display import Display
    from lora_cli.system.memory import keep_freed_memory

    keep_freed_memory()
    found: list[Verified] = []
    sample = _sample(origins[0], data, verify)
    display = Display(quiet)

    def check(draft: Path) -> None:
        if sample is not None:
            from lora_cli.study import verify as checking

            found.append(checking.verify(origins, draft, out, into, sample))

    with display.waiting("merging"):
        if into == "quantized":
            result = _quantize(origins, out, dtype, max_shard, display.note, check)
        else:
            import torch

            from lora_cli.weights.merge import merge

            result = merge(origins, out, display.note, into, getattr(torch, dtype) if dtype else None, max_shard, check)
    report, lines = dataclasses.asdict(result), _lines(result)
    for each in found:
        report["verified"] = dataclasses.asdict(each)
        lines.extend(each.lines())
    if verify is None and sample is None:
        lines.append("not verified: base and adapter do not fit into this machine's memory in float32")
    return jsonlib.dumps(report, default=str) if json else "\n".join(lines)


def find_adapter(adapter: Path, base: str | None = None) -> AdapterOrigin:
    """Find the adapter of a run or folder, and its base. Print a warning if the run has not finished. Raises UserError
    when the adapter cannot be merged."""
    from lora_cli.training.run.run_folder import unfinished
    from lora_cli.weights.adapter.adapter_config import check_mergeable_lora, read_adapter_config
    from lora_cli.weights.adapter.origin import adapter_folder, find_origin
    from lora_cli.weights.files.check_model import check_mergeable

    found = adapter_folder(adapter)
    warning = unfinished(adapter, found)
    if warning:
        typer.echo(f"warning: {warning}", err=True)
    check_mergeable_lora(found or adapter)
    origin = find_origin(found or adapter, base, other_kinds=True)
    if read_adapter_config(origin.folder)["peft_type"] != "LORA":
        from lora_cli.weights.merge_in_memory import check_kind

        check_kind(origin.folder)
    check_mergeable(origin.base)
    return origin


def _sample(origin: AdapterOrigin, data: str | None, verify: bool | None) -> Sample | None:
    """Return the rows to verify on; None if this is not wanted, or by default if the base does not fit into memory.
    Only a verification imports PEFT."""
    from lora_cli.weights.merge import fits_in_memory

    if not (fits_in_memory(origin.base) if verify is None else verify):
        return None
    from lora_cli.study.verify import sample_for

    return sample_for(origin, data)


def _quantize(
    origins: list[AdapterOrigin],
    out: Path,
    dtype: str | None,
    max_shard: int,
    tell: Callable[[str], object],
    check: Callable[[Path], None],
) -> Merged:
    from lora_cli.weights.adapter.check_adapter import adapted_layers
    from lora_cli.weights.merge import Merged
    from lora_cli.weights.quantize import quantize_merged

    origin, *others = origins
    wanted = origin.quantization
    if others or dtype:
        what = "--into quantized takes a single adapter, and no --dtype: the type is that of training"
        raise UserError(what, str(origin.folder), "remove the other adapters and --dtype")
    assert wanted is not None
    result = quantize_merged(origin, out, wanted, (), max_shard, tell, check)
    target = f"the base in {wanted.method}, quantized again"
    layers = len(adapted_layers(origin.folder))  # result.layers holds all quantized layers, adapted or not
    return Merged(out, origin.base_name, layers, target, wanted.method, result.bytes_after, None, False)


def _check_compatible(origins: list[AdapterOrigin], into: str | None) -> None:
    """Raises UserError when an adapter is given twice, the adapters have different bases, or ``into`` is given but no
    adapter's recipe quantizes the base."""
    from lora_cli.weights.adapter.check_adapter import check_given_once
    from lora_cli.weights.files.fingerprint import fingerprint

    check_given_once(origin.folder for origin in origins)
    first = origins[0]
    for origin in origins[1:]:
        if origin.base != first.base and fingerprint(origin.base) != fingerprint(first.base):
            raise UserError(f"another base than that of {first.folder}", str(origin.folder), f"it is for {origin.base}")
    if into is not None and not any(origin.quantization for origin in origins):
        reason = "the adapter's recipe does not say that its base was quantized"
        raise UserError(f"--into {into}: {reason}", str(first.folder), "remove --into")


def _lines(result: Merged) -> list[str]:
    lines = [
        f"merged {pluralize(result.modules, 'layer')} into {result.into} ({printable(result.base)})",
        f"{result.out}: {result.bytes / 1e6:,.1f} MB in {result.dtype}",
    ]
    if result.in_memory:
        lines.insert(0, "PEFT merged this kind of adapter, with the whole model in memory")
    if result.unchanged and result.unchanged >= WORTH_TELLING:
        message = f"rounded to {result.dtype}, {result.unchanged:.1%} of the weights in these layers are unchanged"
        could_keep = result.unchanged > MANY_UNCHANGED and result.dtype != "float32"
        advice = "; --dtype float32 would keep what the adapter adds" if could_keep else ""
        lines.append(f"{message}{advice}")
    return lines
