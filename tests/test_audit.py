"""What the audit counts, reports and refuses before training, compared with counts made by hand."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import done, edited_weights, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.data.audit import Report, audit
from lora_cli.data.examples import Examples, Fitted, fit, join_pieces
from lora_cli.data.faults import data_faults
from lora_cli.data.sources import Row
from lora_cli.data.tokenize import Tokenized, tokenize_rows
from lora_cli.recipe.schema import Data, Template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


def report_of(
    tokenizer: Any, *rows: dict[str, Any], max_length: int = 500, held_out: Examples | None = None, **data: Any
) -> tuple[Report, Fitted]:
    settings = Data(train="rows.jsonl", **data)
    made = tokenize_rows(settings, [Row(row, f"rows.jsonl:{n}") for n, row in enumerate(rows, 1)], tokenizer)
    fitted = fit(made.examples, max_length, "rows")
    return audit(made.examples, fitted, held_out, tokenizer, made), fitted


def chat(*words: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(words)]}


@pytest.fixture
def chatty(tokenizer: Any) -> Callable[[str], Any]:
    def make(template: str) -> Any:
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        return changed

    return make


def test_alpacas_rows_are_learned_as_chat_when_asked_to(
    write_recipe: Any, tiny_llama: Path, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    rows = [{"instruction": "Add", "input": f"1 {n}", "output": str(1 + n)} for n in range(4)]
    chats = [chat(f"Add\n1 {n}", str(1 + n)) for n in range(4)]
    files = [write_rows(tmp_path / "rows.jsonl", rows), write_rows(tmp_path / "chats.jsonl", chats)]
    told, losses = [], []
    for name, train, format in (("a", files, "auto"), ("b", files[0], "chat"), ("c", files[1], "chat")):
        changes = {"data.train": train, "data.format": format, "model.name_or_path": tiny_llama}
        changes |= {"training.max_steps": 1, "training.logging_steps": 1, "training.output_dir": tmp_path / name}
        stderr = done(lora("train", write_recipe(changes))).stderr
        told.append("alpaca rows do not go through the model's chat template" in stderr)
        losses.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert told == [True, False, False]
    assert losses[1] == losses[2]


# Copies and leaks.


def test_copies_and_leaks_are_told_and_recorded(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None, qa_file: Path
) -> None:
    rows = [json.loads(line) for line in qa_file.read_text().splitlines()]
    split_otherwise = (
        {"question": "Who mends", "answer": " the nets?"},
        {"question": "Who", "answer": " mends the nets?"},
    )
    train = [*rows[:8], rows[2], rows[3], rows[2], *split_otherwise]
    held_out = [rows[2], {"question": "Why?", "answer": " Because."}, rows[5], rows[5]]
    for name, content in (("train", train), ("held_out", held_out)):
        write_rows(tmp_path / f"{name}.jsonl", content)
    changes = {"data.train": tmp_path / "train.jsonl", "data.validation": tmp_path / "held_out.jsonl"}
    result = done(lora("train", write_recipe(changes | {"training.max_steps": 1})))
    assert "3 training rows repeat an earlier one" in result.stderr
    assert "warning: 3 validation rows are in the training rows too" in result.stderr
    assert "chat template" not in result.stderr, "this model has none"
    found = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (found["duplicates"], found["validation_in_train"]) == (3, 3)


def test_a_share_of_rows_with_copies_leaks(write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None) -> None:
    row = {"question": "Why?", "answer": " Because."}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    changes = {"data.train": tmp_path / "rows.jsonl", "data.validation": 0.25, "training.max_steps": 1}
    result = done(lora("train", write_recipe(changes)))
    assert "5 training rows repeat" in result.stderr
    assert "2 validation rows are in the training rows too" in result.stderr


def test_an_answer_that_another_turn_follows_without_an_end_is_reported(
    tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(ENDLESS)
    rows = write_rows(tmp_path / "rows.jsonl", [chat("Hi", "Hello"), chat("Hi", "Hello", "Bye")])
    changes = {"model.name_or_path": base, "data.train": rows, "data.format": "chat", "training.max_steps": 1}
    told = " ".join(done(lora("train", write_recipe(changes))).stderr.split())
    assert "of 2 training rows 1 have their end supervised; 0 BOS per row" in told
    assert "warning: in 1 whole row the end of the last answer is not supervised" in told


def test_rows_that_differ_behind_the_cut_are_no_copies(tokenizer: Any) -> None:
    rows = [{"text": "word " * 40 + end} for end in ("one", "two", "two")]
    report, fitted = report_of(tokenizer, *rows, max_length=16)
    assert fitted.truncated == 3
    assert report.duplicates == 1


ROW = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(train=st.lists(ROW, min_size=1, max_size=12), held_out=st.lists(ROW, min_size=1, max_size=12))
def test_copies_leaks_and_ends_agree_with_counting_lists(
    train: list[list[tuple[int, bool]]], held_out: list[list[tuple[int, bool]]], tokenizer: Any
) -> None:
    def made(rows: list[list[tuple[int, bool]]]) -> Examples:
        pieces = [(np.asarray([i for i, _ in r], np.int32), np.asarray([m for _, m in r]), 0) for r in rows]
        return join_pieces(pieces, ("text",))

    whole = made(train)
    report = audit(whole, Fitted(whole, len(whole), 0, 0), made(held_out), tokenizer, Tokenized(whole, 0))
    assert report.duplicates == sum(count - 1 for count in Counter(map(tuple, train)).values())
    seen = {tuple(token for token, _ in row) for row in train}
    assert report.validation_in_train == sum(tuple(token for token, _ in row) in seen for row in held_out)
    learned = [tokens for row in train if (tokens := [token for token, wanted in row if wanted])]
    ended = [tokens for tokens in learned if tokens[-1] == tokenizer.eos_token_id]
    assert (report.ends_supervised, report.ends_masked) == (len(ended), len(learned) - len(ended))
    assert report.empty_answers == sum(len(tokens) == 1 for tokens in ended)


# Columns.


def test_columns_that_are_not_read_are_told(write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None) -> None:
    row = {"prompt": "Why?", "completion": "Because.", "\x1b[2J": "x", "a": "1", "b": [0], "url": ""}
    write_rows(tmp_path / "rows.jsonl", [row])
    write_rows(tmp_path / "held_out.jsonl", [{"text": "Why?", "c": 1}])
    files = {"data.train": tmp_path / "rows.jsonl", "data.validation": tmp_path / "held_out.jsonl"}
    result = done(lora("train", write_recipe(files | {"training.max_steps": 1})))
    told = r"columns not used: \x1b[2J, a, b, c"
    assert f"{told}\n" in result.stderr
    assert told in (tmp_path / "run" / "train.log").read_text()
    write_rows(tmp_path / "rows.jsonl", [row, row | {"d": "x", "e": "x", "topic": 1}])
    result = done(lora("train", write_recipe(files | {"training.max_steps": 1}), "--overwrite"))
    assert f"{told}, d and 2 more\n" in result.stderr


def test_nothing_is_told_when_every_column_is_read(tmp_path: Path) -> None:
    unread: set[str] = set()
    rows = {
        "chat": chat("Who?", "I.") | {"system": "Be kind.", "tools": [{"name": "clock"}], "url": ""},
        "alpaca": {"instruction": "Add", "input": "1 1", "output": "2", "system": "", "history": None},
        "qa": {"question": "Why?", "answer": "Because."},
        "text": {"text": "Why?"},
    }
    for name, row in rows.items():
        data = Data(train=write_rows(tmp_path / f"{name}.jsonl", [row]))
        assert data_faults(data, unread) == []
    patterns = {"prompt": "{system}{question}", "completion": "{answer}"}
    write_rows(tmp_path / "qa.jsonl", [rows["qa"] | {"system": "Be kind."}])
    assert data_faults(Data(train=str(tmp_path / "qa.jsonl"), template=Template(**patterns)), unread) == []
    assert unread == set()
    write_rows(tmp_path / "chat.jsonl", [rows["chat"] | rows["qa"]])
    assert data_faults(Data(train=str(tmp_path / "chat.jsonl")), unread) == []
    assert unread == {"question", "answer"}


# Ends.


def test_ends_of_texts(tokenizer: Any) -> None:
    rows = [
        {"prompt": "Why?", "completion": " Because."},
        {"prompt": "Why?", "completion": " Rivers carry salt. " * 20},
    ]
    report, fitted = report_of(tokenizer, *rows)
    assert (report.ends_supervised, report.ends_masked) == (2, 0)
    report, fitted = report_of(tokenizer, *rows, max_length=20)
    assert (len(fitted.examples), report.ends_supervised, report.ends_masked) == (2, 1, 0)


@pytest.mark.parametrize("train_on", ["completion", "all"])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_ends_of_turns(train_on: str, template: str, chatty: Callable[[str], Any]) -> None:
    rows = [
        chat("Hi", "Hello"),
        chat("Hi", "Hello", "Bye"),
        chat("Hi", "Rivers carry salt. " * 30),
        chat("Hi", "Hello", "Bye", "Rivers carry salt. " * 30),
    ]
    report, fitted = report_of(chatty(template), *rows, train_on=train_on)
    assert (report.ends_supervised, report.ends_masked) == (4, 0)
    report, fitted = report_of(chatty(template), *rows, max_length=60, train_on=train_on)
    assert (len(fitted.examples), fitted.truncated, report.ends_supervised, report.ends_masked) == (4, 2, 2, 0)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_rows_without_an_answer_and_with_an_empty_one(template: str, chatty: Callable[[str], Any]) -> None:
    rows = [chat("Hi"), chat("Hi", ""), chat("Hi", "", "Bye", "Hello"), chat("Hi", "Hello")]
    report, fitted = report_of(chatty(template), *rows)
    assert (len(fitted.examples), report.ends_supervised, report.ends_masked, report.empty_answers) == (3, 3, 0, 1)


def test_empty_answers_are_told(write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"question": "Why?", "answer": answer} for answer in ("", " Because.")])
    result = done(lora("train", write_recipe({"data.train": tmp_path / "rows.jsonl", "training.max_steps": 1})))
    assert "warning: 1 training row has an empty answer" in result.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["empty_answers"] == 1


def test_an_end_that_is_not_supervised_is_told(chatty: Callable[[str], Any]) -> None:
    rows = [chat("Hi", "Hello"), chat("Hi", "Hello", "Bye"), chat("Hi", "Hello", "Bye")]
    report, _ = report_of(chatty(ENDLESS), *rows)
    assert (report.ends_supervised, report.ends_masked) == (1, 2)
    assert (
        report.template_notes[0]
        == "the chat template writes no end of turn: the end-of-text token is added after the last turn"
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (CHATML, "no {% generation %} marks"),
        (MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"), "leave out <|im_end|>"),
        (
            MARKED + "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}",
            r"ends a prompt in '<think>\n\n</think>\n\n'",
        ),
        ("{{ strftime_now('%Y') }}" + MARKED, "today's date: the same rows give different tokens on another day"),
        ("{{ date_string or strftime_now('%Y') }}" + MARKED, "today's date: 26 Jul 2024 here"),
        (MARKED, None),
        (MARKED.replace("{% generation %}", "{%- generation -%}"), None),
    ],
)
def test_what_a_template_leaves_out_is_told_and_supervised_all_the_same(
    template: str, says: str | None, chatty: Callable[[str], Any]
) -> None:
    tokenizer = chatty(template)
    report, fitted = report_of(tokenizer, chat("Hi", "Hello"))
    ids, mask = fitted.examples.row(0)
    assert tokenizer.decode(ids[mask]) == "Hello<|im_end|>"
    assert [says in note for note in report.template_notes] == [True] if says else not report.template_notes


def test_templates_of_other_formats_are_not_asked(tokenizer: Any) -> None:
    report, _ = report_of(tokenizer, {"text": "Hello"})
    assert report.template_notes == ()


@pytest.mark.parametrize(
    ("stops", "rows", "warned"),
    [
        ({"generation_config.json": {"eos_token_id": [0, 3]}}, "chat", False),
        ({"generation_config.json": {"eos_token_id": 0}}, "chat", True),
        ({"generation_config.json": None, "config.json": {"eos_token_id": 0}}, "chat", True),
        ({"generation_config.json": {"eos_token_id": None}, "config.json": {"eos_token_id": 3}}, "chat", False),
        ({"generation_config.json": {"eos_token_id": 0}}, "text", False),
    ],
)
def test_answers_that_generation_does_not_stop_behind_are_told(
    stops: dict[str, Any],
    rows: str,
    warned: bool,
    tiny_llama: Path,
    write_recipe: Any,
    tmp_path: Path,
    lora: Any,
    no_curves: None,
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    for name, keys in stops.items():
        if keys is None:
            (base / name).unlink()
        else:
            (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | keys))
    data = write_rows(tmp_path / "rows.jsonl", [chat("Hi", "Hello") if rows == "chat" else {"text": "Hello"}])
    changes = {"model.name_or_path": base, "data.train": data, "training.max_steps": 1}
    result = done(lora("train", write_recipe(changes)))
    told = (
        "warning: answers end in '<|im_end|>', where generation does not stop: add its id, 3, to eos_token_id in the "
        "model's generation_config.json"
    )
    assert (told in result.stderr) == warned and ("does not stop" in result.stderr) == warned


# BOS.


@pytest.mark.parametrize(
    ("text", "begins", "report"),
    [
        ("Hello", 1, ((1, 1), 0, 0)),
        ("<s>Hello", 1, ((1, 1), 0, 1)),
        ("<s>", 1, ((1, 1), 0, 1)),
        ("<s><s>Hello", 2, ((2, 2), 1, 1)),
        ("Hello<s>", 1, ((2, 2), 0, 0)),
    ],
)
def test_one_bos_stands_before_a_text(text: str, begins: int, report: Any, with_bos: Any) -> None:
    found, fitted = report_of(with_bos, {"text": text})
    ids, mask = fitted.examples.row(0)
    assert (found.bos_per_row, found.bos_doubled, found.bos_removed) == report
    assert ids[:begins].tolist() == [with_bos.bos_token_id] * begins
    assert with_bos.decode(ids[begins:-1]) == text.removeprefix("<s>" * begins)
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_a_pattern_that_writes_a_bos_keeps_its_prompt_unsupervised(with_bos: Any) -> None:
    patterns = {"prompt": "<s>[INST] {question} [/INST]", "completion": "{answer}"}
    report, fitted = report_of(with_bos, *[{"question": "Why?", "answer": " Because."}] * 2, template=patterns)
    ids, mask = fitted.examples.row(0)
    assert with_bos.decode(ids[~mask]) == "<s>[INST] Why? [/INST]"
    assert with_bos.decode(ids[mask]) == " Because.<|endoftext|>"
    assert report.bos_removed == 2


def test_a_template_that_writes_two_is_told(with_bos: Any) -> None:
    doubling = copy.deepcopy(with_bos)
    doubling.chat_template = "{{ bos_token }}" * 2 + CHATML
    report, _ = report_of(doubling, chat("Hi", "Hello"))
    assert (report.bos_per_row, report.bos_doubled, report.bos_removed) == ((2, 2), 1, 0)
    doubling.chat_template = "{{ bos_token }}" + CHATML
    report, _ = report_of(doubling, chat("Hi", "Hello"))
    assert (report.bos_per_row, report.bos_doubled) == ((1, 1), 0)


def test_text_that_looks_like_the_template_s_own_is_told_with_its_row(
    tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    """Not plain text, which may have been rendered by a template, nor special tokens that no template writes."""
    (tmp_path / "texts.jsonl").write_text('{"text": "<|im_start|>user\\nHi<|im_end|>"}\n' * 251)
    rows = [chat("Hi", "Hello"), chat("<|pad|>", "No."), chat("Say <|im_end|>.", "No."), chat("Hi", "Hi<|endoftext|>")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"model.name_or_path": tiny_llama, "training.max_steps": 1}
    changes |= {"data.train": [str(tmp_path / name) for name in ("texts.jsonl", "chats.jsonl")]}
    recipe = write_recipe(changes)
    for options in ((), ("--overwrite",)):
        told = " ".join(done(lora("train", recipe, *options)).stderr.split())
        assert "warning: 2 rows have '<|im_end|>' or the like in the text of a turn (first: " in told
        assert f"{tmp_path / 'chats.jsonl'}:3)" in told
    found = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert found["forged"] == {"rows": 2, "first": 253, "token": "<|im_end|>"}


def test_text_that_looks_like_a_token_that_no_turn_has_around_it_is_not_told(with_bos: Any) -> None:
    with_bos.add_tokens(["<think>"])  # which is not special
    with_bos.chat_template = "<|pad|>" + CHATML.replace("{{ m.content", "<think>{{ m.content")
    for words, told in (("<think>", 0), ("<|pad|>", 0), ("<s>", 1), ("<|endoftext|>", 1), ("<|im_end|>", 1)):
        report, _ = report_of(with_bos, chat(words, "Hello"))
        assert report.forged.rows == told, words


def test_an_end_that_is_also_the_bos_is_no_bos(tokenizer: Any) -> None:
    assert tokenizer.bos_token_id == tokenizer.eos_token_id
    report, _ = report_of(tokenizer, {"text": "Hello"}, {"text": "<|endoftext|>Hello"})
    assert (report.bos_per_row, report.bos_doubled) == ((0, 1), 0)


def test_bos_is_told_before_training(
    with_bos: Any, tiny_llama: Path, write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    with_bos.chat_template = "{{ bos_token }}" * 2 + CHATML
    with_bos.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    assert len(with_bos) <= config["vocab_size"] + 1
    with_bos_in_vocabulary(base, config)
    (tmp_path / "texts.jsonl").write_text('{"text": "<s>Hello"}\n{"text": "Hi"}\n')
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat("Hi", "Hello")) + "\n")
    changes = {"model.name_or_path": base, "data.train": [str(tmp_path / n) for n in ("texts.jsonl", "chats.jsonl")]}
    result = done(lora("train", write_recipe(changes | {"training.max_steps": 1})))
    assert "read as text+chat" in result.stderr
    assert "of 3 training rows 3 have their end supervised; 1 to 2 BOS per row" in result.stderr
    assert "warning: 1 row begins with a BOS of its own" in result.stderr
    assert "warning: 1 row begins with two BOS" in result.stderr
    assert "the chat template has no {% generation %} marks" in result.stderr
    found = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (found["bos_per_row"], found["bos_doubled"], found["bos_removed"]) == ([1, 2], 1, 1)
    again = lora("train", write_recipe(changes | {"training.max_steps": 1}), "--overwrite")
    assert "1 row begins with a BOS of its own" in again.stderr


def with_bos_in_vocabulary(base: Path, config: dict[str, Any]) -> None:
    """Add one token to the model's embedding, head and vocabulary size."""
    import torch

    with edited_weights(base) as weights:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.cat([weights[name], weights[name][:1]])
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))


# Enough to learn from.

LONG = {"question": "Who mends the nets? " * 20, "answer": " The whole family."}
SHORT = {"question": "Why?", "answer": " Because."}


@pytest.mark.parametrize(
    ("long", "short", "least", "says"),
    [
        (2, 2, 0.5, None),
        (3, 2, 0.5, "only 2 of 5 rows (40.0%)"),
        (3, 2, 0.4, None),
        (1, 19, 1, "only 19 of 20 rows (95.0%)"),
        (9, 1, 0, None),
        (4, 0, 0, "none of 4 rows"),
    ],
)
def test_too_few_rows_to_learn_from(
    long: int,
    short: int,
    least: float,
    says: str | None,
    write_recipe: Any,
    tmp_path: Path,
    lora: Any,
    no_curves: None,
) -> None:
    rows = [LONG] * long + [SHORT] * short
    write_rows(tmp_path / "rows.jsonl", rows)
    changes = {"data.train": tmp_path / "rows.jsonl", "data.max_length": 24, "data.min_supervised_rows": least}
    result = lora("train", write_recipe(changes | {"training.max_steps": 1}))
    if says is None:
        assert result.exit_code == 0, result.stderr
        assert f"{long} rows were dropped, with nothing left to learn" in result.stderr
    else:
        assert result.exit_code == 2
        assert result.stderr.startswith("error: data.train: ") and says in result.stderr
        assert "raise data.max_length, " in result.stderr
        assert not (tmp_path / "run").exists()


def test_one_of_a_kind_is_told_in_the_singular(write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [LONG, SHORT])
    changes = {"data.train": rows, "data.max_length": 24, "training.max_steps": 1}
    changes |= {"adapter.target_modules": ["h.1.attn.c_attn"], "training.warmup_steps": 0}
    result = done(lora("train", write_recipe(changes)))
    assert "; 1 step\n" in result.stderr and "warning: 1 row was dropped, with nothing left" in result.stderr
    assert result.stdout.startswith("1 step in ")
    merged = done(lora("merge", tmp_path / "run", "--out", tmp_path / "merged", "--no-verify"))
    assert "merged 1 layer into " in merged.stdout


def test_rows_too_long_for_the_model_are_told_by_its_positions(
    tokenizer: Any, write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    """The recipe asks for 1,024 tokens, the model has 128 positions. Dropped rows are reported even with --quiet."""
    wordy = {"question": "Why?", "answer": " Because they mend the nets in winter." * 20}
    rows = [LONG, wordy, SHORT, SHORT | {"question": "Who?"}, LONG | {"answer": " Nobody."}]
    write_rows(tmp_path / "rows.jsonl", rows)
    lengths = [len(tokenizer(row["question"] + row["answer"]).input_ids) + 1 for row in rows]  # +1: the end of text
    long = sum(length > 128 for length in lengths)
    assert long == 3 and max(lengths) < 1024
    changes = {"data.train": tmp_path / "rows.jsonl", "data.max_length": 1024, "training.max_steps": 1}
    result = done(lora("train", write_recipe(changes)))
    assert "data.max_length: 1024 -> 128" in result.stderr
    assert "of 5 rows 3 were cut to 128 tokens" in result.stderr
    dropped = "warning: 2 rows were dropped, with nothing left to learn"
    assert dropped in result.stderr
    found = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert [found[key] for key in ("max_length", "rows", "truncated", "dropped")] == [128, 3, 3, 2]
    assert found["tokens"] == 128 + lengths[2] + lengths[3]
    quiet = lora("train", write_recipe(changes), "--overwrite", "--quiet")
    assert quiet.stderr.splitlines() == [dropped]


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_the_share_has_bounds(value: float, write_recipe: Any, lora: Any) -> None:
    result = lora("train", write_recipe({"data.min_supervised_rows": value}))
    assert result.exit_code == 2
    assert f"data.min_supervised_rows: expected a number of at least 0 and up to 1, found the number {value}" in (
        result.stderr
    )
