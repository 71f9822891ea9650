"""Rows to train on: MedQuAD if it is next to the checkout, otherwise generated rows of similar lengths."""

from __future__ import annotations

import json
import random
from itertools import accumulate, islice
from pathlib import Path

from bench.processes import ROOT

MEDQUAD = ROOT.parent / "shared" / "data" / "medquad"
WORDS = 4000
MEDIAN_WORDS, SPREAD, MOST_WORDS = 140, 0.95, 4000  # words of a MedQuAD answer, roughly log-normal


def texts(seed: int) -> tuple[str, list[dict[str, str]], list[dict[str, str]]]:
    """The source's name, the training rows and the held-out rows. Rows have ``prompt`` and ``completion``."""
    if MEDQUAD.is_dir():
        return "MedQuAD", _medquad("train"), _medquad("validation")
    draw = random.Random(seed)
    words = sorted({"".join(draw.choices("aeiourstlnmdk", k=draw.randint(2, 9))) for _ in range(WORDS)})
    draw.shuffle(words)
    return "generated", _generate(draw, words, 4000), _generate(draw, words, 400)


def _medquad(split: str) -> list[dict[str, str]]:
    lines = (MEDQUAD / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [row(each["question"], each["answer"]) for each in map(json.loads, lines)]


def _generate(draw: random.Random, words: list[str], count: int) -> list[dict[str, str]]:
    """Rows of words drawn with the frequencies of natural language (Zipf), so that BPE has pairs worth merging."""
    summed = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(length: int) -> str:
        return " ".join(draw.choices(words, cum_weights=summed, k=length))

    lengths = (min(MOST_WORDS, 1 + int(MEDIAN_WORDS * draw.lognormvariate(0, SPREAD))) for _ in range(count))
    return [row(text(draw.randint(4, 12)), text(length)) for length in lengths]


def row(question: str, answer: str) -> dict[str, str]:
    """A question and its answer as prompt and completion."""
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def write(path: Path, rows: list[dict[str, str]], count: int) -> str:
    """Write the first ``count`` rows as .jsonl. Return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in islice(rows, count)), encoding="utf-8")
    return str(path)
