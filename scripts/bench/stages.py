"""Time each data stage of training, from a file of rows to micro-batches; ``python -m bench.stages job.json``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer

from lora_cli.data.audit import audit
from lora_cli.data.batches import Schedule
from lora_cli.data.cache import publish, tokenize_cached
from lora_cli.data.examples import fit
from lora_cli.data.faults import row_faults
from lora_cli.data.sources import sources_of
from lora_cli.recipe.schema import Data

BATCH_SIZE = 16
Found = TypeVar("Found")


def main(job: str) -> None:
    """Write stages.json: rows, tokens, how full the batches are, and each stage's seconds and peak resident memory."""
    arguments = json.loads(Path(job).read_text(encoding="utf-8"))
    folder, max_length = Path(arguments["folder"]), arguments["max_length"]
    tokenizer = AutoTokenizer.from_pretrained(arguments["model"])
    data = Data(train=arguments["rows"], max_length=max_length)
    sources, cache = sources_of(data.train), folder / "cache"
    stages: dict[str, dict[str, float]] = {}

    def stage(name: str, work: Callable[[], Found]) -> Found:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident memory, VmHWM
        start = time.perf_counter()
        found = work()
        stages[name] = {"seconds": time.perf_counter() - start, "peak_bytes": _high_water()}
        return found

    stage("check", lambda: row_faults(data, sources, set(), set()))
    parts = [stage("tokenize", lambda: tokenize_cached(data, sources, tokenizer, cache))]
    stage("write", lambda: publish(cache, parts))
    cached = stage("read again", lambda: tokenize_cached(data, sources, tokenizer, cache))
    rows = cached.tokenized.examples
    fitted = stage("fit", lambda: fit(rows, max_length, "rows"))
    stage("audit", lambda: audit(rows, fitted, None, tokenizer, cached.tokenized))
    kept = fitted.examples
    schedule = Schedule(
        lengths=kept.lengths,
        supervised=kept.supervised_per_row,
        source=kept.source,
        weights=(1.0,),
        seed=0,
        shuffle=True,
        batch_size=BATCH_SIZE,
        max_length=max_length,
        packing=True,
        accumulation=1,
    )
    batches = stage("pack", lambda: schedule.epoch_batches(0))
    filled = kept.tokens / (len(batches) * BATCH_SIZE * max_length)
    found: dict[str, Any] = {"rows": len(rows), "tokens": rows.tokens, "filled": filled, "stages": stages}
    (folder / "stages.json").write_text(json.dumps(found), encoding="utf-8")


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(sys.argv[1])
