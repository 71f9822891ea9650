"""The contestants that are measured, each with the options that differ from its library's defaults."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import ours
from bench.processes import ProcessResult, run
from bench.work import Report, Work, read_report, write_job

OURS = "lora"


@dataclass(frozen=True)
class Contestant:
    """A tool with its options. ``tool`` is "lora", or the module in ``peers`` that runs another library. ``in_order``:
    its steps take the rows in the file's order, so that losses can be compared step by step."""

    name: str
    tool: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    in_order: bool = False
    needs_bf16: bool = False

    @property
    def packs(self) -> bool:
        """Whether rows are packed end to end."""
        return bool(self.options.get("packing", self.options.get("data.packing", self.tool == OURS)))


UNPACKED = {"data.packing": False, "data.shuffle": False}
BEST = {"packing": True, "gradient_checkpointing": False}
CPU = (
    Contestant(OURS, OURS),
    Contestant("lora-compiled", OURS, {"training.torch_compile": True}, needs_bf16=True),
    Contestant("lora-unpacked", OURS, UNPACKED, in_order=True),
    Contestant("trl", "sft", in_order=True),
    Contestant("trl-packing", "sft", {"packing": True}),
    Contestant("trl-no-checkpointing", "sft", {"gradient_checkpointing": False}, in_order=True),
    Contestant("trl-best", "sft", BEST),
    Contestant("trainer-fp32-dynamic", "script", {"bf16": False}, in_order=True),
    Contestant("trainer-bf16-dynamic", "script", {"bf16": True}, in_order=True, needs_bf16=True),
)


def on_gpu() -> tuple[Contestant, ...]:
    """The contestants on a GPU."""
    best = _best_on_gpu()
    return (
        Contestant(OURS, OURS),
        Contestant("trl", "sft", in_order=True),
        Contestant("trl-best", "sft", best | BEST),
        Contestant("trl-best-checkpointing", "sft", best | {"packing": True}),
    )


def for_context(gpu: bool, offloads: bool) -> tuple[Contestant, ...]:
    """The contestants for the longest row that fits. TRL uses gradient checkpointing by default, and on a GPU can also
    offload activations to host memory. lora does so when it must, or at every length if ``offloads``."""
    best = _best_on_gpu()
    offloading = Contestant("trl-best-offloading", "sft", best | {"activation_offloading": True}, in_order=True)
    own = Contestant(OURS, OURS, {"training.gradient_checkpointing": "offload"} if offloads else {})
    both = own, Contestant("trl-best-checkpointing", "sft", best, in_order=True)
    return (*both, offloading) if gpu else both


def _best_on_gpu() -> dict[str, Any]:
    """TRL's options for Liger and FlashAttention, if they are installed."""
    options: dict[str, Any] = {"use_liger_kernel": True} if find_spec("liger_kernel") else {}
    return options | ({"attn_implementation": "flash_attention_2"} if find_spec("flash_attn") else {})


def choose(
    all_of_them: Iterable[Contestant], only: Collection[str], work: Work, has_bf16: bool
) -> tuple[list[Contestant], dict[str, str]]:
    """The requested contestants that can run here, always with lora, and the reasons why the others cannot."""
    chosen, skipped = [], {}
    for each in all_of_them:
        if only and each.name not in (OURS, *only):
            continue
        if each.tool == "sft" and find_spec("trl") is None:
            skipped[each.name] = "trl is not installed (pip install .[bench])"
        elif each.needs_bf16 and not has_bf16:
            skipped[each.name] = "this chip has no units for bfloat16, which is emulated"
        elif each.needs_bf16 and work.precision == "float32":
            skipped[each.name] = "--dtype float32"
        else:
            chosen.append(each)
    return chosen, skipped


def command(contestant: Contestant, work: Work, folder: Path) -> list[str]:
    """Write the contestant's recipe or job, and return the Python arguments that start it."""
    if contestant.tool == OURS:
        return ["-m", "lora_cli", "train", str(ours.write_recipe(work, folder, contestant.options))]
    return ["-m", f"bench.peers.{contestant.tool}", str(write_job(work, folder, contestant.options))]


def start(contestant: Contestant, work: Work, folder: Path, env: dict[str, str], gpu: bool) -> ProcessResult:
    """Run the contestant in a fresh process, which leaves its files and ``log`` in ``folder``."""
    is_ready = (lambda: bool(ours.metrics(folder))) if contestant.tool == OURS else None
    return run(command(contestant, work, folder), env, folder / "log", is_ready, gpu)


def read(contestant: Contestant, work: Work, folder: Path, result: ProcessResult) -> Report:
    """The report of a run that succeeded."""
    return ours.read_run(work, folder, result) if contestant.tool == OURS else read_report(folder)
