"""Who is measured, each with what differs from its library's defaults."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import ours
from bench.processes import Ended, run
from bench.work import Did, Work, read_did, write_job

OURS = "lora"


@dataclass(frozen=True)
class Contestant:
    """``tool`` is lora, or the module in peers that runs another library; ``in_order`` says that its steps take the
    rows of the file as they stand, so that losses can be held against each other step by step."""

    name: str
    tool: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    in_order: bool = False
    needs_bf16: bool = False

    @property
    def packs(self) -> bool:
        """Whether rows are laid end to end."""
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
    """On a GPU."""
    best = _best_on_gpu()
    return (
        Contestant(OURS, OURS),
        Contestant("trl", "sft", in_order=True),
        Contestant("trl-best", "sft", best | BEST),
        Contestant("trl-best-checkpointing", "sft", best | {"packing": True}),
    )


def for_context(gpu: bool, offloads: bool) -> tuple[Contestant, ...]:
    """For the longest row that fits: TRL checkpoints by default, and on a GPU can keep activations in host memory, as
    lora does where it has to, or at any length when it ``offloads``."""
    best = _best_on_gpu()
    offloading = Contestant("trl-best-offloading", "sft", best | {"activation_offloading": True}, in_order=True)
    own = Contestant(OURS, OURS, {"training.gradient_checkpointing": "offload"} if offloads else {})
    both = own, Contestant("trl-best-checkpointing", "sft", best, in_order=True)
    return (*both, offloading) if gpu else both


def _best_on_gpu() -> dict[str, Any]:
    """Liger and FlashAttention for TRL when they are installed."""
    options: dict[str, Any] = {"use_liger_kernel": True} if find_spec("liger_kernel") else {}
    return options | ({"attn_implementation": "flash_attention_2"} if find_spec("flash_attn") else {})


def choose(
    all_of_them: Iterable[Contestant], only: Collection[str], work: Work, has_bf16: bool
) -> tuple[list[Contestant], dict[str, str]]:
    """Those asked for that can run here, lora always, and why the others cannot."""
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
    """What starts it, as arguments of Python."""
    if contestant.tool == OURS:
        return ["-m", "lora_cli", "train", str(ours.write_recipe(work, folder, contestant.options))]
    return ["-m", f"bench.peers.{contestant.tool}", str(write_job(work, folder, contestant.options))]


def start(contestant: Contestant, work: Work, folder: Path, env: dict[str, str], gpu: bool) -> Ended:
    """One run in a fresh process; its files and ``log`` are left in ``folder``."""
    sign = (lambda: bool(ours.metrics(folder))) if contestant.tool == OURS else None
    return run(command(contestant, work, folder), env, folder / "log", sign, gpu)


def read(contestant: Contestant, work: Work, folder: Path, ended: Ended) -> Did:
    """What a run that ended well did."""
    return ours.read_run(work, folder, ended) if contestant.tool == OURS else read_did(folder)
