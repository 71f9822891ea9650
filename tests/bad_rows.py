"""Data that cannot be read, or from which nothing can be learned."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_input import LFS, ROW, Arguments, World, case


@case("rows.jsonl:3", "not valid JSON", "one JSON object per line")
def broken_json_line(w: World) -> Arguments:
    rows = f"{json.dumps(ROW)}\n\n{{'question': 1}}\n{json.dumps(ROW)}\n"
    return w.train(data=w.file("rows.jsonl", rows))


@case("rows.jsonl:2", "rows.jsonl:4")
def two_broken_lines_at_once(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", f"{json.dumps(ROW)}\n{{\n{json.dumps(ROW)}\n]\n"))


@case("rows.jsonl:1", "rows.jsonl:10", "there may be more")
def a_hundred_broken_lines(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", "oops\n" * 100))


@case("rows.jsonl:2", "not UTF-8", "0xe9", "save the file as UTF-8")
def jsonl_in_latin_1(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", json.dumps(ROW).encode() + b'\n{"question": "caf\xe9", "answer": " x"}\n'))


@case("rows.csv:3", "not UTF-8", "0xe9", "UTF-8")
def csv_in_latin_1(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", b"question,answer\na,b\ncaf\xe9,d\n"))


@case("rows.json:2", "not UTF-8")
def json_in_utf_16(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", b"[\n\xff\xfe]"))


@case("rows.jsonl", "holds no rows", "at least one row")
def empty_file(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", ""))


@case("rows.json", "holds no rows")
def empty_list(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", "[]"))


@case("rows.csv", "holds no rows")
def csv_with_a_header_alone(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", "question,answer\n"))


@case("empty.jsonl", "holds no rows")
def empty_part_of_a_mixture(w: World) -> Arguments:
    return w.train({"data.train": [w.rows(ROW), {"path": w.file("empty.jsonl", "\n\n"), "weight": 2.0}]})


@case("rows.jsnl", "no such data file", "did you mean 'rows.jsonl'?")
def misspelt_file(w: World) -> Arguments:
    w.rows(ROW)
    return w.train(data="rows.jsnl")


@case("data/train.jsonl", "no such data file", "paths are relative to")
def missing_file(w: World) -> Arguments:
    return w.train(data="data/train.jsonl")


@case("validation.jsonl", "no such data file")
def missing_validation_file(w: World) -> Arguments:
    return w.train({"data.validation": "validation.jsonl"})


@case("folder", "holds no data file", ".jsonl", ".parquet")
def folder_without_data(w: World) -> Arguments:
    w.file("folder/readme.md", "nothing")
    return w.train(data="folder")


@case("folder/*.jsonl", "no data file matches")
def glob_without_match(w: World) -> Arguments:
    return w.train(data="folder/*.jsonl")


@case("rows.xlsx", "cannot read files of type '.xlsx'", ".csv")
def unknown_suffix(w: World) -> Arguments:
    return w.train(data=w.file("rows.xlsx", "PK"))


@case("somebody/rows", "hub")
def data_on_the_hub_while_offline(w: World) -> Arguments:
    return w.train(data="somebody/rows")


@case("rows.csv:3", "3 cells for 2 columns", "question, answer", "rows.csv:4", "1 cell for")
def ragged_csv(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", "question,answer\na,b\na,b,c\na\n"))


@case("rows.csv:1", "duplicate column: answer")
def csv_column_twice(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", "answer,answer\na,b\n"))


@case("rows.csv:", "not valid CSV")
def csv_quote_left_open(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", 'question,answer\na,"b\n'))


@case("rows.parquet", "not a readable Parquet file")
def broken_parquet(w: World) -> Arguments:
    return w.train(data=w.file("rows.parquet", b"PAR1 no PAR1"))


@case("rows.jsonl:2", "expected a JSON object, found a list")
def json_line_that_is_no_object(w: World) -> Arguments:
    return w.train(data=w.rows(ROW, [1, 2]))


@case("rows.json (row 2)", "expected an object, found a number")
def json_item_that_is_no_object(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", json.dumps([ROW, 5])))


@case("rows.json:2", "not valid JSON")
def broken_json(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", '[\n{"question": ]'))


@case("rows.json", "expected a list of objects, found an object")
def json_that_is_no_list(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", json.dumps(ROW)))


@case("rows.jsonl:2", "no column 'completion' or 'answer'", "columns seen: question, reply", "data.columns")
def row_without_a_column(w: World) -> Arguments:
    return w.train(data=w.rows(ROW, {"question": "Why?", "reply": " x"}))


@case("rows.jsonl:2", "column 'answer' is null", "columns seen: question, answer")
def row_with_null(w: World) -> Arguments:
    return w.train(data=w.rows(ROW, ROW | {"answer": None}))


@case("rows.jsonl:1", "column 'answer' holds", "number", "expected text")
def row_with_a_number(w: World) -> Arguments:
    return w.train(data=w.rows(ROW | {"answer": 5}, ROW))


@case("rows.jsonl:1", "half a character", "\\ud800")
def row_with_a_lone_surrogate(w: World) -> Arguments:
    return w.train(data=w.rows({"text": "half \ud83d"}))


@case("rows.jsonl:1", "ask, reply", "prompt/question + completion/answer", "data.columns")
def columns_unknown_to_auto(w: World) -> Arguments:
    return w.train(data=w.rows({"ask": "Why?", "reply": "x"}))


@case("rows.jsonl:1", "no column", "asked", "columns seen: question, answer")
def mapped_column_missing(w: World) -> Arguments:
    return w.train({"data.columns": {"prompt": "asked"}, "data.format": "prompt_completion"}, data=w.rows(ROW))


@case("data.columns.input", "no row has a column 'contxt'", "did you mean 'context'?")
def mapped_column_misspelt_that_a_format_can_do_without(w: World) -> Arguments:
    row = {"instruction": "Sum up.", "context": "A text.", "output": "Text."}
    return w.train({"data.columns": {"input": "contxt"}}, data=w.rows(row))


@case("rows.jsonl: with weight 0.1", "none of its 1 row", "raise the weight to 1")
def weight_that_takes_no_row(w: World) -> Arguments:
    return w.train({"data.train": [{"path": w.rows(ROW), "weight": 0.1}, w.file("more.txt", "Some words.\n")]})


@case("rows.jsonl:1", "read as alpaca, which does not use data.columns.system", "set data.format")
def mapped_column_that_the_format_would_not_read(w: World) -> Arguments:
    row = {"instruction": "Sum up.", "rule": "Be brief.", "output": "Text."}
    return w.train({"data.columns": {"system": "rule"}}, data=w.rows(row))


@case("rows.jsonl:2", "no column 'context' (data.columns.input), but a column 'input'")
def optional_column_of_another_name_in_some_rows(w: World) -> Arguments:
    row = {"instruction": "Sum up.", "output": "Text."}
    return w.train({"data.columns": {"input": "context"}}, data=w.rows(row | {"context": "1"}, row | {"input": "2"}))


@case("rows.jsonl:2", "no column 'functions' (data.columns.tools), but a column 'tools'")
def tools_of_another_name_in_some_rows(w: World) -> Arguments:
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    rows = w.rows(talk | {"functions": []}, talk | {"tools": [{"name": "weather"}]})
    return w.train({"data.columns": {"tools": "functions"}, "model.name_or_path": w.llama}, data=rows)


@case("more.jsonl: none of its rows is left to train on", "held out for validation, or have no supervised token")
def part_of_a_mixture_that_is_cut_away(w: World) -> Arguments:
    long = w.file("more.jsonl", json.dumps(ROW | {"question": "Why? " * 99}) + "\n")
    return w.train({"data.train": [w.rows(ROW, ROW), long], "data.max_length": 32})


@case("rows.jsonl", "split: test is for a hub id only, and this is a file", "the split's own files")
def split_of_a_file(w: World) -> Arguments:
    return w.train({"data.train": [{"path": w.rows(ROW), "split": "test"}]})


@case("rows.jsonl", "name: main is for a hub id only, and this is a file", "the configuration's own files")
def configuration_of_a_file(w: World) -> Arguments:
    return w.train({"data.train": [{"path": w.rows(ROW), "name": "main"}]})


@case("data", "streaming is for a hub id only, and this is a folder", "remove it")
def streaming_of_a_folder(w: World) -> Arguments:
    w.file("data/rows.jsonl", json.dumps(ROW))
    return w.train({"data.train": [{"path": "data", "streaming": True}]})


@case("a.jsonl, b.jsonl: no such data file", "in brackets it is a list: [a.jsonl, b.jsonl]")
def files_as_a_text_with_commas(w: World) -> Arguments:
    return w.train({"data.train": "a.jsonl, b.jsonl"})


@case("rows.jsonl:1", "tokenized rows, and lora tokenizes rows itself: input_ids, labels", "give their text")
def rows_that_are_tokenized(w: World) -> Arguments:
    return w.train(data=w.rows({"input_ids": [5, 6], "labels": [-100, 6]}))


@case("data", "holds several splits: deep/train-00000-of-00001.jsonl and test.jsonl", "such as *train*")
def folder_with_a_held_out_split(w: World) -> Arguments:
    for name in ("a.jsonl", "test.jsonl", "deep/train-00000-of-00001.jsonl"):
        w.file(f"data/{name}", json.dumps(ROW))
    return w.train({"data.train": "data"})


@case("data", "cannot read data/a.jsonl.xz and 1 more", "types read: .jsonl", "convert it")
def folder_with_rows_of_an_unread_type(w: World) -> Arguments:
    w.file("data/rows.jsonl", json.dumps(ROW))
    w.file("data/a.jsonl.xz", lzma.compress(json.dumps(ROW).encode()))
    w.file("data/b.xlsx", "")
    return w.train(data="data")


@case("rows.parquet", "duplicate column: answer", "its own name")
def parquet_with_two_columns_of_a_name(w: World) -> Arguments:
    columns = [pa.array(["Why?"]), pa.array([" a"]), pa.array([" b"])]
    pq.write_table(pa.table(columns, names=["question", "answer", "answer"]), w.root / "rows.parquet")
    return w.train(data="rows.parquet")


@case("data.validation", "nothing to learn or measure", "none of 1 row has")
def validation_of_empty_texts(w: World) -> Arguments:
    return w.train({"data.validation": w.file("empty.jsonl", '{"text": ""}\n')}, data=w.rows(ROW))


def chat(w: World, *turns: Any, model: str = "llama") -> Arguments:
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    changes = {"data.format": "chat", "model.name_or_path": getattr(w, model)}
    return w.train(changes, data=w.rows(good, *({"messages": turn} for turn in turns)))


@case("rows.jsonl:2", "messages[0]", "unknown role 'robot'", "user, assistant")
def chat_with_a_bad_role(w: World) -> Arguments:
    return chat(w, [{"role": "robot", "content": "Beep"}])


@case("rows.jsonl:2", "messages", "list of turns", "{role, content}")
def chat_without_turns(w: World) -> Arguments:
    return chat(w, [])


@case("rows.jsonl:2", "messages[1]", "the turn has no text: 'content' is null")
def chat_with_null_content(w: World) -> Arguments:
    return chat(w, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}])


@case("rows.jsonl:2", "messages[0]", "there is no 'content', but role, value", "{role, content} or {from, value}")
def chat_with_keys_of_two_layouts(w: World) -> Arguments:
    return chat(w, [{"role": "user", "value": "Hi"}, {"role": "assistant", "value": "Hello"}])


@case("rows.jsonl:2", "leaves out or rewrites turn 1", "write the calls into the turn's text", "remove tool_calls")
def chat_with_tool_calls_that_the_template_leaves_out(w: World) -> Arguments:
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    return chat(w, [{"role": "user", "content": "Hi", "tool_calls": None}, turn])


@case("rows.jsonl:2", "messages[0]", "the turn has tool_calls", "write it into the turn's text")
def chat_with_tool_calls_of_the_user(w: World) -> Arguments:
    call = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    return chat(w, [{"role": "user", "content": "Hi", "tool_calls": [call]}])


@case("rows.jsonl:2", "messages[1].tool_calls[0]", "not valid JSON", "an object or its JSON text")
def chat_with_arguments_that_are_no_object(w: World) -> Arguments:
    call = {"type": "function", "function": {"name": "weather", "arguments": "Paris"}}
    return chat(w, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}])


@case("rows.jsonl:2", "messages[1]", "the turn has reasoning, but only its text is read")
def chat_with_reasoning_by_another_name(w: World) -> Arguments:
    turn = {"role": "assistant", "content": "Yes.", "reasoning": "Hm."}
    return chat(w, [{"role": "user", "content": "Hi"}, turn])


@case("rows.jsonl:2", "messages[1]", "the turn calls no tool", "each call is")
def chat_with_an_empty_call(w: World) -> Arguments:
    return chat(w, [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "[]"}])


@case("rows.jsonl:2", "messages[0]", "the turn has reasoning_content")
def chat_with_a_users_reasoning(w: World) -> Arguments:
    turn = {"role": "assistant", "content": "Yes."}
    return chat(w, [{"role": "user", "content": "Hi", "weight": 1, "reasoning_content": "Hm."}, turn])


@case("rows.jsonl:2", "messages[1]", "the turn's text holds half a character", "\\ud800")
def chat_with_a_lone_surrogate(w: World) -> Arguments:
    return chat(w, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "half \ud83d"}])


@case("rows.jsonl:2", "messages[0]", "the text of a part of the turn is null or missing", "only text is read")
def chat_with_a_part_without_text(w: World) -> Arguments:
    return chat(w, [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "Yes."}])


@case("rows.jsonl:2", "messages[0]", "the text of a part of the turn is a number")
def chat_with_a_part_that_is_no_text(w: World) -> Arguments:
    return chat(
        w, [{"role": "user", "content": [{"type": "text", "text": 7}]}, {"role": "assistant", "content": "Yes."}]
    )


@case("rows.jsonl:2", "messages[1].thinking: the turn's text is a number")
def chat_with_reasoning_that_is_no_text(w: World) -> Arguments:
    turn = {"role": "assistant", "content": "Yes.", "thinking": 7}
    return chat(w, [{"role": "user", "content": "Hi"}, turn])


@case("rows.jsonl:2", "messages[1]", "the turn has weight 0.5", "1 (true) to learn it, 0 (false) not to")
def chat_with_a_turn_to_be_learned_by_half(w: World) -> Arguments:
    turns = [{"role": "user", "content": "Hi", "weight": 0}, {"role": "assistant", "content": "Yes.", "weight": 0.5}]
    return chat(w, turns)


@case("rows.jsonl:2", "messages[1]", "weight and train contradict each other", "keep one")
def chat_with_a_turn_to_be_learned_and_not(w: World) -> Arguments:
    turn = {"role": "assistant", "content": "Yes.", "weight": 0, "train": True}
    return chat(w, [{"role": "user", "content": "Hi"}, turn])


@case("rows.jsonl:2", "messages[0]", "a part of the turn is of type 'image_url'", "only text is read")
def chat_with_a_picture(w: World) -> Arguments:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "a.png"}}]
    return chat(w, [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}])


@case("rows.csv:2", "not valid JSON", "{role, content}")
def chat_in_a_cell_that_is_no_json(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", 'messages\n"[{role: user}]"\n'))


@case(
    "rows.jsonl:2", "column 'history' is not empty", "but format alpaca does not read it\n    give the rows as messages"
)
def alpaca_with_earlier_turns(w: World) -> Arguments:
    row = {"instruction": "Add", "input": "1 1", "output": "2", "system": "", "history": []}
    return w.train(data=w.rows(row, row | {"history": [["Hi", "Hello"]]}))


@case("rows.jsonl:1", "column 'history' is not empty", "chat does not read it\n    give the rows as messages")
def alpaca_with_earlier_turns_as_chat(w: World) -> Arguments:
    row = {"instruction": "Add", "output": "2", "system": "Be kind.", "history": [["Hi", "Hello"]]}
    return w.train({"model.name_or_path": w.llama, "data.format": "chat"}, data=w.rows(row))


@case("rows.jsonl:1", "column 'system' is not empty", "format alpaca does not read it", "set data.format: chat")
def alpaca_with_a_system_prompt(w: World) -> Arguments:
    return w.train(data=w.rows({"instruction": "Add", "output": "2", "system": "Be kind."}))


@case(
    "rows.jsonl:2", "column 'system' is not empty", "format prompt_completion does not read it", "set data.format: chat"
)
def question_with_a_system_prompt(w: World) -> Arguments:
    return w.train(data=w.rows(ROW | {"system": ""}, ROW | {"system": "Be kind."}))


@case("rows.jsonl:1", "column 'history' is not empty", "does not read it\n    give the rows as messages")
def question_with_earlier_turns(w: World) -> Arguments:
    return w.train(data=w.rows(ROW | {"history": [["Hi", "Hello"]]}))


@case("rows.jsonl:1", "axolotl's segments", "label: true as prompt, and that one as completion")
def segments(w: World) -> Arguments:
    return w.train(data=w.rows({"segments": [{"label": False, "text": "Why?"}, {"label": True, "text": " So."}]}))


@case("data/b.jsonl:1", "looks like prompt_completion", "first row is read as alpaca", "a source of its own")
def a_folder_of_two_formats(w: World) -> Arguments:
    w.file("data/a.jsonl", '{"instruction": "Add", "output": "2"}\n')
    w.file("data/b.jsonl", '{"question": "Why?", "answer": " Because."}\n')
    return w.train(data="data")


@case("rows.jsonl:2", "column 'completion' holds a number, expected text")
def a_row_that_is_wrong_in_any_format(w: World) -> Arguments:
    turns = {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}
    return w.train({"model.name_or_path": w.llama}, data=w.rows(turns, {"prompt": "Hi", "completion": 3}))


@case("rows.fifo", "not a file or a folder", "write the rows to a file")
def rows_from_a_pipe(w: World) -> Arguments:
    os.mkfifo(w.root / "rows.fifo")
    return w.train(data="rows.fifo")


@case("rows.jsonl:2", "messages[0]", "expected a turn")
def chat_turn_that_is_text(w: World) -> Arguments:
    return chat(w, ["Hi"])


@case(
    "rows.jsonl:1", "leaves out the row's tools", "remove the column from the rows", "whose chat template writes tools"
)
def chat_with_tools_that_the_template_leaves_out(w: World) -> Arguments:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return w.train({"model.name_or_path": w.llama}, data=w.rows({"messages": turns, "tools": [{"name": "clock"}]}))


@case("rows.jsonl:1", "tools[1]", "expected a tool's JSON schema, found text", "list of JSON schemas")
def chat_with_a_tool_that_is_text(w: World) -> Arguments:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    tools = [{"name": "clock"}, "weather"]
    return w.train({"model.name_or_path": w.llama}, data=w.rows({"messages": turns, "tools": tools}))


@case("chat template", "instruct model", "chat_template.jinja into the model's folder", "data.format")
def chat_without_a_template(w: World) -> Arguments:
    return chat(w, model="gpt2")


@case("rows.jsonl:1", "no chat template", "instruct model", "chat_template.jinja into the model's folder")
def rows_of_chat_by_their_columns_without_a_template(w: World) -> Arguments:
    return w.train(data=w.rows({"messages": [{"role": "user", "content": "Hi"}]}))


@case("rows.jsonl:2", "chat template", "roles must alternate")
def conversation_that_the_template_refuses(w: World) -> Arguments:
    text = "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant')|int %}"
    text += "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.role + m.content }}{% endfor %}"
    w.file(f"{w.model('llama')}/chat_template.jinja", text)
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    twice = {"messages": [good["messages"][0], *good["messages"]]}
    return w.train({"data.format": "chat", "model.name_or_path": "model"}, data=w.rows(good, twice))


@case("chat template has an error in line 1", "line 1", "chat_template.jinja")
def broken_chat_template(w: World) -> Arguments:
    w.file(f"{w.model('llama')}/chat_template.jinja", "{% for m in messages %}{{ m.content ")
    rows = w.rows({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    return w.train({"data.format": "chat", "model.name_or_path": "model"}, data=rows)


def template(w: World, prompt: str, completion: str) -> Arguments:
    return w.train({"data.template": {"prompt": prompt, "completion": completion}}, data=w.rows(ROW))


@case("data.template.prompt", "{{ and }}")
def template_with_an_open_brace(w: World) -> Arguments:
    return template(w, "Q: {question", " {answer}")


@case("data.template.completion", "answer.__class__", "write {column}")
def template_that_reaches_into_a_value(w: World) -> Arguments:
    return template(w, "Q: {question}", " {answer.__class__}")


@case("data.template.prompt", "no column", "write {column}")
def template_with_an_empty_field(w: World) -> Arguments:
    return template(w, "Q: {}", " {answer}")


@case("data.template.completion", "'{answer!r}' is no column", "write {column}")
def template_that_converts_a_value(w: World) -> Arguments:
    return template(w, "Q: {question}", " {answer!r}")


@case("rows.jsonl:1", "no column 'reply'", "columns seen: question, answer")
def template_of_a_missing_column(w: World) -> Arguments:
    return template(w, "Q: {question}", " {reply}")


@case("data.train", "nothing to learn", "first 4", "data.max_length")
def nothing_left_to_learn(w: World) -> Arguments:
    return w.train({"data.max_length": 4}, data=w.rows({"question": "Why do swallows fly? " * 9, "answer": " So."}))


@case("data.validation", "none", "first 4")
def nothing_left_to_evaluate(w: World) -> Arguments:
    long = w.rows({"question": "Why do swallows fly? " * 9, "answer": " So."}, name="long.jsonl")
    return w.train({"data.max_length": 4, "data.validation": long}, data=w.rows({"text": "Swallows fly."}))


@case("rows.jsonl", "at least two rows")
def share_of_one_row(w: World) -> Arguments:
    return w.train({"data.validation": 0.5}, data=w.rows(ROW))


@case("rows.jsonl:1", "not valid JSON")
def quantize_with_broken_rows(w: World) -> Arguments:
    return ["quantize", w.gpt2, "--out", "out", "--data", w.file("rows.jsonl", "oops\n")]


@case("missing.jsonl", "no such data file")
def eval_of_missing_rows(w: World) -> Arguments:
    return ["eval", w.gpt2, "--data", "missing.jsonl"]


@case("missing.jsonl", "no such data file")
def merge_verified_on_missing_rows(w: World) -> Arguments:
    return ["merge", w.run(), "--out", "out", "--data", "missing.jsonl"]


@case("runs/typo", "no such model folder")
def eval_of_nothing(w: World) -> Arguments:
    return ["eval", "runs/typo"]


@case("no rows to measure on", "--data")
def eval_without_rows(w: World) -> Arguments:
    return ["eval", w.gpt2]


@case("no rows to measure on", "--data")
def eval_of_a_run_without_validation_rows(w: World) -> Arguments:
    return ["eval", w.run()]


@case("chat template takes more than", "chat_template.jinja")
def chat_template_that_fills_the_memory(w: World) -> Arguments:
    return templated(w, "{{ 'a' * 10 ** 11 }}")


@case("chat template takes more than", "chat_template.jinja")
def chat_template_that_pads_without_end(w: World) -> Arguments:
    return templated(w, "{{ '%99999999999s' % 'a' }}")


@case("chat template takes more than", "chat_template.jinja")
def chat_template_with_a_number_without_end(w: World) -> Arguments:
    return templated(w, "{{ 10 ** (10 ** 10) % 7 }}")


@case("chat template takes more than", "chat_template.jinja")
def chat_template_of_loops_in_loops(w: World) -> Arguments:
    return templated(w, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")


@case("chat template takes more than", "chat_template.jinja")
def chat_template_that_doubles_a_text(w: World) -> Arguments:
    text = "{% set n = namespace(t='a') %}{% for a in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}"
    return templated(w, text)


@case("chat template", "Range too big")
def chat_template_of_a_long_range(w: World) -> Arguments:
    return templated(w, "{% for a in range(10 ** 9) %}{% endfor %}")


@case("chat template makes 50,0", "characters of one conversation")
def chat_template_of_a_long_text(w: World) -> Arguments:
    return templated(w, "{{ 'a' * 50000000 }}")


@case("chat template refuses the conversation", "recursion")
def chat_template_that_calls_itself(w: World) -> Arguments:
    return templated(w, "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}")


@case("data.template.prompt", "'{question!r:>1000000000}' is no column", "write {column}")
def template_with_a_width(w: World) -> Arguments:
    return template(w, "Q: {question!r:>1000000000}", " {answer}")


@case("data.template.completion", "write {column}")
def template_with_a_width_that_is_a_column(w: World) -> Arguments:
    return template(w, "Q: {question}", " {answer:{question}}")


@case("data.template.prompt", "question[0]", "write {column}")
def template_that_takes_an_index(w: World) -> Arguments:
    return template(w, "Q: {question[0]}", " {answer}")


@case("rows.jsonl", "git lfs pull")
def rows_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", LFS))


@case("rows.txt", "git lfs pull")
def text_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    return w.train(data=w.file("rows.txt", LFS))


@case("data/rows.parquet", "git lfs pull")
def folder_that_git_lfs_did_not_fetch(w: World) -> Arguments:
    w.file("data/rows.parquet", LFS)
    return ["eval", w.gpt2, "--data", "data"]


@case("rows.parquet.gz", "cannot read files of type '.parquet.gz'")
def rows_in_a_compressed_file_of_an_unread_type(w: World) -> Arguments:
    return w.train(data=w.file("rows.parquet.gz", gzip.compress(b"PAR1")))


@case("rows.jsonl.gz: cannot be read", "ended before")
def rows_in_truncated_gzip(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl.gz", gzip.compress(json.dumps(ROW).encode())[:-9]))


@case("rows.jsonl.gz: cannot be read", "Not a gzipped file")
def rows_not_in_gzip_despite_their_name(w: World) -> Arguments:
    return w.train(data=w.rows(ROW, name="rows.jsonl.gz"))


@case("rows.csv.gz:3", "1 cell for 2 columns")
def wrong_row_in_gzip(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv.gz", gzip.compress(b"question,answer\nWhy?,So.\nWhy?\n")))


@case("rows.jsonl:1", "not UTF-8", "0x8b")
def rows_in_gzip_under_another_name(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", gzip.compress(b"{}\n")))


@case("rows.arrow", "cannot read files of type '.arrow'")
def rows_in_arrow(w: World) -> Arguments:
    return w.train(data=w.file("rows.arrow", b"ARROW1"))


@case("rows.jsonl:1", "not UTF-8", "save the file as UTF-8")
def rows_in_utf_16(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", json.dumps(ROW).encode("utf-16")))


@case("rows.jsonl:1", "not valid JSON")
def rows_in_utf_16_without_a_mark(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", json.dumps(ROW).encode("utf-16-le")))


@case("rows.txt:1", "not UTF-8")
def text_in_utf_16(w: World) -> Arguments:
    return w.train(data=w.file("rows.txt", "Swallows fly.".encode("utf-16")))


@case("rows.jsonl", "holds no rows")
def rows_of_a_byte_order_mark(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", b"\xef\xbb\xbf\n"))


@case("rows.txt", "holds no rows")
def text_of_white_space(w: World) -> Arguments:
    return w.train(data=w.file("rows.txt", " \n\t\n\r\n"))


@case("rows.jsonl:1", "duplicate key", "answer")
def row_with_a_key_twice(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", '{"question": "Why?", "answer": "a", "answer": "b"}\n'))


@case("rows.json", "duplicate key", "answer")
def json_with_a_key_twice(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", '[{"question": "Why?", "answer": "a", "answer": "b"}]'))


@case("rows.jsonl:1", "not valid JSON")
def row_with_a_number_without_end(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", '{"question": "Why?", "answer": ' + "1" * 5000 + "}\n"))


@case("rows.jsonl:1", "not valid JSON", "recursion")
def row_nested_without_end(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", '{"question": ' + "[" * 100_000 + "\n"))


@case("rows.json", "not valid JSON")
def json_that_ends_too_soon(w: World) -> Arguments:
    return w.train(data=w.file("rows.json", json.dumps([ROW, ROW])[:-9]))


@case("rows.jsonl:2", "not valid JSON")
def torn_last_line(w: World) -> Arguments:
    return w.train(data=w.file("rows.jsonl", json.dumps(ROW) + "\n" + json.dumps(ROW)[:-9]))


@case("rows.jsonl:2", "column 'text' holds a list")
def text_that_is_a_list(w: World) -> Arguments:
    return w.train(data=w.rows({"text": "Swallows fly."}, {"text": ["Swallows", "fly."]}))


@case("rows.csv:1", "semicolons", "commas")
def csv_with_semicolons(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", "question;answer\na;b\n"))


@case("rows.tsv:1", "separated by commas", "tabs between columns")
def commas_in_a_file_of_tabs(w: World) -> Arguments:
    return w.train(data=w.file("rows.tsv", "question,answer\na,b\n"))


@case("rows.csv:2", "no format has these columns", "Why?, Because.")
def csv_without_a_header(w: World) -> Arguments:
    return w.train(data=w.file("rows.csv", "Why?,Because.\nWhen?,Now.\n"))


@case("rows.jsonl:1", "preference rows", "data.columns: {completion: chosen}")
def preferences_beside_a_prompt(w: World) -> Arguments:
    return w.train(data=w.rows({"question": "Why?", "chosen": "Because.", "rejected": "No."}))


@case("rows.jsonl:1", "preference rows", "data.columns: {messages: chosen}")
def preferences_of_whole_conversations(w: World) -> Arguments:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    return w.train(data=w.rows({"prompt": "Why?", "chosen": turns, "rejected": turns}))


@case("rows.jsonl:1", "preference rows", "data.columns: {text: chosen}")
def preferences_of_whole_texts(w: World) -> Arguments:
    return w.train(data=w.rows({"chosen": "H: Why? A: Because.", "rejected": "H: Why? A: No."}))


@case("rows.parquet", "not a readable Parquet file")
def parquet_that_ends_too_soon(w: World) -> Arguments:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["Swallows fly."] * 100}), w.root / "rows.parquet")
    w.truncate("rows.parquet", 0.9)
    return w.train(data="rows.parquet")


@case("rows.parquet", "no format has these columns", "number")
def parquet_of_other_columns(w: World) -> Arguments:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"number": [1, 2]}), w.root / "rows.parquet")
    return w.train(data="rows.parquet")


@case("loop.jsonl: cannot be read", "symbolic links")
def rows_that_are_a_link_to_themselves(w: World) -> Arguments:
    (w.root / "loop.jsonl").symlink_to("loop.jsonl")
    return w.train(data="loop.jsonl")


@case("folder/gone.jsonl: cannot be read", "No such file")
def rows_beside_a_link_to_nothing(w: World) -> Arguments:
    w.rows(ROW, name="folder/rows.jsonl")
    (w.root / "folder/gone.jsonl").symlink_to("nowhere.jsonl")
    return w.train(data="folder")


@case("rows.jsonl", "cannot be read", "Permission denied")
def rows_that_may_not_be_read(w: World) -> Arguments:
    (w.root / w.rows(ROW)).chmod(0)
    if os.access(w.root / "rows.jsonl", os.R_OK):
        pytest.skip("root may read everything")
    return w.train(data="rows.jsonl")


@case("rows.jsonl:2", "messages[1]", "a number")
def chat_with_a_number_for_words(w: World) -> Arguments:
    return chat(w, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": 5}])


@case("rows.jsonl:2", "messages[0]", "unknown role None")
def chat_without_a_role(w: World) -> Arguments:
    return chat(w, [{"content": "Hi"}])


@case("rows.jsonl:2", "messages", "list of turns")
def chat_that_is_an_object(w: World) -> Arguments:
    return chat(w, {"role": "user", "content": "Hi"})


@case("rows.jsonl:2", "messages[0]", "unknown role ['user']")
def chat_with_a_list_for_a_role(w: World) -> Arguments:
    return chat(w, [{"role": ["user"], "content": "Hi"}])


@case("nothing to learn", "check that the rows have answers")
def chat_without_an_answer(w: World) -> Arguments:
    turn = {"role": "user", "content": "Hi"}
    return w.train(
        {"data.format": "chat", "model.name_or_path": w.llama}, data=w.rows({"messages": [turn]}, {"messages": [turn]})
    )


def templated(w: World, text: str) -> Arguments:
    w.file(f"{w.model('llama')}/chat_template.jinja", text)
    rows = w.rows({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    return w.train({"data.format": "chat", "model.name_or_path": "model"}, data=rows)
