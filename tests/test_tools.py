"""Rows with tools. The text is checked against Transformers' own ``apply_chat_template`` of the same row, and the
supervised tokens against expectations written by hand (text in ⟦ ⟧ is supervised)."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from test_audit import report_of
from test_cache import cached
from test_chat import CHATML, GEMMA, MISTRAL, ONCE, Family, messages_of, tokenizer_of, tokens_of

from lora_cli.data.faults import row_faults
from lora_cli.data.sources import Row, sources_of
from lora_cli.data.tokenize import tokenize_rows
from lora_cli.errors import UserError
from lora_cli.recipe.schema import Data

QWEN = Family(  # tools are in the system turn, calls in the assistant's, and tool results in a user's
    "{% if tools %}<|im_start|>system\n"
    "{{ messages[0].content + '\n\n' if messages[0].role == 'system' }}# Tools\n<tools>"
    "{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n' }}</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
    "{% for call in m.tool_calls %}{% set call = call.function or call %}{{ '\n' if m.content or not loop.first }}"
    '<tool_call>\n{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}'
    "{{ '}\n' }}</tool_call>"
    "{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}{{ '\n' }}"
    "<tool_response>\n{{ m.content }}{{ '\n' }}</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% elif m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    (*CHATML.specials, "<tool_call>", "</tool_call>"),
    eos="<|im_end|>",
)
UNMARKED = replace(QWEN, template=re.sub(r"{% (end)?generation %}", "", QWEN.template))
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
    headed = replace(QWEN, template=QWEN.template.replace("{% if tools %}", "{% if tools is not none %}"))
    for family in (headed, MISTRAL):  # one writes a heading for an empty list, the other has no support for tools
        text = tokenizer_of(family, "").apply_chat_template(ASKED, tokenize=False)
        found = tokenized(family, {"messages": ASKED, "tools": tools}, text)
        assert "".join(token for token, _ in found) == text


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
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the chat template leaves out the row's tools\n    remove the"):
        tokenized(family, row, "")


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ("weather", r"rows\.jsonl:1: tools: not valid JSON: Expecting value"),
        ('[{"a": 1, "a": 2}]', "not valid JSON: duplicate key: a"),
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
    faults = row_faults(Data(train=path), sources_of(path), set(), set())
    assert [fault.where for fault in faults] == [f"{path}:2: tools", f"{path}:3: tools"]


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}} | more


def calling(*calls: dict[str, Any], content: Any = "") -> list[dict[str, Any]]:
    """A question, an assistant's turn with these calls, a tool result for each call, and the answer."""
    answers = [{"role": "tool", "name": "weather", "content": f"sunny {n}"} for n, _ in enumerate(calls)]
    turn = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    return [{"role": "user", "content": "Is it so?"}, turn, *answers, {"role": "assistant", "content": "yes"}]


PARIS = call("weather", {"city": "Paris", "days": [1, 2.5, None, True]}, id="a1")
NOON = call("clock", {})
WRITTEN = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": [1, 2.5, null, true]}}\n</tool_call>'
CALLED = [
    ((PARIS,), "", f"⟦{WRITTEN}<|im_end|>⟧", 1),
    ((PARIS,), "Let me see.", f"⟦Let me see.\n{WRITTEN}<|im_end|>⟧", 1),
    ((PARIS, PARIS), "", f"⟦{WRITTEN}\n{WRITTEN}<|im_end|>⟧", 2),
    (
        (PARIS, NOON),
        "weather <|im_end|>",
        f'⟦weather <|im_end|>\n{WRITTEN}\n<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call><|im_end|>⟧',
        2,
    ),
]


@pytest.mark.parametrize("family", [QWEN, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize(("calls", "content", "written", "count"), CALLED)
def test_calls_and_their_end_are_supervised_and_answers_are_not(
    family: Family, calls: tuple[dict[str, Any], ...], content: str, written: str, count: int
) -> None:
    messages = calling(*calls, content=content)
    answers = "".join(f"\n<tool_response>\nsunny {n}\n</tool_response>" for n in range(count))
    expected = (
        f"<|im_start|>system\n# Tools\n<tools>\n{json.dumps(CLOCK)}\n</tools><|im_end|>\n"
        f"<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n{written}\n"
        f"<|im_start|>user{answers}<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
    )
    found = tokenized(family, {"messages": messages, "tools": [CLOCK]}, expected)
    assert found == tokens_of(family, expected)
    tokenizer = tokenizer_of(family, expected)
    assert "".join(token for token, _ in found) == tokenizer.apply_chat_template(
        messages, tools=[CLOCK], tokenize=False
    )
    if family is QWEN:
        marked = tokenizer.apply_chat_template(
            messages, tools=[CLOCK], return_dict=True, return_assistant_tokens_mask=True
        )
        assert [learned for _, learned in found] == [bool(one) for one in marked["assistant_masks"]]


MISTRAL_TOOLS = replace(  # user turns must alternate with assistant turns that call no tool
    MISTRAL,
    template="{{ bos_token }}{% set ns = namespace(turns=0) %}{% for m in messages %}"
    "{% if m.role != 'tool' and not m.tool_calls %}{% if (m.role == 'user') != (ns.turns % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set ns.turns = ns.turns + 1 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] {% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}</s>"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}",
)


def test_calls_are_supervised_where_no_other_turn_may_stand_in_their_place() -> None:
    messages = [*calling(PARIS, NOON), *messages_of(ONCE), *calling(NOON)]
    asked, answered = "[INST] Is it so?[/INST]", "⟦ yes</s>⟧"
    paris, noon = (json.dumps(each["function"]) for each in (PARIS, NOON))
    sunny = [f"[TOOL_RESULTS] sunny {n}[/TOOL_RESULTS]" for n in (0, 1)]
    expected = (
        f"<s>{asked}⟦[TOOL_CALLS] {paris}{noon}</s>⟧{sunny[0]}{sunny[1]}{answered}{asked}{answered}"
        f"{asked}⟦[TOOL_CALLS] {noon}</s>⟧{sunny[0]}{answered}"
    )
    assert tokenized(MISTRAL_TOOLS, {"messages": messages}, expected) == tokens_of(MISTRAL_TOOLS, expected)


def test_a_call_may_end_a_conversation_and_needs_no_tools() -> None:
    messages = calling(PARIS)[:2]
    expected = f"<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n⟦{WRITTEN}<|im_end|>⟧\n"
    assert tokenized(UNMARKED, {"messages": messages}, expected) == tokens_of(UNMARKED, expected)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [PARIS]},
        {"role": "assistant", "tool_calls": [PARIS]},
        {"role": "assistant", "content": "", "tool_calls": [PARIS["function"]]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call("weather", json.dumps(PARIS["function"]["arguments"]))],
        },
        {"from": "gpt", "value": "", "tool_calls": [PARIS]},
        {"from": "function_call", "value": json.dumps(PARIS["function"])},
        {"from": "function_call", "value": json.dumps([PARIS["function"]])},
    ],
    ids=["null", "missing", "flat", "text", "sharegpt", "llama-factory", "llama-factory-list"],
)
def test_calls_may_be_written_in_other_ways(turn: dict[str, Any]) -> None:
    messages = calling(PARIS)
    text = tokenizer_of(QWEN, "").apply_chat_template(messages, tokenize=False)
    answer = {"from": "observation", "value": messages[2]["content"]} if "from" in turn else messages[2]
    found = tokenized(QWEN, {"messages": [messages[0], turn, answer, *messages[3:]]}, text)
    assert found == tokenized(QWEN, {"messages": messages}, text)
    assert "".join(token for token, _ in found) == text


@pytest.mark.parametrize("value", ["weather(Paris)", '{"city": "Paris"}', "[]", None])
def test_a_function_call_that_is_none_is_told(value: Any) -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": value}]}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: conversations\[1\]"):
        tokenized(QWEN, row, "")


@pytest.mark.parametrize("arguments", ["", " ", "{}"])
def test_arguments_may_be_none(arguments: str) -> None:
    messages = calling(NOON)
    text = tokenizer_of(QWEN, "").apply_chat_template(messages, tokenize=False)
    assert tokenized(QWEN, {"messages": calling(call("clock", arguments))}, text) == tokenized(
        QWEN, {"messages": messages}, text
    )


def test_the_template_is_told_which_call_is_answered() -> None:
    family = replace(
        CHATML,
        template="{% for m in messages %}{{ m.role }}{{ m.name }}{{ m.tool_call_id }}:{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.id }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    messages = calling(PARIS, PARIS, content="See.")
    messages[0]["name"] = "Ada"  # as without tools, a speaker's name is not passed on
    messages[2] |= {"tool_call_id": "a1", "name": None}
    expected = "user:Is it so?<|im_end|>\nassistant:⟦See.weathera1weathera1<|im_end|>⟧\n"
    expected += "toola1:sunny 0<|im_end|>\ntoolweather:sunny 1<|im_end|>\nassistant:⟦yes<|im_end|>⟧\n"
    assert tokenized(family, {"messages": messages}, expected) == tokens_of(family, expected)


GPT_OSS = replace(  # a turn that calls a tool ends in a token of its own; so do earlier answers
    CHATML,
    template="{% for m in messages %}{% if m.tool_calls %}<|start|>assistant to={{ m.tool_calls[0].function.name }}"
    "<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}"
    "{% endif %}<|start|>weather<|message|>{{ m.content }}<|end|>{% elif m.role == 'assistant' %}"
    "<|start|>assistant<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    specials=("<|start|>", "<|message|>", "<|call|>", "<|end|>", "<|return|>"),
    eos="<|return|>",
)
GEMMA_4 = replace(  # calls, their results and the answer are one turn
    CHATML,
    template="{% for m in messages %}{% set earlier = messages[loop.index0 - 1] if not loop.first else {} %}"
    "{% if m.role == 'tool' %}{{ 'response:' + m.content }}<tool_response|>"
    "{% if not loop.last and messages[loop.index0 + 1].role == 'tool' %}<|tool_response>{% endif %}{% else %}"
    "{% if earlier.role != 'tool' %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls %}"
    "<|tool_call>{{ c.function.name }}{{ c.function.arguments | tojson }}<tool_call|>"
    "{% endfor %}{{ '<|tool_response>' if m.tool_calls else '<turn|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|turn>model\n{% endif %}",
    specials=("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
    eos="<turn|>",
)


@pytest.mark.parametrize(
    ("family", "asked", "called", "sunny", "answer"),
    [
        (
            GPT_OSS,
            "<|start|>user<|message|>Is it so?<|end|>",
            '<|start|>assistant⟦ to=weather<|message|>{"city": "Paris"}<|call|>⟧',
            "<|start|>weather<|message|>sunny 0<|end|>",
            "<|start|>assistant⟦<|message|>yes<|return|>⟧",
        ),
        (
            replace(GPT_OSS, template=GPT_OSS.template.replace("<|call|>", "<|call|>\n")),
            "<|start|>user<|message|>Is it so?<|end|>",
            '<|start|>assistant⟦ to=weather<|message|>{"city": "Paris"}<|call|>⟧\n',
            "<|start|>weather<|message|>sunny 0<|end|>",
            "<|start|>assistant⟦<|message|>yes<|return|>⟧",
        ),
        (
            GEMMA_4,
            "<|turn>user\nIs it so?<turn|>\n",
            '<|turn>model\n⟦[content]<|tool_call>weather{"city": "Paris"}<tool_call|><|tool_response>⟧',
            "response:sunny 0<tool_response|>",
            "⟦yes<turn|>⟧\n",
        ),
    ],
    ids=["gpt-oss", "line-break", "gemma-4"],
)
@pytest.mark.parametrize("content", ["", " "])  # gpt-oss writes no text beside a call
def test_calls_may_end_in_another_special_token_than_answers(
    content: str, family: Family, asked: str, called: str, sunny: str, answer: str
) -> None:
    messages, called = (
        calling(call("weather", {"city": "Paris"}), content=content),
        called.replace("[content]", content),
    )
    expected = asked + called + sunny + answer
    assert tokenized(family, {"messages": messages}, expected) == tokens_of(family, expected)
    expected = asked + called
    row = {"messages": messages[:2]}
    assert tokenized(family, row, expected) == tokens_of(family, expected)
    report, _ = report_of(tokenizer_of(family, expected), row, row)
    assert (report.ends_supervised, report.ends_masked) == (2, 0)


def test_a_calls_turn_is_found_where_the_template_drops_its_reasoning() -> None:
    thought = "{{ m.reasoning_content if loop.last and m.reasoning_content }}"
    family = replace(UNMARKED, template=UNMARKED.template.replace("assistant\n{{ m", "assistant\n" + thought + "{{ m"))
    messages = calling(PARIS, content="See.")
    messages[1]["reasoning_content"] = "Paris is a city."
    messages[-1]["reasoning_content"] = None
    expected = (
        f"<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n⟦See.\n{WRITTEN}<|im_end|>⟧\n<|im_start|>user\n"
        "<tool_response>\nsunny 0\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
    )
    assert tokenized(family, {"messages": messages}, expected) == tokens_of(family, expected)


def test_arguments_are_given_as_text_where_the_template_takes_nothing_else() -> None:
    template = UNMARKED.template.replace("{{ call.arguments | tojson }}", "{{ '' + call.arguments }}")
    template = template.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role if 'tool_calls' not in m }}")
    family = replace(UNMARKED, template=template)
    zurich = call("weather", {"city": "Zürich", "days": [1, 2.5, None, True]})
    for one in (PARIS, PARIS["function"], call("weather", json.dumps(PARIS["function"]["arguments"])), zurich):
        written = WRITTEN.replace("Paris", "Zürich") if one is zurich else WRITTEN
        expected = f"<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n⟦{written}<|im_end|>⟧\n"
        found = tokenized(family, {"messages": calling(one)[:2]}, expected)
        assert found == tokens_of(family, expected)
    with pytest.raises(UserError, match=r"refuses the conversation: can only concatenate str \(not \"int\"\)"):
        broken = replace(family, template=template.replace("+ call.arguments", "+ 1"))
        tokenized(broken, {"messages": calling(PARIS)}, "")


def test_a_functions_schema_alone_is_given_its_type_where_the_template_needs_it() -> None:
    row = {"messages": messages_of(ONCE), "tools": [CLOCK["function"]]}
    strict = replace(QWEN, template=QWEN.template.replace("{{ tool | tojson }}", "{{ tool.function.name }}"))
    for family, written in ((QWEN, json.dumps(CLOCK["function"])), (strict, "clock")):
        expected = f"<|im_start|>system\n# Tools\n<tools>\n{written}\n</tools><|im_end|>\n"
        expected += "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
        assert tokenized(family, row, expected) == tokens_of(family, expected)


NO_CALLS = CHATML
NAMELESS = replace(UNMARKED, template=UNMARKED.template.replace("{{ call.name }}", ""))
FIRST_ALONE = replace(UNMARKED, template=UNMARKED.template.replace("in m.tool_calls", "in (m.tool_calls or [])[:1]"))
NO_WORDS = replace(
    UNMARKED,
    template=UNMARKED.template.replace(
        "assistant\n{{ m.content }}", "assistant\n{{ '' if m.tool_calls else m.content }}"
    ),
)
NO_ANSWERS = replace(
    UNMARKED, template=UNMARKED.template.replace("<tool_response>\n{{ m.content }}", "<tool_response>")
)
NESTED = replace(  # a tool result is in the turn that calls the tool, before its end
    CHATML,
    template="{% for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}={{ messages[loop.index0 + 2].content }}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)

UNENDED = replace(  # the first <|im_end|> after a call ends the tool result
    CHATML,
    template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{% else %}<|im_end|>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)


@pytest.mark.parametrize(
    ("family", "messages", "says"),
    [
        (UNENDED, calling(PARIS), r"turn 1 \(assistant\)\n    write the calls into the turn's text"),
        (
            NO_CALLS,
            calling(PARIS),
            r"leaves out or rewrites turn 1 \(assistant\)\n    write the calls into the turn's text",
        ),
        (NO_CALLS, calling(PARIS, content="See."), r"turn 1 \(assistant\)\n    write the calls into the turn's text"),
        (
            NO_CALLS,
            calling(PARIS, content="weather"),
            r"turn 1 \(assistant\)\n    write the calls into the turn's text",
        ),
        (NAMELESS, calling(PARIS), r"turn 1 \(assistant\)\n    write the calls into the turn's text"),
        (FIRST_ALONE, calling(PARIS, PARIS), r"turn 1 \(assistant\)\n    write the calls into the turn's text"),
        (NO_WORDS, calling(PARIS, content="See."), r"turn 1 \(assistant\)\n    write the calls into the turn's text"),
        (NO_ANSWERS, calling(PARIS), r"leaves out turn 2 \(tool\), or puts it elsewhere\n    use the role"),
        (NO_ANSWERS, [*messages_of(ONCE), {"role": "tool", "content": "sunny"}], r"leaves out turn 2 \(tool\)"),
        (NESTED, calling(PARIS), r"leaves out turn 2 \(tool\), or puts it elsewhere"),
    ],
)
def test_calls_and_answers_that_a_template_leaves_out_are_told(family: Family, messages: Any, says: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the chat template " + r".*" + says):
        tokenized(family, {"messages": messages}, "")


@pytest.mark.parametrize(
    ("calls", "says"),
    [
        ("weather", r"rows\.jsonl:1: messages\[1\]\.tool_calls: expected a list of calls, found text"),
        (["weather"], r"tool_calls\[0\]: the call has no function name"),
        ([{"function": "weather"}], r"tool_calls\[0\]: the call has no function name"),
        ([PARIS, call("", {})], r"tool_calls\[1\]: the call has no function name"),
        ([call("weather", "Paris")], r"tool_calls\[0\]: not valid JSON: Expecting value"),
        ([call("weather", "[]")], r"tool_calls\[0\]: the call's arguments are a list, expected an object"),
        ([{"name": "weather"}], r"tool_calls\[0\]: the call's arguments are null, expected an object"),
        ([call("weather", '{"city": "half \\ude00"}')], r"tool_calls\[0\]: holds half a character"),
        ([PARIS | {"id": "half \ude00"}], r"tool_calls\[0\]: holds half a character"),
        ([call("weather", {"since": datetime.date(2024, 7, 26)})], "cannot be written as JSON: Object of type date"),
    ],
)
def test_calls_that_are_none_are_told(calls: Any, says: str) -> None:
    messages = calling(PARIS)
    messages[1]["tool_calls"] = calls
    with pytest.raises(UserError, match=says):
        tokenized(QWEN, {"messages": messages}, "")


def test_a_tools_name_that_is_none_is_told() -> None:
    messages = calling(PARIS)
    messages[2]["name"] = "half \ude00"
    with pytest.raises(UserError, match=r"rows\.jsonl:1: messages\[2\]: holds half a character"):
        tokenized(QWEN, {"messages": messages}, "")


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
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(QWEN.template)
    first = []
    for tools in (None, [CLOCK]):
        rows = write_rows(tmp_path / "rows.jsonl", [{"messages": ASKED, "tools": tools}])
        run = train({"model.name_or_path": base, "data.train": rows, "data.max_length": 250, "training.max_steps": 1})
        first.append(run.lines()[0])
    without, behind = first
    assert behind["tokens"] == without["tokens"]
    assert behind["loss"] != without["loss"]
