"""Make a model, and rows longer than any context that is tried; ``python -m bench.prepare_long job.json``."""

from __future__ import annotations

import json
import sys
from itertools import cycle
from pathlib import Path

from transformers import AutoTokenizer

from bench import data
from bench.prepare import SEED, model_folder


def main(job: str) -> None:
    """Write train.jsonl, whose rows join completions to at least ``tokens`` tokens, and rows.json with the paths."""
    arguments = json.loads(Path(job).read_text(encoding="utf-8"))
    source, train, _ = data.texts(SEED)
    model = model_folder(arguments["shape"], Path(arguments["models"]), source, train)
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = cycle(row["completion"] for row in train)
    rows = []
    for _ in range(arguments["rows"]):
        parts, tokens = [], 0
        while tokens <= arguments["tokens"] * 1.01:  # 1% more: tokens can merge where two texts meet
            parts.append(next(texts))
            tokens += len(tokenizer(parts[-1])["input_ids"])
        rows.append({"prompt": train[0]["prompt"], "completion": "".join(parts)})
    folder = Path(arguments["folder"])
    written = {"source": source, "model": str(model), "train": data.write(folder / "train.jsonl", rows, len(rows))}
    (folder / "rows.json").write_text(json.dumps(written), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
