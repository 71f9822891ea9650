"""Rows with tools: what the template is handed, against Transformers' own ``apply_chat_template`` of the same row, and
what of it is supervised, against expectations written by hand (what stands in ⟦ ⟧ is learned)."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_cache import cached, write_rows
from test_chat import CHATML, GEMMA, MISTRAL, ONCE, Family, messages_of, tokenizer_of, tokens_of

from lora_cli.data.formats import check_rows
from lora_cli.data.sources import Row, sources_of
from lora_cli.data.tokenize import tokenize_rows
from lora_cli.errors import UserError
from lora_cli.recipe.schema import Data

QWEN = Family(  # tools stand in the system turn
    "{% if tools %}<|im_start|>system\n"
    "{{ messages[0].content + '\n\n' if messages[0].role == 'system' }}# Tools\n<tools>"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n' }}</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if not loop.first or m.role != 'system' %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    CHATML.specials,
    eos="<|im_end|>",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a city, in °C.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "default": None}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {}}}
ASKED = messages_of((("system", "Be brief."), *ONCE))


def tokenized(family: Family, row: dict[str, Any], expected: str, **data: Any) -> list[tuple[str, bool]]:
    """Each token of the row, and whether it is supervised."""
    tokenizer = tokenizer_of(family, expected)
    rows = [Row(row, "rows.jsonl:1")]
    ids, mask = tokenize_rows(Data(train="rows.jsonl", **data), rows, tokenizer).examples.row(0)
    return list(zip(tokenizer.convert_ids_to_tokens(ids.tolist()), mask.tolist(), strict=True))


@pytest.mark.parametrize("tools", [[WEATHER, CLOCK], json.dumps([WEATHER, CLOCK])], ids=["list", "text"])
def test_the_template_is_handed_the_rows_tools(tools: Any) -> None:
    listed = f"{json.dumps(WEATHER, ensure_ascii=False)}\n{json.dumps(CLOCK)}"
    expected = (
        f"<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n{listed}\n</tools><|im_end|>\n"
        "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
    )
    found = tokenized(QWEN, {"messages": ASKED, "tools": tools}, expected)
    assert found == tokens_of(QWEN, expected)
    text = tokenizer_of(QWEN, "").apply_chat_template(ASKED, tools=[WEATHER, CLOCK], tokenize=False)
    assert "".join(token for token, _ in found) == text


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", "null"])
def test_a_row_may_have_no_tools(tools: Any) -> None:
    text = tokenizer_of(QWEN, "").apply_chat_template(ASKED, tokenize=False)
    for family in (QWEN, MISTRAL):  # one that knows tools, and one that does not
        assert tokenized(family, {"messages": ASKED, "tools": tools}, text) == tokenized(
            family, {"messages": ASKED}, text
        )


def test_tools_go_with_other_columns_of_a_conversation() -> None:
    text = tokenizer_of(QWEN, "").apply_chat_template(messages_of(ONCE), tools=[CLOCK], tokenize=False)
    rows: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"conversations": [{"from": "human", "value": "Is it so?"}, {"from": "gpt", "value": "yes"}]}, {}),
        ({"prompt": "Is it so?", "completion": "yes"}, {"format": "chat"}),
    ]
    for columns, data in rows:
        found = tokenized(QWEN, columns | {"functions": [CLOCK]}, text, columns={"tools": "functions"}, **data)
        assert "".join(token for token, _ in found) == text
        assert [token for token, learned in found if learned] == ["yes", "<|im_end|>"]


@pytest.mark.parametrize("family", [CHATML, GEMMA, MISTRAL])
def test_tools_that_a_template_leaves_out_are_told(family: Family) -> None:
    row = {"messages": messages_of(ONCE), "tools": [WEATHER]}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the chat template leaves out the row's tools\n    leave the"):
        tokenized(family, row, "")


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("weather", r"rows\.jsonl:1: tools: not valid JSON: Expecting value"),
        ('[{"a": 1, "a": 2}]', "not valid JSON: named twice: a"),
        ({"name": "weather"}, "tools: expected a list of tools, found an object"),
        ([WEATHER, "weather"], r"tools\[1\]: expected a tool's JSON schema, found text"),
        ('["weather"]', r"tools\[0\]: expected a tool's JSON schema, found text"),
        ([{"name": "half \ud83d"}], "tools: holds half a character"),
        ([{"since": datetime.date(2024, 7, 26)}], "tools: cannot be written as JSON: Object of type date"),
    ],
)
def test_tools_that_are_none_are_told(tools: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tokenized(QWEN, {"messages": ASKED, "tools": tools}, "")


def test_tools_are_told_by_their_rows_before_a_model_is_read(tmp_path: Path) -> None:
    rows = [{"messages": ASKED, "tools": tools} for tools in ([CLOCK], "clock", 3)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    faults = check_rows(Data(train=path), sources_of(path), set())
    assert [fault.where for fault in faults] == [f"{path}:2: tools", f"{path}:3: tools"]


def test_rows_with_other_tools_are_tokenized_anew(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(QWEN, "")
    parts = {}
    for name, tools in (("one", [CLOCK]), ("other", [WEATHER]), ("none", None), ("again", [CLOCK])):
        part = cached(tokenizer, tmp_path, write_rows(tmp_path / "rows.jsonl", [{"messages": ASKED, "tools": tools}]))
        parts[name] = part.key, part.tokenized.examples.fingerprint
    assert parts["again"] == parts["one"]
    assert len(set(parts.values())) == 3
    assert len({key for key, _ in parts.values()}) == len({tokens for _, tokens in parts.values()}) == 3


def test_a_run_learns_behind_its_tools(train: Any, tiny_llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    (base / "chat_template.jinja").write_text(QWEN.template)
    first = []
    for tools in (None, [CLOCK]):
        rows = write_rows(tmp_path / "rows.jsonl", [{"messages": ASKED, "tools": tools}])
        run = train({"model.name_or_path": base, "data.train": rows, "data.max_length": 250, "training.max_steps": 1})
        first.append(run.lines()[0])
    without, behind = first
    assert behind["tokens"] == without["tokens"]
    assert behind["loss"] != without["loss"]
