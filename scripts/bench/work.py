"""The work that every contestant is given, and the report that each must return."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """One pass over ``rows`` rows with LoRA and AdamW at a constant learning rate, with prompts masked.

    ``model`` is a folder; ``train`` and ``heldout`` are .jsonl files of prompts and completions. A step takes
    ``batch_size`` rows. With packing, it takes ``packed_batch_size`` times ``max_length`` tokens, for about as many
    steps. The first ``warmup_steps`` steps do not count for tokens per second. ``precision`` is "float32" for all, or
    "default" for each library's own. ``nf4``: the model is stored in NF4.
    """

    model: str
    train: str
    heldout: str
    rows: int
    tokens: int
    supervised_tokens: int
    targets: tuple[str, ...]
    batch_size: int
    packed_batch_size: int
    max_length: int
    r: int
    lora_alpha: int
    learning_rate: float
    warmup_steps: int
    precision: str
    nf4: bool = False
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of a contestant that takes ``batch_size`` rows per step."""
        return -(-self.rows // self.batch_size)


@dataclass(frozen=True)
class Report:
    """What a contestant did: counts of what went through the model, and wall-clock times.

    ``tokens_per_second`` counts tokens of prompts and completions, without padding, over the steps after the warm-up.
    ``first_step_at`` is ``time.time()`` at the end of the first step. ``settings`` are those that affect the figures.
    """

    steps: int
    rows: int
    tokens: int
    supervised_tokens: int
    trainable_parameters: int
    losses: list[float]
    tokens_per_second: float
    first_step_at: float
    adapter: str
    settings: dict[str, Any] = field(default_factory=dict)


def write_job(work: Work, folder: Path, options: dict[str, Any]) -> Path:
    """Write job.json for a peer's process: the work, the folder to write to, and the options. Return its path."""
    path = folder / "job.json"
    path.write_text(json.dumps({"work": asdict(work), "folder": str(folder), "options": options}), encoding="utf-8")
    return path


def read_job(path: str) -> tuple[Work, Path, dict[str, Any]]:
    """What ``write_job`` wrote."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    return Work(**job["work"] | {"targets": tuple(job["work"]["targets"])}), Path(job["folder"]), job["options"]


def write_report(report: Report, folder: Path) -> None:
    """Write a peer's report to report.json."""
    (folder / "report.json").write_text(json.dumps(asdict(report)), encoding="utf-8")


def read_report(folder: Path) -> Report:
    """What ``write_report`` wrote."""
    return Report(**json.loads((folder / "report.json").read_text(encoding="utf-8")))


def read_rows(path: str) -> list[dict[str, str]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
