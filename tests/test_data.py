"""Reading files, formats, tokens and their supervision, batches: compared with expectations written by hand."""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel, TemplateProcessing

from lora_cli.data import chat
from lora_cli.data.batches import Schedule, collate, epoch_order, split_validation
from lora_cli.data.examples import (
    Examples,
    Store,
    check_ids,
    cut_for_evaluation,
    end_to_end,
    fit,
    join_pieces,
    sliding_windows,
)
from lora_cli.data.faults import column_faults, data_faults, row_faults
from lora_cli.data.formats import FORMATS, read_content
from lora_cli.data.grouping import BATCHES_PER_POOL, MAX_OPEN_BATCHES, pack_first_fit, pack_in_order, pad_by_length
from lora_cli.data.readers import READERS, Record
from lora_cli.data.sources import Row, hub_records, read_rows, row_places, sources_of
from lora_cli.data.tokenize import tokenize
from lora_cli.data.turns import Conversation, Message
from lora_cli.errors import Fault, LoraError, UserError
from lora_cli.evaluation.loss import evaluation_groups, summed_loss
from lora_cli.recipe.schema import Data, Source, Template

QA = {"question": "Why?", "answer": " Because."}
END = "<|endoftext|>"


def columns_of(path: str | Path | tuple[Any, ...]) -> list[dict[str, Any]]:
    """The columns of every row; a fault fails the test."""
    spec = path if isinstance(path, tuple) else str(path)
    rows = list(read_rows(sources_of(spec)))
    assert all(isinstance(row, Row) for row in rows), rows
    return [dict(row.columns) for row in rows if isinstance(row, Row)]


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


# Readers.


def test_jsonl_with_blank_lines_crlf_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "\xc3\xa9\\u2028"}')
    rows = list(read_rows(sources_of(str(path))))
    assert [(row.columns, row.where) for row in rows if isinstance(row, Row)] == [
        ({"text": "a"}, f"{path}:1"),
        ({"text": "é\u2028"}, f"{path}:3"),
    ]


def test_a_json_file_is_a_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([QA, {"text": "b"}], indent=1), encoding="utf-8")
    assert columns_of(path) == [QA, {"text": "b"}]


def test_csv_quotes_line_breaks_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        '\ufeffquestion,answer\r\n"a, ""b""","one\ntwo"\r\n\r\nflat\u2028line\x0c,second\x85line\r\nlast,'.encode()
    )
    rows = list(read_rows(sources_of(str(path))))
    assert [(row.columns, row.where) for row in rows if isinstance(row, Row)] == [
        ({"question": 'a, "b"', "answer": "one\ntwo"}, f"{path}:2"),
        ({"question": "flat\u2028line\x0c", "answer": "second\x85line"}, f"{path}:5"),
        ({"question": "last", "answer": ""}, f"{path}:6"),
    ]


def test_csv_cell_longer_than_the_librarys_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'word ' * 40_000}\n", encoding="utf-8")
    assert len(columns_of(path)[0]["text"]) == 200_000


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": [{"role": "user", "content": "Hi"}], "n": 1}, {"messages": None, "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert columns_of(tmp_path / "rows.parquet") == rows


def test_parquet_fills_no_objects(tmp_path: Path) -> None:
    """Arrow gives each object of a column the keys of all, as nulls. They are removed, and so are an object's own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = [
        {"calls": [{"arguments": {"city": "Pau"}}, {"arguments": {"zone": "Z"}}], "note": None},
        {"calls": [{"arguments": {"city": None}}], "note": "x"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    rows[1]["calls"][0]["arguments"] = {}
    assert columns_of(str(tmp_path / "rows.parquet")) == rows


def test_a_paragraph_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff\n \nOnce upon\r\n  a time\r\n\t\r\n\r\nthere\u2028was\x0c\n\nA hill".encode())
    rows = list(read_rows(sources_of(str(path))))
    assert [(row.columns["text"], row.where) for row in rows if isinstance(row, Row)] == [
        ("Once upon\n  a time", f"{path}:3"),
        ("there\u2028was\x0c", f"{path}:7"),
        ("A hill", f"{path}:9"),
    ]
    path.write_text(" \n\n")
    assert [fault.what for fault in read_rows(sources_of(str(path))) if isinstance(fault, Fault)] == ["holds no rows"]


@pytest.mark.parametrize(
    ("suffix", "header", "row"),
    [(".jsonl", "", '{"text": "some words"}\n'), (".csv", "text\n", "some words\n"), (".txt", "", "some words\n\n")],
)
def test_many_rows_are_never_in_memory_together(suffix: str, header: str, row: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(header + row * 20_000)
    tracemalloc.start()
    try:
        count = sum(item.columns == {"text": "some words"} for item in read_rows(sources_of(str(path))))  # type: ignore[union-attr]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert peak < path.stat().st_size / 2


@pytest.mark.parametrize(("suffix", "header"), [(".csv", "text\n"), (".txt", "\n")])
def test_a_byte_that_is_not_utf8_is_named_by_its_line(suffix: str, header: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + header.encode() + b"good\nb\xe4d\n")
    with pytest.raises(UserError, match=r"0xe4") as raised:
        list(read_rows(sources_of(str(path))))
    assert raised.value.faults[0].where == f"{path}:3"


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_a_csv_of_another_kind_gets_a_hint(mark: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"question{mark}answer\nWhy, then?{mark}Because.\n")
    (fault,) = row_faults(Data(train=str(path)), sources_of(str(path)), set(), set())
    assert fault.where == f"{path}:1" and name in fault.what
    assert fault.hint == "save the file with commas between columns"


def test_lines_of_json_and_columns_apart_by_tabs_under_their_own_names(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text('{"text": "a, b"}\n')
    (tmp_path / "b.tsv").write_text('text\tlabel\na, b\t1\n"c\td"\t2\n')
    assert columns_of(str(tmp_path)) == [
        {"text": "a, b"},
        {"text": "a, b", "label": "1"},
        {"text": "c\td", "label": "2"},
    ]


def test_folder_glob_and_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data" / "b.jsonl", {"text": "b"})
    write_jsonl(tmp_path / "data" / "deep" / "c.jsonl", {"text": "c"})
    (tmp_path / "data" / "A.CSV").write_text("text\na\n")
    (tmp_path / "data" / "readme.md").write_text("nothing")
    write_jsonl(tmp_path / "data" / ".ipynb_checkpoints" / "b.jsonl", {"text": "an older b"})
    assert columns_of("data") == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    assert columns_of("data/*.jsonl") == [{"text": "b"}]
    assert columns_of("data/**/*.jsonl") == [{"text": "b"}, {"text": "c"}]
    assert columns_of("data/**/**/*.jsonl") == [{"text": "b"}, {"text": "c"}]
    mixture = ("data/b.jsonl", Source(path="data/A.CSV", weight=2.0), "data/deep")
    rows = [row for row in read_rows(sources_of(mixture)) if isinstance(row, Row)]
    assert [(row.columns["text"], row.source) for row in rows] == [("b", 0), ("a", 1), ("c", 2)]
    assert [source.weight for source in sources_of(mixture)] == [1.0, 2.0, 1.0]


def test_a_folder_has_what_its_links_lead_to_and_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "data" / "a.jsonl", {"text": "a"})
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", {"text": "b"})
    write_jsonl(tmp_path / "data" / "part-0.gz.jsonl", {"text": "c"})
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert columns_of("data") == [{"text": "a"}, {"text": "b"}, {"text": "c"}]
    assert columns_of("data/**/*.jsonl") == [{"text": "a"}, {"text": "b"}, {"text": "c"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", '{"text": "ä"}\n\n{"text": "b"}\n'),
        ("a.json.gz", '[{"text": "ä"}, {"text": "b"}]'),
        ("a.CSV.GZ", "text\nä\nb\n"),
        ("a.txt.gz", "ä\n\nb\n"),
    ],
)
def test_a_compressed_file_has_the_rows_of_the_plain_one(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    assert columns_of(str(tmp_path / name)) == columns_of(str(tmp_path)) == [{"text": "ä"}, {"text": "b"}]


def test_hub_rows_take_the_split_and_name_the_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", {"text": "a"}, {"text": "b"})
    write_jsonl(tmp_path / "set" / "test.jsonl", {"text": "c"})
    rows = list(hub_records(Source(path=str(tmp_path / "set"))))
    assert [(where.removeprefix(str(tmp_path)), columns) for where, columns in rows] == [
        ("/set[train] (row 1)", {"text": "a"}),
        ("/set[train] (row 2)", {"text": "b"}),
    ]
    assert row_places([Source(path="owner/set", split="test")], [(0, 1)]) == ["owner/set[test] (row 2)"]
    with pytest.raises(UserError, match="nosuch"):
        list(hub_records(Source(path=str(tmp_path / "set"), split="nosuch")))


def test_the_configuration_of_a_data_set_is_chosen_by_its_name(tmp_path: Path) -> None:
    for name in ("main", "socratic"):
        write_jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("main", "socratic")]
    (tmp_path / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\n")
    with pytest.raises(UserError, match=r"available configs: \['main', 'socratic'\]") as caught:
        list(hub_records(Source(path=str(tmp_path))))
    assert f"choose one in data.train: [{{path: {tmp_path}, name: ...}}]" in str(caught.value)
    for name in ("main", "socratic"):
        assert [columns for _, columns in hub_records(Source(path=str(tmp_path), name=name))] == [{"text": name}]


def test_a_folder_is_read_whole_unless_it_holds_two_splits(tmp_path: Path) -> None:
    for name in ("latest.jsonl", "training-1.jsonl", "train_and_test.jsonl", "devices.jsonl"):
        write_jsonl(tmp_path / name, {"text": name})
    assert len(columns_of(str(tmp_path))) == 4
    write_jsonl(tmp_path / "VAL.jsonl", {"text": "held out"})
    with pytest.raises(UserError, match="holds several splits"):
        columns_of(str(tmp_path))
    assert len(columns_of(f"{tmp_path}/*.jsonl")) == 5


def test_hub_rows_that_stream_leave_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "set" / "train.jsonl", *({"text": f"row {number}"} for number in range(30)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "copies")

    def rows(streaming: bool) -> list[Record]:
        return list(hub_records(Source(path=str(tmp_path / "set"), streaming=streaming)))

    streamed = rows(True)
    assert not any((tmp_path / "copies").rglob("*.arrow"))
    assert streamed == rows(False)
    assert len(streamed) == 30 and any((tmp_path / "copies").rglob("*.arrow"))
    with pytest.raises(UserError, match="nosuch"):
        list(hub_records(Source(path=str(tmp_path / "set"), split="nosuch", streaming=True)))


ANY_BYTES = st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "replace"))
JSONISH = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)
ANY_FILE = ANY_BYTES | JSONISH.map(lambda value: json.dumps(value).encode())


@pytest.mark.parametrize("suffix", sorted(READERS))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=ANY_FILE)
def test_any_bytes_are_rows_or_told(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    try:
        for item in read_rows(sources_of(str(path))):
            assert isinstance(item, Row | Fault)
            if isinstance(item, Fault):
                assert item.where
    except UserError as error:
        assert all(fault.where for fault in error.faults)
    row_faults(Data(train=str(path)), sources_of(str(path)), set(), set())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.text("a\n\r,\"'\u2028"))))
def test_csv_reads_what_python_writes(rows: list[tuple[str, str]], tmp_path: Path) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *rows])
    (tmp_path / "rows.csv").write_bytes(text.getvalue().encode())
    found = [dict(row.columns) for row in read_rows(sources_of(str(tmp_path / "rows.csv"))) if isinstance(row, Row)]
    assert found == [{"a": a, "b": b} for a, b in rows]


# Formats.

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TEXT = {"type": "text", "text": "Hi"}
TURNS = (Message("user", "Hi"), Message("assistant", "Hello"))
GIVEN = (TURNS[0], Message("assistant", "Hello", learned=False))


@pytest.mark.parametrize(
    ("columns", "data", "content"),
    [
        ({"text": "a"}, {}, (("a", True),)),
        ({"prompt": "a", "completion": "b"}, {}, (("a", False), ("b", True))),
        (QA, {}, (("Why?", False), (" Because.", True))),
        ({"q": "a", "a": "b"}, {"columns": {"prompt": "q", "completion": "a"}}, (("a", False), ("b", True))),
        (
            {"instruction": "Add", "input": "1 1", "output": "2"},
            {},
            (("### Instruction:\nAdd\n\n### Input:\n1 1\n\n### Response:\n", False), ("2", True)),
        ),
        (
            {"instruction": "Add", "input": "", "output": "2"},
            {},
            (("### Instruction:\nAdd\n\n### Response:\n", False), ("2", True)),
        ),
        (
            {"instruction": "Add", "output": "2"},
            {},
            (("### Instruction:\nAdd\n\n### Response:\n", False), ("2", True)),
        ),
        (
            {"instruction": "Add", "input": None, "output": "2"},
            {},
            (("### Instruction:\nAdd\n\n### Response:\n", False), ("2", True)),
        ),
        (
            {"instruction": "Add", "system": "1 1", "output": "2"},
            {"columns": {"input": "system"}},
            (("### Instruction:\nAdd\n\n### Input:\n1 1\n\n### Response:\n", False), ("2", True)),
        ),
        ({"messages": HI}, {}, Conversation(TURNS)),
        ({"system": None, "messages": HI}, {}, Conversation(TURNS)),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            {},
            Conversation(TURNS),
        ),
        ({"system": "Be kind", "messages": HI}, {}, Conversation((Message("system", "Be kind"), *TURNS))),
        ({"system": "", "messages": HI}, {}, Conversation(TURNS)),
        ({"messages": json.dumps(HI)}, {}, Conversation(TURNS)),
        ({"messages": " " + json.dumps(HI)}, {}, Conversation(TURNS)),
        (
            {"messages": [HI[0] | {"content": [TEXT, TEXT]}, HI[1]]},
            {},
            Conversation((Message("user", "HiHi"), TURNS[1])),
        ),
        ({"prompt": HI[:1], "completion": HI[1:]}, {}, Conversation(TURNS)),
        ({"prompt": HI[:1], "completion": "Hello"}, {}, Conversation(TURNS)),
        ({"prompt": HI * 2, "completion": HI[1:]}, {}, Conversation((*GIVEN, *GIVEN, TURNS[1]))),
        (
            {"messages": [HI[0], HI[1] | {"weight": 0, "train": None}, HI[0], HI[1] | {"weight": 1}]},
            {},
            Conversation((*GIVEN, *TURNS)),
        ),
        ({"talk": HI}, {"columns": {"messages": "talk"}}, Conversation(TURNS)),
        ({"question": "Hi", "answer": "Hello"}, {"format": "chat"}, Conversation(TURNS)),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, {"format": "chat"}, Conversation(TURNS)),
        (
            {"instruction": "Add", "context": "1 1", "response": "2", "system": "Be kind"},
            {"format": "chat", "columns": {"input": "context", "output": "response"}},
            Conversation((Message("system", "Be kind"), Message("user", "Add\n1 1"), Message("assistant", "2"))),
        ),
        (
            {"instruction": "a", "output": "b"},
            {"columns": {"prompt": "instruction", "completion": "output"}},
            (("a", False), ("b", True)),
        ),
        (QA | {"body": "a"}, {"columns": {"text": "body"}}, (("a", True),)),
        (
            {"a": "x", "b": "{c}"},
            {"template": Template(prompt="{{{a}}} {a}: ", completion="{b}")},
            (("{x} x: ", False), ("{c}", True)),
        ),
    ],
)
def test_each_format_is_detected_and_read(columns: dict[str, Any], data: dict[str, Any], content: Any) -> None:
    from lora_cli.data.formats import detect_format

    settings = Data(train="rows.jsonl", **data)
    row = Row(columns, "rows.jsonl:1")
    name = detect_format(row, settings) if settings.format == "auto" else settings.format
    assert read_content(row, name, settings) == content


def test_formats_are_the_schemas_choices() -> None:
    from typing import get_args

    assert set(FORMATS) | {"auto"} == set(get_args(Data.model_fields["format"].annotation))


@pytest.mark.parametrize(
    ("settings", "name", "says"),
    [
        ({"columns": {"prmpt": "q"}}, "prmpt", "did you mean 'prompt'?"),
        ({"format": "alpaca", "columns": {"outputs": "a"}}, "outputs", "did you mean 'output'?"),
        ({"format": "alpaca", "columns": {"prompt": "a"}}, "prompt", "known: input, instruction, output"),
        ({"format": "chat", "columns": {"message": "talk"}}, "message", "did you mean 'messages'?"),
        ({"template": {"completion": "{answer}"}, "columns": {"anser": "a"}}, "anser", "did you mean 'answer'?"),
        ({"template": {"completion": "x"}, "columns": {"text": "a"}}, "text", None),
    ],
)
def test_unknown_names_of_columns_are_told(
    settings: dict[str, Any], name: str, says: str | None, write_recipe: Any, lora: Any
) -> None:
    assert [(fault.where, fault.hint) for fault in column_faults(Data.model_validate({"train": "x", **settings}))] == [
        (f"data.columns.{name}", says)
    ]
    refused = lora("train", write_recipe({"data": settings}))
    assert refused.exit_code == 2
    assert f"data.columns.{name}: " in refused.stderr


COLUMNS_OF: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "T"}],
    "prompt_completion": [{"prompt": "P", "completion": "C"}],
    "alpaca": [{"instruction": "I", "input": "N", "output": "O"}],
    "chat": [
        {"messages": HI, "system": "S", "tools": [{"name": "clock"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": "P", "completion": "C"},
        {"instruction": "I", "input": "N", "output": "O"},
    ],
}


@pytest.mark.parametrize("name", COLUMNS_OF)
def test_every_name_of_a_format_can_be_mapped(name: str) -> None:
    assert set().union(*COLUMNS_OF[name]) == set(FORMATS[name].names)
    for columns in COLUMNS_OF[name]:
        plain = read_content(Row(columns, "x:1"), name, Data(train="x", format=name))
        for key, value in columns.items():
            data = Data(train="x", format=name, columns={key: "mine"})
            renamed = {column: "other" if column == key else inner for column, inner in columns.items()} | {
                "mine": value
            }
            assert read_content(Row(renamed, "x:1"), name, data) == plain
            assert column_faults(data) == column_faults(data.model_copy(update={"format": "auto"})) == []


def test_names_of_a_broken_pattern_are_not_called_unknown() -> None:
    broken = Data(train="x", template=Template(prompt="{asked", completion="{answer}"), columns={"asked": "question"})
    assert [fault.where for fault in data_faults(broken, set())] == ["data.template.prompt", "x"]


def test_the_fields_of_patterns_can_be_mapped() -> None:
    data = Data(train="x", template=Template(completion="{answer}"), columns={"answer": "a"})
    assert column_faults(data) == []
    assert read_content(Row({"a": "A"}, "x:1"), "template", data) == (("", False), ("A", True))


def test_each_source_of_a_mixture_has_its_own_format(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", QA, QA)
    write_jsonl(tmp_path / "b.jsonl", {"messages": HI})
    write_jsonl(tmp_path / "c.jsonl", {"text": "a"}, {"text": "b"})
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHATML
    data = Data(train=tuple(str(tmp_path / f"{name}.jsonl") for name in "abc"))
    assert row_faults(data, sources_of(data.train), set(), set()) == []
    examples = tokenize(data, sources_of(data.train), chatty)
    assert examples.format == "prompt_completion+chat+text"
    assert examples.source.tolist() == [0, 0, 1, 2, 2]
    texts = [tokenizer.decode(examples.row(index)[0]) for index in range(5)]
    chat_text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert texts == [f"Why? Because.{END}"] * 2 + [chat_text, f"a{END}", f"b{END}"]
    assert supervised_text(chatty, examples, 2) == ["Hello<|im_end|>"]
    assert supervised_text(chatty, examples, 0) == [f" Because.{END}"]


def test_a_source_of_no_known_format_is_told_once_and_the_others_are_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"x": 1}, {"x": 2})
    write_jsonl(tmp_path / "b.jsonl", QA, {"question": "Why?", "answer": 3})
    data = Data(train=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))
    faults = row_faults(data, sources_of(data.train), set(), set())
    assert [fault.where for fault in faults] == [f"{tmp_path / 'a.jsonl'}:1", f"{tmp_path / 'b.jsonl'}:2"]


def test_windows_are_for_text_alone(tokenizer: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", {"text": "Rivers carry salt from the rocks down to it. " * 9})
    write_jsonl(tmp_path / "b.jsonl", QA)
    texts, others = (str(tmp_path / name) for name in ("a.jsonl", "b.jsonl"))
    text, other, both = (
        cut_for_evaluation(tokenize(Data(train=train), sources_of(train), tokenizer), 8, "rows")
        for train in (texts, others, (others, texts, others))
    )
    assert len(text) > 5 and len(other) == 1 and len(both) == len(text) + 2
    assert both.supervised_per_row.sum() == text.supervised_per_row.sum() + 2 * other.supervised_per_row.sum()
    for index, (part, row) in enumerate([(other, 0), *((text, row) for row in range(len(text))), (other, 0)]):
        assert all(np.array_equal(*pair) for pair in zip(both.row(index), part.row(row), strict=True))
    assert both.format == "prompt_completion+text"


def test_a_system_turn_that_is_there_wins_over_the_column() -> None:
    turns = [{"role": "system", "content": "Mine"}, *HI]
    content = read_content(Row({"system": "Yours", "messages": turns}, "x:1"), "chat", Data(train="x"))
    assert content == Conversation((Message("system", "Mine"), *TURNS))


# Tokens.


def examples_of(tokenizer: Any, folder: Path, *rows: dict[str, Any], **data: Any) -> Examples:
    path = write_jsonl(folder / "rows.jsonl", *rows)
    settings = Data(train=str(path), **data)
    return tokenize(settings, sources_of(settings.train), tokenizer)


def supervised_text(tokenizer: Any, examples: Examples, index: int = 0) -> list[str]:
    """The text of every run of supervised tokens in a row."""
    ids, mask = examples.row(index)
    runs, run = [], []
    for token, wanted in zip([*ids.tolist(), 0], [*mask.tolist(), False], strict=True):
        if wanted:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run, clean_up_tokenization_spaces=False))
            run = []
    return runs


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Why?", " Because."),
        ("Why? ", "Because."),
        ("Why?\n\n", "\nBecause."),
        ("Why?  ", "  Because.  "),
        ("the light", "house keeper"),
        ("", "Because."),
        ("Käse 🧀 ", "🧀🧀 naïve"),
    ],
)
@pytest.mark.parametrize("trimmed", [False, True])
def test_ids_are_those_of_the_joint_text(
    prompt: str, completion: str, trimmed: bool, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=trimmed)  # offsets with or without white space
    examples = examples_of(tokenizer, tmp_path, {"prompt": prompt, "completion": completion})
    ids, mask = examples.row(0)
    joint = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [*joint, tokenizer.eos_token_id]
    ends = np.cumsum([len(token) for token in tokenizer.convert_ids_to_tokens(joint)])  # each letter stands for a byte
    first = max(1, int((ends > len(prompt.encode())).argmax()))
    assert mask.tolist() == [False] * first + [True] * (len(ids) - first)


def test_the_border_token_that_spans_prompt_and_completion_is_supervised(tokenizer: Any, tmp_path: Path) -> None:
    word = "mends"
    assert tokenizer.tokenize(f"Q: {word}")[-1].startswith("Ġ"), "the tokenizer has no token across the border"
    examples = examples_of(tokenizer, tmp_path, {"prompt": "Q: ", "completion": word})
    assert supervised_text(tokenizer, examples) == [f" {word}{END}"]


@pytest.mark.parametrize("emoji", ["🧀", "👩‍👩‍👧", "é", "漢字"])
def test_characters_of_many_bytes_are_supervised_whole(emoji: str, tokenizer: Any, tmp_path: Path) -> None:
    examples = examples_of(tokenizer, tmp_path, {"prompt": "Q:", "completion": emoji})
    assert supervised_text(tokenizer, examples) == [emoji + END]
    ids, mask = examples.row(0)
    assert tokenizer.decode(ids[~mask]) == "Q:"


def test_one_end_of_text_closes_each_row_and_is_supervised(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": f"b{END}"}, {"text": "Who mends the nets?"}]
    examples = examples_of(tokenizer, tmp_path, *rows)
    for index in range(len(rows)):
        ids, mask = examples.row(index)
        assert (ids == tokenizer.eos_token_id).tolist() == [False] * (len(ids) - 1) + [True]
        assert mask.tolist() == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "Why?", "completion": " So"}])
def test_an_end_of_text_that_the_tokenizer_puts_there_is_supervised(
    row: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    """The tokenizer's own end of text covers no character, as with add_eos_token in tokenizer_config.json."""
    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    plain, closed = (examples_of(each, tmp_path, row).row(0) for each in (tokenizer, closing))
    assert closing("a").input_ids[-1] == tokenizer.eos_token_id
    assert closed[0].tolist() == plain[0].tolist()
    assert closed[1].tolist() == plain[1].tolist() and closed[1][-1]


@pytest.mark.parametrize("format", ["text", "prompt_completion", "alpaca", "template", "chat"])
def test_a_bos_stands_once(format: str, with_bos: Any, tmp_path: Path) -> None:
    rows = {
        "text": {"text": "Hello there"},
        "prompt_completion": QA,
        "alpaca": {"instruction": "Go", "output": "Gone"},
        "template": QA,
        "chat": {"messages": HI},
    }
    extra = {"template": Template(prompt="{question}", completion="{answer}")} if format == "template" else {}
    chatty = copy.deepcopy(with_bos)
    chatty.chat_template = "{{ bos_token }}" + CHATML
    examples = examples_of(chatty, tmp_path, rows[format], format=format, **extra)
    ids, mask = examples.row(0)
    assert (ids == chatty.bos_token_id).tolist() == [True] + [False] * (len(ids) - 1)
    assert not mask[0]


def test_train_on_all(tokenizer: Any, tmp_path: Path) -> None:
    examples = examples_of(tokenizer, tmp_path, QA, train_on="all")
    ids, mask = examples.row(0)
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_fingerprint_tells_apart_where_rows_begin_and_which_source_they_are_of() -> None:
    def fingerprint(*lengths: int, last: int = 0) -> str:
        sources = [*(0 for _ in lengths[1:]), last]
        rows = [
            (np.zeros(n, np.int32), np.zeros(n, np.bool_), source) for n, source in zip(lengths, sources, strict=True)
        ]
        return join_pieces(rows, ("text", "text")).fingerprint

    assert len({fingerprint(1, 3), fingerprint(2, 2), fingerprint(2, 2, last=1)}) == 3


def test_a_row_of_just_max_length_is_not_cut(tokenizer: Any, tmp_path: Path) -> None:
    examples = examples_of(tokenizer, tmp_path, QA)
    length = int(examples.lengths[0])
    assert [fit(examples, most, "rows").truncated for most in (length, length - 1)] == [0, 1]


def test_an_id_of_the_vocabularys_size_is_beyond_it(tokenizer: Any, tmp_path: Path) -> None:
    examples = examples_of(tokenizer, tmp_path, QA)
    highest = int(examples.flat().ids.max())
    check_ids(examples, highest + 1, "base")
    with pytest.raises(UserError):
        check_ids(examples, highest, "base")


def test_fingerprint_tells_supervision_apart(tokenizer: Any, tmp_path: Path) -> None:
    one, same = (examples_of(tokenizer, tmp_path, QA).fingerprint for _ in range(2))
    assert one == same
    assert one != examples_of(tokenizer, tmp_path, QA, train_on="all").fingerprint


def test_truncation_keeps_the_beginning_and_counts(tokenizer: Any, tmp_path: Path) -> None:
    long = {"question": "Who mends the nets? " * 9, "answer": " The whole family."}
    half = {"question": "Why?", "answer": " Rivers carry salt down to it" * 9}
    examples = examples_of(tokenizer, tmp_path, QA, long, half)
    fitted = fit(examples, 20, "rows")
    assert (fitted.rows, fitted.truncated, fitted.dropped) == (3, 2, 1)
    assert len(fitted.examples) == 2
    for index, original in ((0, 0), (1, 2)):
        ids, mask = fitted.examples.row(index)
        whole, wanted = examples.row(original)
        assert ids.tolist() == whole[:20].tolist() and mask.tolist() == wanted[:20].tolist()
    assert fitted.examples.row(1)[0][-1] != tokenizer.eos_token_id
    assert fit(examples, 10_000, "rows").examples is examples


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=6), min_size=1, max_size=8),
    max_length=st.integers(1, 7),
    chosen=st.lists(st.integers(0, 7), max_size=9),
)
def test_fit_and_select_agree_with_lists(
    rows: list[list[tuple[int, bool]]], max_length: int, chosen: list[int]
) -> None:
    def lists(examples: Examples) -> list[tuple[list[tuple[int, bool]], int]]:
        pairs = (examples.row(index) for index in range(len(examples)))
        return [
            (list(zip(ids.tolist(), mask.tolist(), strict=True)), source)
            for (ids, mask), source in zip(pairs, examples.source.tolist(), strict=True)
        ]

    pieces = [
        (np.asarray([i for i, _ in r], np.int32), np.asarray([m for _, m in r], np.bool_), n)
        for n, r in enumerate(rows)
    ]
    examples = join_pieces(pieces, ("text",))
    picked = [index for index in chosen if index < len(rows)]
    assert lists(examples.select(picked)) == [(rows[index], index) for index in picked]
    wanted = [(row[:max_length], n) for n, row in enumerate(rows) if any(m for _, m in row[:max_length])]
    if wanted:
        assert lists(fit(examples, max_length, "rows").examples) == wanted
    else:
        with pytest.raises(UserError, match="nothing to learn"):
            fit(examples, max_length, "rows")


@pytest.mark.parametrize("max_length", [2, 3, 7, 16, 1000])
def test_windows_score_each_token_once_with_context(max_length: int, tokenizer: Any, tmp_path: Path) -> None:
    texts = ["Rivers carry salt from the rocks down to it. " * 5, "So.", "x"]
    examples = examples_of(tokenizer, tmp_path, *({"text": text} for text in texts))
    windows = sliding_windows(examples, max_length)
    assert windows.supervised_per_row.sum() == examples.supervised_per_row.sum()
    scored = [ids[mask].tolist() for ids, mask in map(windows.row, range(len(windows)))]
    wanted = [ids[mask].tolist() for ids, mask in map(examples.row, range(len(examples)))]
    assert flat(scored) == flat(wanted)
    for ids, mask in map(windows.row, range(len(windows))):
        assert 2 <= len(ids) <= max_length
        if max_length > 3 and int(mask.argmax()) > 1:  # not a row's first window
            assert int(mask.argmax()) >= max_length // 2


# Conversations.

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}<|begin|>{% endif %}"
    "<|start_header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ (first if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # puts the system text into the last user turn; has no generation prompt
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}<s>"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {{ (system if loop.index >= loop.length - 1 else '') + m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
QWEN3 = (  # keeps reasoning only in turns after the last question
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"  # noqa: E501
    "<|im_start|>assistant\n{% if loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"

SYSTEM = ("system", "Answer yes or no.")
TALK = (("user", "Is it yes or no?"), ("assistant", "yes"), ("user", "Sure? Say yes or model."), ("assistant", "no 🧀"))
THINKING = (
    ("user", "One?"),
    ("assistant", "<think>\nsmall\n</think>\n\nOne."),
    ("user", "Two?"),
    ("assistant", "<think>\nlarger\n</think>\n\nTwo."),
)


@pytest.mark.parametrize(
    ("template", "turns", "learned"),
    [
        (CHATML, (SYSTEM, *TALK), ["yes<|im_end|>", "no 🧀<|im_end|>"]),
        (CHATML, (*TALK, ("user", "Bye")), ["yes<|im_end|>", "no 🧀<|im_end|>"]),
        (CHATML, (TALK[0], ("assistant", "yes"), ("assistant", "yes")), ["yes<|im_end|>", "yes<|im_end|>"]),
        (CHATML, (TALK[0], ("tool", "yes"), ("assistant", " yes\n")), [" yes\n<|im_end|>"]),
        (CHATML, (("assistant", "yes"), ("user", "yes"), ("assistant", "yes")), None),
        (LLAMA3, (SYSTEM, *TALK), ["yes<|eot_id|>", "no 🧀<|eot_id|>"]),
        (GEMMA, (SYSTEM, *TALK), ["yes<end_of_turn>", "no 🧀<end_of_turn>"]),
        (GEMMA, TALK, ["yes<end_of_turn>", "no 🧀<end_of_turn>"]),
        (MISTRAL, TALK, [" yes</s>", " no 🧀</s>"]),
        (MISTRAL, (SYSTEM, *TALK), ["yes</s>", " no 🧀</s>"]),
        (QWEN3, THINKING, ["One.<|im_end|>", "<think>\nlarger\n</think>\n\nTwo.<|im_end|>"]),
        (QWEN3, THINKING[2:], ["<think>\nlarger\n</think>\n\nTwo.<|im_end|>"]),
        (QWEN3, (SYSTEM, *TALK), ["yes<|im_end|>", "<think>\n\n</think>\n\nno 🧀<|im_end|>"]),
        (PLAIN, TALK[:2], ["yes\n" + END]),
        (CHATML, (TALK[0], ("assistant", "")), ["<|im_end|>"]),
        (QWEN3, (TALK[0], ("assistant", "")), ["<think>\n\n</think>\n\n<|im_end|>"]),
    ],
)
def test_the_assistant_alone_is_supervised(
    template: str, turns: tuple[tuple[str, str], ...], learned: list[str] | None, tokenizer: Any, tmp_path: Path
) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    chatty.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "</s>"]})
    messages = [{"role": role, "content": content} for role, content in turns]
    examples = examples_of(chatty, tmp_path, {"messages": messages})
    text = chatty.apply_chat_template(messages, tokenize=False)
    assert examples.row(0)[0].tolist() == chatty(text, add_special_tokens=False)["input_ids"]
    if learned is None:  # the assistant begins: whether its first header is supervised is not tested
        assert [run[-13:] for run in supervised_text(chatty, examples)] == ["yes<|im_end|>"] * 2
    else:
        assert supervised_text(chatty, examples) == learned


def test_generation_marks_agree(tokenizer: Any, tmp_path: Path) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [{"role": role, "content": content} for role, content in (SYSTEM, *TALK)]
    marked = chatty.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = examples_of(chatty, tmp_path, {"messages": messages}).row(0)
    assert ids.tolist() == list(marked["input_ids"])
    assert mask.tolist() == [bool(one) for one in marked["assistant_masks"]]


def test_generation_marks_are_found_within_the_limits_of_a_rendering(tokenizer: Any) -> None:
    chatty = copy.deepcopy(tokenizer)
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    chatty.chat_template = "{% if date_string is not defined %}{{ 1 / 0 }}{% endif %}" + marked
    assert chat.generation_marked_text(chatty) == chat.PROBE * 2
    chatty.chat_template = "{% for a in range(99999) %}{% for b in range(999) %}{% endfor %}{% endfor %}" + marked
    with pytest.raises(UserError, match="takes more than 1 s"):
        chat.generation_marked_text(chatty)


def test_generation_marks_are_found_where_the_tokenizer_starts_many_threads(tiny_gpt2: Path) -> None:
    """One for each core, when it is first called."""
    script = (
        "import sys\n"
        "from transformers import AutoTokenizer\n"
        "from lora_cli.data import chat\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "marked = '{% generation %}{{ m.content }}{% endgeneration %}'\n"
        "tokenizer.chat_template = '{% for m in messages %}' + marked + '{% endfor %}'\n"
        "assert chat.generation_marked_text(tokenizer) == chat.PROBE * 2\n"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "300", "TOKENIZERS_PARALLELISM": "true"}
    subprocess.run([sys.executable, "-c", script, str(tiny_gpt2)], env=environment, check=True)


def test_train_on_all_of_a_conversation(tokenizer: Any, tmp_path: Path) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHATML
    _, mask = examples_of(chatty, tmp_path, {"messages": HI}, train_on="all").row(0)
    assert mask[1:].all() and not mask[0]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}|{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.role }}:{{ m.content | upper }};{% endfor %}",
    ],
    ids=["leaves-out", "rewrites"],
)
def test_a_template_that_loses_the_assistants_words_is_refused(template: str, tokenizer: Any, tmp_path: Path) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    with pytest.raises(UserError, match=r"leaves out|rewrites"):
        examples_of(chatty, tmp_path, {"messages": HI})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(st.text(st.sampled_from("yes no\n<|im_end>assistantuser🧀"), max_size=12), min_size=2, max_size=6),
    template=st.sampled_from([CHATML, LLAMA3, GEMMA, MISTRAL, QWEN3]),
)
def test_any_conversation_is_read_or_told(words: list[str], template: str, tokenizer: Any, tmp_path: Path) -> None:
    chatty = copy.copy(tokenizer)
    chatty.chat_template = template
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(words)]
    try:
        examples = examples_of(chatty, tmp_path, {"messages": messages})
    except UserError:
        return
    ids, mask = examples.row(0)
    assert ids.tolist() == chatty(chatty.apply_chat_template(messages, tokenize=False))["input_ids"]
    assert mask.any()


# Batches.

LENGTHS = np.asarray([3, 9, 10, 1, 1, 1, 5, 5, 2, 10], np.int64)


def schedule(**changes: Any) -> Schedule:
    plain: dict[str, Any] = {
        "lengths": LENGTHS,
        "supervised": LENGTHS - 1,
        "source": np.zeros(len(LENGTHS), np.int32),
        "weights": (1.0,),
        "seed": 7,
        "shuffle": True,
        "batch_size": 2,
        "max_length": 10,
        "packing": True,
        "accumulation": 2,
    }
    return Schedule(**(plain | changes))


def rows_of(batches: list[Any]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def shuffled(lengths: list[int]) -> tuple[Any, Any]:
    return np.random.default_rng(0).permutation(len(lengths)), np.asarray(lengths, np.int64)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=200), budget=st.integers(16, 64))
@example(lengths=[*[9] * 40, 1], budget=16)  # would leave more batches open than allowed
def test_whole_rows_are_packed(lengths: list[int], budget: int) -> None:
    order, sizes = shuffled(lengths)
    in_order = [lengths[row] for row in order]
    first, following = pack_first_fit(order, sizes, budget), pack_in_order(order, sizes, budget)
    wanted = reference.first_fit(in_order, budget, MAX_OPEN_BATCHES)
    assert rows_of(first) == [order[batch].tolist() for batch in wanted]
    assert rows_of(following) == [order[batch].tolist() for batch in reference.next_fit(in_order, budget)]
    assert max(sizes[batch].sum() for batch in (*first, *following)) <= budget
    assert len(first) <= len(following)


def test_first_fit_fills_batches_and_keeps_rows_near_their_place() -> None:
    draw = np.random.default_rng(5)
    sizes = np.minimum(np.exp(draw.normal(5, 0.8, 20_000)).astype(np.int64) + 1, 512)
    order = draw.permutation(len(sizes))
    full = [sizes.sum() / 2048 / len(pack(order, sizes, 2048)) for pack in (pack_first_fit, pack_in_order)]
    assert full[0] > 0.985 and full[1] < 0.95
    batches = pack_first_fit(order, sizes, 2048)
    place = np.argsort(np.concatenate(batches))[order]  # the position in the batches of each row of ``order``
    assert np.abs(place - np.arange(len(order))).max() < 3 * MAX_OPEN_BATCHES * len(order) / len(batches)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 99), min_size=1, max_size=400), batch_size=st.integers(1, 4))
def test_rows_of_like_length_are_padded_together(lengths: list[int], batch_size: int) -> None:
    order, sizes = shuffled(lengths)
    batches = pad_by_length(order, sizes, batch_size, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == sorted(order)
    assert sizes[batches[0]].max() == max(lengths)
    pool = BATCHES_PER_POOL * batch_size
    for start in range(0, len(order), pool):
        sorted_rows = sorted(order[start : start + pool].tolist(), key=lambda row: -lengths[row])
        for at in range(0, len(sorted_rows), batch_size):
            assert sorted_rows[at : at + batch_size] in rows_of(batches)
    again, other = (pad_by_length(order, sizes, batch_size, np.random.default_rng(seed)) for seed in (1, 2))
    assert rows_of(again) == rows_of(batches)
    assert len(batches) < 8 or rows_of(other) != rows_of(batches)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60), packing=st.booleans())
def test_evaluation_takes_each_row_once(lengths: list[int], packing: bool) -> None:
    sizes = np.asarray(lengths, np.int64)
    total = int(sizes.sum())
    ids, mask = np.zeros(total, np.int32), np.ones(total, np.bool_)
    source = np.zeros(len(sizes), np.int32)
    examples = end_to_end(Store(ids, mask), np.concatenate(([0], sizes.cumsum())), source, ("text",))
    batches = evaluation_groups(examples, 3, 16, packing, ())
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    if packing:
        assert max(sizes[batch].sum() for batch in batches) <= 3 * 16
    else:
        assert [length for batch in batches for length in sizes[batch]] == sorted(lengths, reverse=True)


def test_every_row_once_an_epoch_in_an_order_of_its_own() -> None:
    orders = [np.concatenate(schedule().epoch_batches(epoch)).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(len(LENGTHS))) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert orders == [np.concatenate(schedule().epoch_batches(epoch)).tolist() for epoch in range(3)]
    assert orders[0] != np.concatenate(schedule(seed=8).epoch_batches(0)).tolist()


def test_without_shuffle_the_files_order_stays() -> None:
    for epoch in range(2):
        assert np.concatenate(schedule(shuffle=False).epoch_batches(epoch)).tolist() == list(range(len(LENGTHS)))


@pytest.mark.parametrize("packing", [True, False])
def test_rows_beyond_a_bound_are_not_all_at_the_beginning(packing: bool) -> None:
    """One of their batches comes first, since it takes the most memory."""
    bounded = schedule(packing=packing, bounds=(4,))
    drawn = [[bool(LENGTHS[rows].max() > 4) for rows in bounded.epoch_batches(epoch)] for epoch in range(6)]
    assert all(sides[0] for sides in drawn)
    assert any(sides != sorted(sides, reverse=True) for sides in drawn)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_batch_has_rows_on_both_sides_of_a_bound(packing: bool, shuffle: bool) -> None:
    batches = schedule(packing=packing, shuffle=shuffle, bounds=(9, 4)).epoch_batches(0)
    assert all(len({sum(length > bound for bound in (4, 9)) for length in LENGTHS[rows]}) == 1 for rows in batches)
    order = np.concatenate(batches).tolist()
    assert sorted(order) == list(range(len(LENGTHS))) and (shuffle or order == sorted(order))


@pytest.mark.parametrize("shuffle", [True, False])
def test_weights_repeat_and_thin_out(shuffle: bool) -> None:
    source = np.asarray([0] * 10 + [1] * 10 + [2] * 10, np.int32)
    weights = (1.0, 0.3, 2.8)  # in floating point, 10 x (2.8 - 2) is less than 8
    order = epoch_order(source, weights, 1, 0, shuffle)
    counts = Counter(order.tolist())
    assert all(counts[row] == 1 for row in range(10))
    assert sorted(counts[row] for row in range(10, 20)) == [0] * 7 + [1] * 3
    assert sorted(counts[row] for row in range(20, 30)) == [2, 2] + [3] * 8
    if not shuffle:
        assert order.tolist() == [*range(13), *range(20, 30), *range(20, 30), *range(20, 28)]
    else:
        thinned = {tuple(sorted(set(epoch_order(source, weights, 1, epoch, True)))) for epoch in range(6)}
        assert len(thinned) > 1


@pytest.mark.parametrize("packing", [True, False])
def test_steps_are_found_again_from_any_number(packing: bool) -> None:
    lengths = np.random.default_rng(4).integers(3, 8, 300)  # packed, an epoch has 79 or 80 batches
    changes = {"lengths": lengths, "supervised": lengths, "source": np.zeros(300, np.int32), "packing": packing}
    changes["accumulation"] = 1

    def described(steps: Any) -> list[Any]:
        return [(step.number, step.epoch, rows_of(list(step.micro_batches))) for step in steps]

    whole = described(islice(schedule(**changes).steps(), 400))
    ends = {number for number, epoch, _ in whole if epoch == int(epoch)}
    assert len(ends) > 1 and schedule(**changes).total_steps(len(ends), None) == max(ends)
    parts = [schedule(**changes).total_steps(epochs - 0.001, None) for epochs in range(1, len(ends) + 1)]
    assert parts == sorted(ends), "the last step of a part of an epoch is counted whole"
    for start in {0, 1, 150, *ends, *(end - 1 for end in ends)}:
        assert described(islice(schedule(**changes).steps(start), 400 - start)) == whole[start:]


def test_steps_windows_and_epochs() -> None:
    plain = schedule(packing=False, shuffle=False)  # 10 rows, 5 batches, windows of 2, 2 and 1
    steps = [step for step, _ in zip(plain.steps(), range(4), strict=False)]
    assert [len(step.micro_batches) for step in steps] == [2, 2, 1, 2]
    assert [step.epoch for step in steps] == [0.4, 0.8, 1.0, 1.4]
    assert [step.tokens for step in steps] == [23, 12, 12, 23]
    assert [step.supervised for step in steps] == [19, 8, 10, 19]
    assert (plain.total_steps(2, None), plain.total_steps(0.5, None), plain.total_steps(9, 4)) == (6, 2, 4)
    one_by_one = schedule(packing=False, batch_size=1, accumulation=1)
    assert [one_by_one.total_steps(epochs, None) for epochs in (1.1, 1.15, 2.2, 3.2, 1e-9)] == [11, 12, 22, 32, 1]
    resumed = next(iter(plain.steps(start=3)))
    assert (resumed.number, resumed.epoch) == (4, 1.4)
    assert [rows.tolist() for rows in resumed.micro_batches] == [rows.tolist() for rows in steps[3].micro_batches]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), data=st.data())
def test_rows_are_gone_through_a_chunk_at_a_time(lengths: list[int], data: st.DataObject) -> None:
    draw = np.random.default_rng(1)
    rows = [(draw.integers(0, 99, n).astype(np.int32), draw.integers(0, 2, n) > 0, 0) for n in lengths]
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=60))
    examples = join_pieces(rows, ("text",) * 9).select(chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_cli.data.examples.CHUNK", 32)
        flats = list(examples.chunks())
        counts, print_ = examples.supervised_per_row, examples.fingerprint
    assert all(len(each.ids) <= 32 or len(each.offsets) == 2 for each in flats)
    assert flat(flat_.ids.tolist() for flat_ in flats) == flat(rows[row][0].tolist() for row in chosen)
    assert flat(flat_.supervised.tolist() for flat_ in flats) == flat(rows[row][1].tolist() for row in chosen)
    assert flat(np.diff(flat_.offsets).tolist() for flat_ in flats) == [lengths[row] for row in chosen]
    assert counts.tolist() == [int(rows[row][1].sum()) for row in chosen]
    assert print_ == join_pieces([rows[row] for row in chosen], ("text",) * 9).fingerprint


def test_a_share_is_held_out() -> None:
    ids = np.arange(20, dtype=np.int32)
    store = Store(ids, np.ones(20, np.bool_))
    examples = end_to_end(store, np.arange(21, dtype=np.int64), np.zeros(20, np.int32), ("text",))
    train, held = split_validation(examples, 0.25, 3)
    assert (len(train), len(held)) == (15, 5)
    assert sorted([*train.flat().ids, *held.flat().ids]) == list(range(20))
    assert split_validation(examples, 0.25, 3)[1].flat().ids.tolist() == held.flat().ids.tolist()
    assert split_validation(examples, 0.25, 4)[1].flat().ids.tolist() != held.flat().ids.tolist()
    assert [len(split_validation(examples, share, 3)[1]) for share in (0.001, 0.999)] == [1, 19]


@pytest.fixture
def few(tokenizer: Any, tmp_path: Path) -> Examples:
    rows = [QA, {"question": "Who mends the nets?", "answer": " The whole family, in winter."}, {**QA, "answer": " So"}]
    return examples_of(tokenizer, tmp_path, *rows)


def test_padded_batches(few: Examples) -> None:
    batch = collate(few, [2, 0], packing=False, pad_token_id=1)
    assert few.lengths[2] < few.lengths[0] < few.lengths[1]  # sorting by length moves every row
    assert batch.attention_mask is not None
    assert batch.input_ids.shape == batch.attention_mask.shape == (2, few.lengths[0])
    for at, row in enumerate((2, 0)):
        ids, mask = few.row(row)
        length = len(ids)
        assert batch.input_ids[at].tolist() == ids.tolist() + [1] * (int(few.lengths[0]) - length)
        assert batch.attention_mask[at].tolist() == [1] * length + [0] * (int(few.lengths[0]) - length)
        here = batch.supervised // len(batch.predict_from) == at
        assert batch.targets[here].tolist() == ids[mask].tolist()
        before = batch.predict_from[batch.supervised[here] % len(batch.predict_from)]
        assert batch.input_ids[at, before + 1].tolist() == ids[mask].tolist()
    assert batch.position_ids[0].tolist() == list(range(int(few.lengths[0])))


def test_packed_batches(few: Examples) -> None:
    batch = collate(few, [2, 0, 1], packing=True, pad_token_id=1)
    assert batch.attention_mask is None
    assert batch.input_ids[0].tolist() == flat(few.row(row)[0].tolist() for row in (2, 0, 1))
    assert batch.position_ids[0].tolist() == flat(list(range(int(few.lengths[row]))) for row in (2, 0, 1))
    assert batch.cu_seq_lens is not None
    assert batch.cu_seq_lens.tolist() == [0, *few.lengths[[2, 0, 1]].cumsum().tolist()]
    assert batch.targets.tolist() == flat(few.row(row)[0][few.row(row)[1]].tolist() for row in (2, 0, 1))
    after = [batch.input_ids[0, at + 1].item() for at in batch.predict_from.tolist()]
    assert after == batch.targets.tolist()
    assert batch.supervised.tolist() == list(range(len(after)))


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_llama"])
def test_a_batch_gives_what_each_row_gives_alone(
    kind: str, packing: bool, few: Examples, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(kind), dtype=torch.float32)

    def loss_and_gradients(loss: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    def alone(row: int) -> torch.Tensor:
        ids, mask = (torch.from_numpy(array) for array in few.row(row))
        labels = torch.where(mask, ids, -100).long()
        logits = model(input_ids=ids.long()[None]).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits.float(), labels[1:], reduction="sum")

    expected, wanted = loss_and_gradients(sum((alone(row) for row in (2, 0, 1)), torch.zeros(())))
    found, gradients = loss_and_gradients(summed_loss(model, collate(few, [2, 0, 1], packing, 1)))
    assert found == pytest.approx(expected, rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for one, other in zip(gradients, wanted, strict=True):
        assert float((one - other).abs().max()) < 1e-5 * scale


def test_every_error_of_the_data_is_the_users(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(LoraError) as told:
        examples_of(tokenizer, tmp_path, QA, {"question": "Why?"})
    assert told.value.exit_code == 2
    assert "rows.jsonl:2" in str(told.value)
