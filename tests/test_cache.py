"""The cache of tokenized rows, by content: read if nothing changed, rebuilt if anything did, not trusted if damaged."""

from __future__ import annotations

import copy
import datetime
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Run, done, free_port, write_rows

from lora_cli.data import gather
from lora_cli.data.audit import audit
from lora_cli.data.batches import collate
from lora_cli.data.cache import Cached, prune, publish, tokenize_cached, withdraw
from lora_cli.data.examples import Examples, fit
from lora_cli.data.sources import sources_of
from lora_cli.data.tokenize import Tokenized, tokenize
from lora_cli.errors import RunError, UserError
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Data, Source
from lora_cli.system.disk import in_neighbours
from lora_cli.training.distributed.cache_keys import publish_keys
from lora_cli.training.prepare import prepare
from lora_cli.training.run.lock import check_unlocked, locked

ROWS = [
    {"prompt": "Why?", "completion": " Because.", "text": "T"},
    {"prompt": "Who?", "completion": " I.", "text": "U"},
]
READ = "tokenized rows read from"


def cached(tokenizer: Any, folder: Path, train: Any, published: Any = None, **settings: Any) -> Cached:
    data = Data(train=train, **settings)
    return tokenize_cached(data, sources_of(data.train), tokenizer, folder / "cache", published)


@pytest.fixture
def rows_file(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def test_what_is_read_is_what_was_tokenized(tokenizer: Any, tmp_path: Path, rows_file: str) -> None:
    wanted = tokenize(Data(train=rows_file), sources_of(rows_file), tokenizer)
    first = cached(tokenizer, tmp_path, rows_file)
    assert first.fresh and not (tmp_path / "cache").exists(), "nothing is written before it is published"
    parts = [first]
    assert publish(tmp_path / "cache", parts) == [tmp_path / "cache", tmp_path / "cache" / f"{first.key}.safetensors"]
    assert parts == []

    again = cached(tokenizer, tmp_path, rows_file)
    assert (again.fresh, again.key) == (False, first.key)
    for found in (first.tokenized.examples, again.tokenized.examples):
        assert found.format == wanted.format == "prompt_completion"
        assert found.fingerprint == wanted.fingerprint
        assert found.source.tolist() == wanted.source.tolist()
        for name in ("ids", "supervised", "offsets"):
            one, other = (getattr(each, name) for each in (found.flat(), wanted.flat()))
            assert one.dtype == other.dtype and one.flags.aligned and np.array_equal(one, other)
    assert publish(tmp_path / "cache", [again]) == []


def resident(file: Path) -> int:
    """Bytes of the mapped file that are resident in this process's memory."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_many_tokens_go_to_the_disk_as_they_come(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only few tokens are held in memory at a time, the rows are unchanged, and their files have no names."""
    texts = [{"text": f"{n}: boats in the harbour. " * (n % 7 + 1)} for n in range(800)]  # leaves a small last part
    rows = write_rows(tmp_path / "rows.jsonl", texts)

    wanted = cached(tokenizer, tmp_path, rows).tokenized.examples
    held: list[int] = []
    monkeypatch.setattr("lora_cli.data.gather.BUFFER_TOKENS", 5000)
    write = gather._write

    def watched(parts: list[Examples], *others: Any) -> None:
        held.append(sum(part.tokens for part in parts))
        write(parts, *others)

    monkeypatch.setattr(gather, "_write", watched)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))  # not used: they go into the run's folder
    before = set(tmp_path.rglob("*"))
    part = cached(tokenizer, tmp_path, rows)
    found = part.tokenized.examples
    assert set(tmp_path.rglob("*")) == before
    assert len(held) > 3 and max(held) < 5000 + 250 * 80 < wanted.tokens
    assert min(held[:-1]) >= 5000
    assert len(found.store.mappings) == 2
    assert found.fingerprint == wanted.fingerprint
    publish(tmp_path / "cache", [part])
    again = cached(tokenizer, tmp_path, rows)
    assert not again.fresh and again.tokenized.examples.fingerprint == wanted.fingerprint


def test_a_disk_too_small_for_many_tokens_is_told(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"{n}: boats in the harbour. " * 9} for n in range(900)])
    monkeypatch.setattr("lora_cli.data.gather.BUFFER_TOKENS", 5000)
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, most))
    try:
        with pytest.raises(RunError, match=r"tokenized rows.*could not be written: File too large"):
            cached(tokenizer, tmp_path, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        signal.signal(signal.SIGXFSZ, former)


def test_tokens_stay_on_the_disk(tokenizer: Any, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"text": f"{n}: the boats stay in the harbour. " * 30} for n in range(900)]
    )
    parts = [cached(tokenizer, tmp_path, rows)]
    first = parts[0].tokenized.examples
    assert not first.store.mappings
    wanted = first.fingerprint
    *_, file = publish(tmp_path / "cache", parts)
    again = cached(tokenizer, tmp_path, rows).tokenized.examples
    for examples in (first, again):
        assert len(examples.store.mappings) == 1
        assert examples.store.ids.sum() > 0
        touched = resident(file)
        assert touched > examples.store.ids.nbytes / 2 > 200_000
        assert replace(examples).fingerprint == wanted
        fitted = fit(examples, 100, "rows")
        assert fitted.examples.store is examples.store and fitted.truncated == 900
        audit(examples, fitted, again.select([3, 1]), tokenizer, Tokenized(examples, 0))
        batch = collate(fitted.examples, [5, 899], packing=True, pad_token_id=0)
        assert batch.input_ids[0, :100].tolist() == examples.row(5)[0][:100].tolist()
        examples.store.release()
        collate(fitted.examples, list(range(0, 900, 10)), packing=True, pad_token_id=0)
        assert resident(file) == 0


def test_the_key_is_of_contents_alone(tokenizer: Any, tmp_path: Path, rows_file: str) -> None:
    key = cached(tokenizer, tmp_path, rows_file).key
    os.utime(rows_file, (1, 1))
    assert cached(tokenizer, tmp_path, rows_file).key == key
    (tmp_path / "deep").mkdir()
    moved = shutil.copy(rows_file, tmp_path / "deep" / "other.jsonl")
    assert cached(tokenizer, tmp_path, str(moved)).key == key
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=3))
    assert cached(tokenizer, tmp_path, str(tmp_path / "rows.json")).key == key
    called = copy.deepcopy(tokenizer)
    called(["some text"], truncation=True, max_length=2, padding=True)
    assert cached(called, tmp_path, rows_file).key == key
    assert cached(tokenizer, tmp_path, rows_file, max_length=7, packing=False).key == key


def other_tokenizer(tokenizer: Any, change: str) -> Any:
    other = copy.deepcopy(tokenizer)
    if change == "chat template":
        other.chat_template = "{{ messages }}"
    elif change == "a token":
        other.add_tokens(["Because"])
    elif change == "split tokens":  # the effect of split_special_tokens in tokenizer_config.json
        other.backend_tokenizer.encode_special_tokens = True
    else:
        other.eos_token = "<|pad|>"
    return other


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([ROWS[0], ROWS[1] | {"completion": " You."}], {}),
        ([ROWS[0], ROWS[1] | {"more": None}], {}),
        ([ROWS[1], ROWS[0]], {}),
        ([*ROWS, ROWS[1]], {}),
        (ROWS[:1], {}),
        (ROWS, {"format": "text"}),
        (ROWS, {"train_on": "all"}),
        (ROWS, {"columns": {"prompt": "text"}}),
        (ROWS, {"template": {"prompt": "{prompt}", "completion": "{completion}"}}),
        (ROWS, {"template": {"prompt": "{prompt} ", "completion": "{completion}"}}),
        (ROWS, {"train": "a mixture"}),
        *((ROWS, {"tokenizer": change}) for change in ("chat template", "a token", "split tokens", "end of text")),
    ],
)
def test_whatever_changes_tokens_changes_the_key(
    rows: list[dict[str, Any]], settings: dict[str, Any], tokenizer: Any, tmp_path: Path, rows_file: str
) -> None:
    before = cached(tokenizer, tmp_path, rows_file)
    publish(tmp_path / "cache", [before])
    train: Any = write_rows(tmp_path / "changed.jsonl", rows)
    settings = dict(settings)
    if settings.pop("train", None):
        train = tuple(Source(path=write_rows(tmp_path / f"{n}.jsonl", [row])) for n, row in enumerate(rows))
    other = other_tokenizer(tokenizer, settings["tokenizer"]) if "tokenizer" in settings else tokenizer
    settings.pop("tokenizer", None)
    after = cached(other, tmp_path, train, **settings)
    assert after.fresh and after.key != before.key


def flip(content: bytearray, at: int) -> bytes:
    content[at] ^= 1
    return bytes(content)


def put(file: Path, content: bytes) -> None:
    """Replace the file by a new one, since the old one is memory-mapped."""
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"garbage" * 9,
        lambda content: flip(content, -1),  # the last array's last byte
        lambda content: flip(content, len(content) // 2),
        lambda content: content.replace(b'"BOOL"', b'"U8"  '),
        lambda content: content.replace(b"prompt_completion", b"prompt_completioN"),
        lambda content: content.replace(b'bos_removed\\": 0', b'bos_removed\\": 1'),
        lambda content: content.replace(b'"about":', b'"abort":'),
        lambda content: content.replace(b'"source":', b'"sauce_":'),
    ],
)
def test_a_damaged_file_is_not_trusted(
    damage: Callable[[bytearray], bytes], tokenizer: Any, tmp_path: Path, rows_file: str
) -> None:
    first = cached(tokenizer, tmp_path, rows_file)
    *_, file = publish(tmp_path / "cache", [first])
    whole = file.read_bytes()
    put(file, damage(bytearray(whole)))
    assert file.read_bytes() != whole
    again = cached(tokenizer, tmp_path, rows_file)
    assert again.fresh
    assert again.tokenized.examples.fingerprint == first.tokenized.examples.fingerprint
    publish(tmp_path / "cache", [again])
    assert file.read_bytes() == whole


def test_a_file_under_another_files_name_is_not_trusted(tokenizer: Any, tmp_path: Path, rows_file: str) -> None:
    one = cached(tokenizer, tmp_path, rows_file)
    two = cached(tokenizer, tmp_path, rows_file, train_on="all")
    _, first, second = publish(tmp_path / "cache", [one, two])
    put(first, second.read_bytes())
    assert cached(tokenizer, tmp_path, rows_file).fresh
    assert not cached(tokenizer, tmp_path, rows_file, train_on="all").fresh


def test_only_what_the_run_reads_is_kept(tokenizer: Any, tmp_path: Path, rows_file: str) -> None:
    cache = tmp_path / "cache"
    kept, left = (cached(tokenizer, tmp_path, rows_file, train_on=choice) for choice in ("completion", "all"))
    publish(cache, [kept, left])
    (cache / f".{kept.key}.{'0' * 32}").write_bytes(b"a draft of a process that was killed")
    (cache / "notes.safetensors").write_bytes(b"somebody's")
    prune(cache, {kept.key})
    assert sorted(file.name for file in cache.iterdir()) == sorted([f"{kept.key}.safetensors", "notes.safetensors"])
    prune(tmp_path / "nowhere", set())


def test_withdrawing_leaves_what_was_there(tokenizer: Any, tmp_path: Path, rows_file: str) -> None:
    part = cached(tokenizer, tmp_path, rows_file)
    made = publish(tmp_path / "runs" / "new" / "cache", [part])
    withdraw(made)
    assert not (tmp_path / "runs").exists()
    made = publish(tmp_path / "runs" / "new" / "cache", [part])
    (tmp_path / "runs" / "other").mkdir()
    withdraw(made)
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["other"]
    publish(tmp_path / "cache", [part])
    withdraw(publish(tmp_path / "cache", [part]))
    assert not cached(tokenizer, tmp_path, rows_file).fresh


def test_rows_are_those_that_another_process_has_published(tokenizer: Any, tmp_path: Path, rows_file: str) -> None:
    first = cached(tokenizer, tmp_path, rows_file)
    *_, file = publish(tmp_path / "cache", [first])
    found = cached(tokenizer, tmp_path, rows_file, published=lambda: {first.key, "another"})
    assert not found.fresh
    assert found.tokenized.examples.fingerprint == first.tokenized.examples.fingerprint
    with pytest.raises(UserError, match="this process has other rows or another tokenizer"):
        cached(tokenizer, tmp_path, rows_file, published=lambda: {"another"})
    put(file, file.read_bytes()[:-1])
    with pytest.raises(RunError, match="cannot be read"):
        cached(tokenizer, tmp_path, rows_file, published=lambda: {first.key})


def test_a_machines_other_processes_take_what_its_first_has_read(
    write_recipe: Any, tmp_path: Path, qa_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    separate = shutil.copy(qa_file, tmp_path / "held_out.jsonl")
    recipe = load_recipe(write_recipe({"data.validation": str(separate), "data.train_on": "all"}))
    first = prepare(recipe, resume=False, overwrite=False)
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "RANK": "0"}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    publish(first.folder.cache, first.tokenized)
    store = publish_keys(first.cache_keys)
    assert store is not None
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    found = prepare(recipe, resume=False, overwrite=False)
    assert (found.read_from, first.read_from) == (found.folder.cache, None)
    assert found.train.examples.fingerprint == first.train.examples.fingerprint
    assert found.validation and first.validation
    assert found.validation.fingerprint == first.validation.fingerprint
    assert publish(found.folder.cache, found.tokenized) == []
    assert publish_keys(found.cache_keys) is None

    qa_file.write_text(qa_file.read_text().replace("lamp", "lamb", 1))
    with pytest.raises(UserError, match=r"qa\.jsonl: this process has other rows"):
        prepare(recipe, resume=False, overwrite=False)


def test_a_run_tokenizes_once(write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None, qa_file: Path) -> None:
    held_out = shutil.copy(qa_file, tmp_path / "held_out.jsonl")
    write_rows(held_out, [{"question": "Who?", "answer": " I."}])
    recipe = write_recipe({"data.validation": str(held_out), "training.max_steps": 1})
    run = tmp_path / "run"
    results = [lora("train", recipe)]
    files = sorted((run / "cache").iterdir())
    assert len(files) == 2
    assert READ not in results[0].stderr

    os.utime(qa_file, (1, 1))
    results += [lora("train", recipe, "--overwrite"), lora("train", recipe, "training.max_steps=2", "--resume")]
    for result in results[1:]:
        assert f"{READ} {run / 'cache'}" in result.stderr
    write_rows(held_out, [{"question": "Who?", "answer": " You."}])
    results.append(lora("train", recipe, "--overwrite"))
    assert READ not in results[-1].stderr, "not all rows were"
    results.append(lora("train", recipe, "data.train_on=all", "--overwrite"))
    assert READ not in results[-1].stderr
    assert len(set(files) | set((run / "cache").iterdir())) == 4, "files of other keys are gone, new ones there"
    assert not set(files) & set((run / "cache").iterdir())
    shutil.move(qa_file, tmp_path / "moved.jsonl")
    arguments = [f"data.train={tmp_path / 'moved.jsonl'}", "data.train_on=all", "--overwrite"]
    results.append(lora("train", recipe, *arguments))
    assert READ in results[-1].stderr
    assert [result.exit_code for result in results] == [0] * 6, results[-1].stderr


@pytest.mark.parametrize("links", [True, False])
def test_a_run_beside_takes_them(
    links: bool,
    train: Callable[..., Run],
    write_recipe: Any,
    tmp_path: Path,
    lora: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many runs on the same rows tokenize them once and keep them once, where the disk has links."""
    first = train({"training.max_steps": 1}).folder
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: os.link("no", "file"))
    recipe = write_recipe({"training": {"max_steps": 1, "output_dir": str(tmp_path / "second")}})
    result = done(lora("train", recipe))
    assert f"{READ} {first / 'cache'}" in result.stderr
    (there,), (here,) = ((run / "cache").iterdir() for run in (first, tmp_path / "second"))
    assert here.name == there.name and here.samefile(there) == links
    assert here.read_bytes() == there.read_bytes()
    shutil.rmtree(first)
    assert f"{READ} {here.parent}" in done(lora("train", recipe, "--overwrite")).stderr


def test_what_another_users_run_keeps_or_is_damaged_is_not_taken(
    tokenizer: Any, tmp_path: Path, rows_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached(tokenizer, tmp_path / "runs" / "first", rows_file)
    *_, file = publish(tmp_path / "runs" / "first" / "cache", [first])
    assert cached(tokenizer, tmp_path / "runs" / "second", rows_file).neighbour == file
    with monkeypatch.context() as patch:
        patch.setattr("os.getuid", lambda: file.stat().st_uid + 1)
        assert cached(tokenizer, tmp_path / "runs" / "second", rows_file).neighbour is None
    put(file, file.read_bytes()[:-1] + b"x")
    assert cached(tokenizer, tmp_path / "runs" / "second", rows_file).neighbour is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root may make what belongs to another user")
@pytest.mark.parametrize("link", ["runs/other", "runs/other/cache", "runs/other/cache/file"])
def test_what_another_users_link_leads_to_is_not_taken(link: str, tmp_path: Path) -> None:
    """It may lead to a file of this user when it is checked, and to another when it is read."""
    place, target = tmp_path / link, tmp_path / link.replace("runs/other", "mine")
    (tmp_path / "mine/cache").mkdir(parents=True)
    (tmp_path / "mine/cache/file").touch()
    place.parent.mkdir(parents=True)
    place.symlink_to(target)
    own = tmp_path / "runs" / "own" / "cache"
    assert [*in_neighbours(own, "file")] == [tmp_path / "runs/other/cache/file"]
    os.lchown(place, 12345, 12345)
    assert not [*in_neighbours(own, "file")]


def test_a_folder_that_holds_a_cache_alone_takes_a_run(
    write_recipe: Any, tmp_path: Path, lora: Any, no_curves: None
) -> None:
    recipe = write_recipe({"training.max_steps": 1})
    assert lora("train", recipe).exit_code == 0
    for path in (tmp_path / "run").iterdir():
        if path.name != "cache":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = done(lora("train", recipe))
    assert READ in result.stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cache").write_text("a file")
    result = lora("train", recipe, f"training.output_dir={tmp_path / 'other'}")
    assert result.exit_code == 2
    assert "not empty" in result.stderr


def test_a_cache_that_cannot_be_written_fails_the_run(write_recipe: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "long.jsonl", [{"text": "The boats stay in the harbour. " * 400}] * 20)
    refused = subprocess.run(
        [sys.executable, "-m", "lora_cli", "train", str(write_recipe({"data.train": rows}))],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert refused.returncode == 3, refused.stderr
    assert f"{tmp_path / 'run' / 'cache'}{os.sep}" in refused.stderr
    assert "bytes are needed" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not any(path.is_file() for path in (tmp_path / "run").rglob("*"))


def test_a_folder_that_a_run_is_at_work_in_is_refused_by_the_check(tmp_path: Path) -> None:
    check_unlocked(tmp_path)
    with locked(tmp_path), pytest.raises(UserError, match="another run is using"):
        check_unlocked(tmp_path)


@pytest.mark.parametrize("depth", [10, 400, 900, 990, 5000, 100_000])
def test_deeply_nested_rows_are_read_or_told(depth: int, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"text": "a", "more": ' + "[" * depth + "]" * depth + "}\n")
    try:
        found = cached(tokenizer, tmp_path, str(tmp_path / "deep.jsonl"))
    except UserError as error:
        assert error.faults[0].where == f"{tmp_path / 'deep.jsonl'}:1"
    else:
        assert len(found.tokenized.examples) == 1


def test_values_that_json_has_no_word_for_are_counted_in(tokenizer: Any, tmp_path: Path) -> None:
    odd = {"a": b"\xff\x00", "b": datetime.datetime(2024, 7, 26), "c": Decimal("1.5"), "d": float("nan")}
    for name in ("one", "two"):
        columns = {"text": ["a"], **{key: [value] for key, value in odd.items()}}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    one, two = (cached(tokenizer, tmp_path, str(tmp_path / f"{name}.parquet")).key for name in ("one", "two"))
    assert one == two
