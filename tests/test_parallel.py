"""Rows tokenized in several processes: the same tokens, the same errors, and no process left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import psutil
import pytest
from conftest import write_rows

from lora_cli.data import parallel
from lora_cli.data.sources import sources_of
from lora_cli.data.tokenize import ROWS_AT_ONCE, tokenize
from lora_cli.errors import RunError, UserError
from lora_cli.recipe.schema import Data, Source

TEMPLATE = (
    "{% for m in messages %}{% if 'refused' in m.content %}{{ raise_exception('not that') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
COUNT = 3 * ROWS_AT_ONCE


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start other processes right after the first chunk of rows."""
    monkeypatch.setattr(parallel, "SERIAL_SECONDS", 0.0)
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)


def mixture(folder: Path, refused: int | None = None) -> tuple[Source, ...]:
    """Chat rows, then questions with answers. The chat template refuses chat row number ``refused``."""
    chat = [
        [
            {"role": "user", "content": f"Boat {number}?"},
            {"role": "assistant", "content": "refused" if number == refused else f"No. {number * 7}, at sea."},
        ]
        for number in range(1, COUNT + 1)
    ]
    written = {"chat": [{"messages": turns} for turns in chat]}
    written["qa"] = [{"question": "Who sails?", "answer": f" {number} men."} for number in range(COUNT + 1)]
    return tuple(Source(path=write_rows(folder / f"{name}.jsonl", rows)) for name, rows in written.items())


def test_tokens_are_those_of_one_process(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    data = Data(train=mixture(tmp_path))
    alone = tokenize(data, sources_of(data.train), tokenizer)
    submitted = []
    original = parallel.ProcessPoolExecutor.submit

    def submit(pool: Any, function: Any, chunk: Any) -> Any:
        submitted.append(len(chunk.rows))
        return original(pool, function, chunk)

    monkeypatch.setattr(parallel.ProcessPoolExecutor, "submit", submit)
    monkeypatch.setattr(parallel, "SERIAL_SECONDS", 0.0)
    monkeypatch.setattr(parallel, "usable_cores", lambda: 2)
    together = tokenize(data, sources_of(data.train), tokenizer)
    assert sum(submitted) == 2 * COUNT + 1 - ROWS_AT_ONCE, "the first rows are not waited with"
    assert together.source.tolist() == alone.source.tolist()
    assert together.format == alone.format == "chat+prompt_completion"
    for name in ("ids", "supervised", "offsets"):
        one, other = (getattr(each, name) for each in (alone.flat(), together.flat()))
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert tokenizer(f"Boat {COUNT}?").input_ids[-1] in together.row(COUNT - 1)[0]


@pytest.mark.usefixtures("at_once")
def test_the_first_wrong_row_is_told(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    data = Data(train=mixture(tmp_path, refused=COUNT - 1))
    with (tmp_path / "qa.jsonl").open("a") as file:
        file.write('{"question": 5, "answer": "x"}\n')
    with pytest.raises(UserError) as told:
        tokenize(data, sources_of(data.train), tokenizer)
    (fault,) = told.value.faults
    assert fault.where == f"{tmp_path / 'chat.jsonl'}:{COUNT - 1}"
    assert "not that" in fault.what
    mixture(tmp_path)
    with (tmp_path / "qa.jsonl").open("a") as file:
        file.write('{"question": 5, "answer": "x"}\n')
    with pytest.raises(UserError) as told:
        tokenize(data, sources_of(data.train), tokenizer)
    assert told.value.faults[0].where == f"{tmp_path / 'qa.jsonl'}:{COUNT + 2}"


@pytest.mark.usefixtures("at_once")
def test_a_killed_process_ends_the_run() -> None:
    with pytest.raises(RunError, match="was killed"):
        list(parallel.in_order(forked.double_or_die, iter(range(9))))
    assert list(parallel.in_order(forked.double, iter(range(9)))) == list(range(0, 18, 2))


@pytest.mark.usefixtures("at_once")
def test_semaphores_that_cannot_be_made_are_told_with_their_folder() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # semaphores are files in /dev/shm
    try:
        with pytest.raises(RunError, match=r"File too large\n.*/dev/shm"):
            list(parallel.in_order(forked.double, iter(range(9))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("alone", "cores"), [(60.0, {0, 1}), (0.0, {0})])
def test_little_work_and_one_core_start_no_process(
    alone: float, cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr(parallel, "SERIAL_SECONDS", alone)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", refuse)
    assert list(parallel.in_order(forked.double, iter(range(9)))) == list(range(0, 18, 2))


ENDLESS = """
import itertools, os, sys
os.sched_getaffinity = lambda _: {0, 1}
from lora_cli.data import parallel
import forked
parallel.SERIAL_SECONDS = 0.0
for number in parallel.in_order(forked.double, itertools.count()):
    print(number, flush=True)
"""


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(f"if __name__ == '__main__':\n{ENDLESS.replace(chr(10), chr(10) + '    ')}")
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "endless.py")], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(50):
        assert process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
