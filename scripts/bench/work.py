"""The work that every contestant is given, and what each must say of what it did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """One pass over ``rows`` rows with LoRA and AdamW at a constant rate, prompts masked.

    ``model`` is a folder, ``train`` and ``heldout`` are .jsonl files of prompts and completions. A step takes
    ``batch_size`` rows; who packs takes ``packed_batch_size`` times ``max_length`` tokens, which comes nearest to as
    many steps. Steps up to ``warmup_steps`` are left out of the rate. ``precision`` is float32 for all, or default:
    what each library does by itself. ``nf4`` says that the model is stored so.
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
        """Optimizer steps of who takes ``batch_size`` rows a step."""
        return -(-self.rows // self.batch_size)


@dataclass(frozen=True)
class Did:
    """What a contestant did: counts of what went through the model, times by the wall clock.

    ``tokens_per_second`` counts real tokens, prompts with them, padding not, over the steps after the warm-up;
    ``first_step_at`` is ``time.time()`` at the end of the first step; ``settings`` are those worth reading.
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
    """The description that a peer's process is given: the work, where to write, and its options."""
    path = folder / "job.json"
    path.write_text(json.dumps({"work": asdict(work), "folder": str(folder), "options": options}), encoding="utf-8")
    return path


def read_job(path: str) -> tuple[Work, Path, dict[str, Any]]:
    """What ``write_job`` wrote."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    return Work(**job["work"] | {"targets": tuple(job["work"]["targets"])}), Path(job["folder"]), job["options"]


def write_did(did: Did, folder: Path) -> None:
    """A peer's report."""
    (folder / "did.json").write_text(json.dumps(asdict(did)), encoding="utf-8")


def read_did(folder: Path) -> Did:
    """What ``write_did`` wrote."""
    return Did(**json.loads((folder / "did.json").read_text(encoding="utf-8")))


def read_rows(path: str) -> list[dict[str, str]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
