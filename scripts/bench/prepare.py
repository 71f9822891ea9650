"""Make a model and rows, and count their tokens; ``python -m bench.prepare job.json``. It runs in its own process, so
that the bench's own process stays small."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from transformers import AutoTokenizer

from bench import data
from bench.models import make
from bench.shapes import SHAPES

SEED = 0


def main(job: str) -> None:
    """Write the rows, and rows.json: the files' paths, and the rows and tokens of a pass over the training rows."""
    arguments = json.loads(Path(job).read_text(encoding="utf-8"))
    folder, max_length = Path(arguments["folder"]), arguments["max_length"]
    source, train, heldout = data.texts(SEED)
    model = model_folder(arguments["shape"], Path(arguments["models"]), source, train)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = []
    for row in train[: arguments["rows"]]:
        prompt, whole = (
            len(tokenizer(text)["input_ids"]) for text in (row["prompt"], row["prompt"] + row["completion"])
        )
        lengths.append((prompt, min(whole + 1, max_length)))  # the end-of-text token
    if len(lengths) < arguments["rows"] or any(prompt >= whole for prompt, whole in lengths):
        raise SystemExit(f"{source}: too few rows, or a prompt that fills {max_length} tokens")
    rows = {
        "source": source,
        "model": str(model),
        "train": data.write(folder / "train.jsonl", train, arguments["rows"]),
        "heldout": data.write(folder / "heldout.jsonl", heldout, arguments["heldout_rows"]),
        "rows": len(lengths),
        "tokens": sum(whole for _, whole in lengths),
        "supervised_tokens": sum(whole - prompt for prompt, whole in lengths),
    }
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def model_folder(name: str, models: Path, source: str, rows: list[dict[str, str]]) -> Path:
    """The folder of this shape's model, made unless it exists. Its name has a hash of the shape and ``source``."""
    made_from = hashlib.sha256(json.dumps([source, asdict(SHAPES[name])]).encode()).hexdigest()
    folder = models / f"{name}-{made_from[:8]}"
    if not folder.exists():
        make(SHAPES[name], (row["prompt"] + row["completion"] for row in rows), folder, SEED)
    return folder


if __name__ == "__main__":
    main(sys.argv[1])
