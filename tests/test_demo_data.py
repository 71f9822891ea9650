"""The demo's data: split by fact, reproducible, and large enough."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "demo_data.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_data"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def splits(demo: ModuleType) -> dict[str, list[dict[str, str]]]:
    return demo.question_answers(seed=0)


def test_every_fact_is_in_one_split(demo, splits):
    where = defaultdict(set)
    for name, rows in splits.items():
        for row in rows:
            where[row["fact"]].add(name)
    assert {len(names) for names in where.values()} == {1}
    assert set(where) == {fact.id for fact in demo.facts()}


def test_no_question_is_asked_in_two_splits(splits):
    asked = {name: {row["question"] for row in rows} for name, rows in splits.items()}
    assert not asked["train"] & (asked["validation"] | asked["test"])
    assert not asked["validation"] & asked["test"]


def test_every_split_asks_about_every_aspect(demo, splits):
    for rows in splits.values():
        assert {row["fact"].split("/")[1] for row in rows} == set(demo.PHRASINGS)


def test_there_is_enough_to_learn_and_to_measure(splits):
    facts = {name: {row["fact"] for row in rows} for name, rows in splits.items()}
    assert len(facts["train"]) >= 300
    assert len(facts["validation"]) >= 30
    assert len(facts["test"]) >= 30


def test_every_fact_has_several_phrasings(splits):
    for rows in splits.values():
        questions, answers = defaultdict(set), defaultdict(set)
        for row in rows:
            questions[row["fact"]].add(row["question"])
            answers[row["fact"]].add(row["answer"])
        assert min(map(len, questions.values())) >= 3
        assert min(map(len, answers.values())) >= 2


def test_rows_are_plain_sentences(splits):
    for row in (row for rows in splits.values() for row in rows):
        assert row.keys() == {"question", "answer", "fact"}
        assert row["question"].endswith("?")
        assert row["answer"].endswith(".")
        assert row["answer"][0].isupper()
        assert not set("{}|\n") & set(row["question"] + row["answer"])
        assert "  " not in row["question"] + row["answer"]


def test_the_tables_name_each_medicine_once_and_every_class_is_used(demo):
    drugs = demo.table(demo.DRUGS)
    assert max(Counter(row[0] for row in drugs).values()) == 1
    assert {row[1] for row in drugs} == {row[0] for row in demo.table(demo.CLASSES)}


def test_the_general_text_names_medicines_but_states_no_answer(demo, splits):
    text = "\n".join(demo.general_text(seed=0))
    assert len(text.split()) > 100_000
    assert all(row[0] in text.lower() for row in demo.table(demo.DRUGS))
    stated = [row["answer"] for rows in splits.values() for row in rows if row["answer"] in text]
    assert stated == []


def test_files_hold_the_same_bytes_for_the_same_seed(demo, tmp_path):
    first, again, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    demo.write(first, seed=3)
    demo.write(again, seed=3)
    demo.write(other, seed=4)
    names = sorted(file.name for file in first.iterdir())
    assert names == ["general.txt", "test.jsonl", "train.jsonl", "validation.jsonl"]
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert all((first / name).read_bytes() != (other / name).read_bytes() for name in names)
    rows = [json.loads(line) for line in (first / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == demo.question_answers(seed=3)["test"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
