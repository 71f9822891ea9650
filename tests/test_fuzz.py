"""Arbitrary recipes, data files and files of a run: each is read, or refused with its place in a few lines.

``LORA_FUZZ=20000 pytest tests/test_fuzz.py --hypothesis-profile=explore`` tries more examples, other ones each time.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import done, run_lora
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_cli.data.faults import row_faults
from lora_cli.data.readers import READERS
from lora_cli.data.sources import Source
from lora_cli.errors import Fault, UserError
from lora_cli.recipe.explain import dotted_keys
from lora_cli.recipe.load import load_recipe
from lora_cli.recipe.schema import Data, Recipe

FUZZ = settings(
    max_examples=int(os.environ.get("LORA_FUZZ", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
LONGEST = 2500  # characters of a fault; a screen has 80 x 40

GOOD_RECIPE = """\
# A recipe with something of everything.
model: {name_or_path: tiny, dtype: bfloat16}
quantization:
  method: nf4
adapter:
  r: &rank 8
  lora_alpha: *rank
  target_modules: [c_attn, 'c_proj', "c_fc"]
data:
  train:
    - path: ${LORA_FUZZ_ROWS:-rows.jsonl}
      weight: 0.5
    - other.jsonl
  columns: {prompt: question}
  template:
    prompt: |
      Q: {question}
    completion: >-
      {answer}
training:
  output_dir: "runs/\\u0061"
  learning_rate: 2e-4
  report_to: []
"""
ROWS: tuple[dict[str, Any], ...] = (
    {"question": "Why?", "answer": " Because."},
    {"question": 'café, "x"', "answer": "two\nlines\r\nand \U0001f600"},
)
CONVERSATION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def parquet(*rows: dict[str, Any]) -> bytes:
    file = BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


GOOD_FILES: dict[str, tuple[bytes, ...]] = {
    ".jsonl": (
        "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS).encode(),
        (json.dumps(CONVERSATION) + "\n").encode(),
    ),
    ".json": (json.dumps(ROWS, indent=1).encode(), json.dumps([CONVERSATION]).encode()),
    ".csv": (b'question,answer\nWhy?, Because.\n"a ""b"", c","two\nlines"\n', b"text\r\none\r\ntwo\r\n"),
    ".tsv": (b'question\tanswer\nWhy?\t Because.\n"a ""b"""\t"two\nlines"\n', b"text\tlabel\r\none, two\t1\r\n"),
    ".parquet": (parquet(*ROWS), parquet(CONVERSATION), parquet({"text": "a"}, {"text": None})),
    ".txt": ("First.\nStill first.\n\n\r\nSecond, in café.\n".encode(),),
}
GOOD_FILES[".ndjson"] = GOOD_FILES[".jsonl"]
PLAIN = [suffix for suffix in READERS if not suffix.endswith(".gz")]
COMPRESSED = [suffix for suffix in READERS if suffix.endswith(".gz")]
GOOD_FILES |= {each: tuple(gzip.compress(file, mtime=0) for file in GOOD_FILES[each[:-3]]) for each in COMPRESSED}
ODD = (
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b[2J", b"\r", b"\n", b'"', b"\\ud800", b"\\u0000"),
    *(b"1" * 5000, b"1e999", b"-1E-999", b"NaN", b"Infinity", b"null", b"[" * 10_000, b'{"a":' * 10_000, b"]}"),
    *(b"long " * 2000, b"\xe2\x80\xa8", b"\x85", b",", b";", b"\t", b'""', b"{}", b"[]", b'{"text": {}}\n', b"PAR1"),
)


@st.composite
def mutated(draw: st.DrawFn, good: Sequence[bytes], odd: Sequence[bytes]) -> bytes:
    """One of ``good`` with a few pieces removed, inserted, repeated, moved or overwritten."""
    content = bytearray(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 12)))
        match draw(st.sampled_from(["out", "in", "byte", "swap", "double", "cut"])):
            case "out":
                del content[start:end]
            case "in":
                content[start:start] = draw(st.sampled_from(odd) | st.binary(max_size=4))
            case "byte" if start < len(content):
                content[start] = draw(st.integers(0, 255))
            case "swap":
                other = draw(st.integers(0, len(content)))
                piece = content[start:end]
                del content[start:end]
                content[other:other] = piece
            case "double":
                content[start:start] = content[start:end] * draw(st.integers(1, 3))
            case "cut":
                del content[start:]
    return bytes(content)


def told_well(faults: Sequence[Fault]) -> None:
    """Check that every fault names a place, is printable, and fits on a screen."""
    assert faults
    for fault in faults:
        text = str(fault)
        assert fault.where or fault.what.startswith("there may be more")
        assert "Traceback" not in text
        assert len(text) <= LONGEST
        assert len(text.splitlines()) <= 20
        text.encode()
        assert text.replace("\n", "").isprintable(), text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Recipes

_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["${HOME}", "${LORA_FUZZ_UNSET}", "${X:-1}", "$${", "${", "${}", "${A:-${B}}", "nf4", "auto"])
    | st.sampled_from([10**400, -(10**30), 1e308, -0.0, "1e-4", "010", "\x00", "\ud800", "x" * 3000, "\x1b[31m"])
)
_KEYS = st.sampled_from([*Recipe.model_fields, *(key.partition(".")[2] for key in dotted_keys()), "base", "path"])
_VALUES: st.SearchStrategy[Any] = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS | st.text(max_size=3), inner, max_size=4),
    max_leaves=10,
)
_ODD_YAML = tuple(
    piece.encode(errors="surrogatepass")
    for piece in (
        *(
            ": ",
            "- ",
            "\n",
            "  ",
            "\t",
            "*rank",
            "&rank ",
            "!!python/object/apply:os.system [ls]",
            "!!binary x",
            "<<: ",
        ),
        *("---\n", "...\n", "%YAML 9.9\n", "? ", "| ", '"', "'", "#", "[", "{", "}", "]", ",", "${", "${HOME}", "$${"),
        *("\ufeff", "\x00", "\x85", "\u2028", "\ud800", "[" * 3000, "- " * 3000, "1" * 5000, "-.inf", ".nan", "1e999"),
        *("base: recipe.yaml\n", "base: other.yaml\n", "base: /dev/null\n", '"\\UFFFFFFFF"', "x" * 3000, "a: &a [*a]"),
    )
)


def load_or_refuse(path: Path, content: bytes, *overrides: str) -> None:
    path.write_bytes(content)
    try:
        recipe = load_recipe(path, overrides)
    except UserError as error:
        told_well(error.faults)
    else:
        assert isinstance(recipe, Recipe)


@given(st.binary() | mutated([GOOD_RECIPE.encode()], _ODD_YAML))
@FUZZ
def test_any_bytes_as_a_recipe(folder: Path, content: bytes) -> None:
    load_or_refuse(folder / "recipe.yaml", content)


@given(st.dictionaries(_KEYS, st.dictionaries(_KEYS, _VALUES, max_size=5) | _VALUES, max_size=6))
@FUZZ
def test_any_document_of_the_schemas_own_keys(folder: Path, document: dict[str, Any]) -> None:
    load_or_refuse(folder / "recipe.yaml", json.dumps(document).encode())


@given(st.sampled_from(dotted_keys()), _VALUES)
@FUZZ
def test_any_value_of_any_key(folder: Path, key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    load_or_refuse(folder / "recipe.yaml", GOOD_RECIPE.encode(), f"{key}={json.dumps(value)}")
    (folder / "other.yaml").write_bytes(GOOD_RECIPE.encode())
    document = {"base": "other.yaml", section: {name: value}}
    load_or_refuse(folder / "recipe.yaml", json.dumps(document).encode())


@given(st.lists(st.text(max_size=30) | mutated([b"adapter.r=[1, {a: 2}]"], _ODD_YAML).map(os.fsdecode), max_size=4))
@FUZZ
def test_any_overrides(folder: Path, overrides: list[str]) -> None:
    load_or_refuse(folder / "recipe.yaml", GOOD_RECIPE.encode(), *overrides)


def test_aliases_that_would_fill_the_memory(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    load_or_refuse(folder / "recipe.yaml", "\n".join(lines).encode())


# Rows

DATA = (
    Data(train="x"),
    Data(train="x", format="text"),
    Data(train="x", format="chat"),
    Data(train="x", format="alpaca"),
    Data.model_validate({"train": "x", "template": {"prompt": "{question}", "completion": "{answer}"}}),
)


def read_or_refuse(path: Path, content: bytes, data: Data) -> None:
    path.write_bytes(content)
    if faults := row_faults(data, [Source(path=str(path))], set(), set()):
        assert len(faults) <= 11
        told_well(faults)
        assert all(str(path) in fault.where for fault in faults if fault.where)


@pytest.mark.parametrize("suffix", READERS)
@given(st.data())
@FUZZ
def test_any_bytes_as_rows(folder: Path, suffix: str, draw: st.DataObject) -> None:
    content = draw.draw(mutated(GOOD_FILES[suffix], ODD) | st.binary() | mutated([b""], ODD))
    read_or_refuse(folder / f"rows{suffix}", content, draw.draw(st.sampled_from(DATA)))


_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
_COLUMNS = st.sampled_from(
    [
        "text",
        "question",
        "answer",
        "prompt",
        "completion",
        "messages",
        "conversations",
        "system",
        "instruction",
        "output",
    ]
)
_TURN = st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), _JSON | st.sampled_from(["user", "gpt"]))
_ROW = st.dictionaries(_COLUMNS | st.text(max_size=3), _JSON | st.lists(_TURN | _JSON, max_size=3), max_size=4)


@given(st.lists(_ROW | _JSON, max_size=4), st.sampled_from(DATA))
@FUZZ
def test_any_values_as_rows(folder: Path, rows: list[Any], data: Data) -> None:
    read_or_refuse(folder / "rows.json", json.dumps(rows).encode(), data)
    read_or_refuse(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode(), data)


@pytest.mark.parametrize("suffix", PLAIN)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "latin-1", "cp1252", "utf-16-le", "utf-7"])
def test_rows_in_other_encodings_are_read_or_refused(folder: Path, suffix: str, encoding: str) -> None:
    for good in GOOD_FILES[suffix]:
        content = good if suffix == ".parquet" else good.decode().encode(encoding, errors="replace")
        read_or_refuse(folder / f"rows{suffix}", content, DATA[0])


@pytest.mark.parametrize("suffix", [*(suffix for suffix in PLAIN if suffix != ".parquet"), ".jsonl.gz"])
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: repr(odd[:12]))
def test_odd_pieces_alone_and_at_every_border(folder: Path, suffix: str, odd: bytes) -> None:
    good = GOOD_FILES[suffix][0]
    for content in (odd, odd * 3, odd + good, good + odd, good[: len(good) // 2] + odd + good[len(good) // 2 :]):
        read_or_refuse(folder / f"rows{suffix}", content, DATA[0])


ARROW = [
    pa.array([b"\xff\x00"]),
    pa.array([b"text"]).cast(pa.string()),
    pa.array([2**63 - 1]),
    pa.array([float("nan")]),
    pa.array([None]),
    pa.array([{"a": 1}]),
    pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    pa.array([2**62], pa.timestamp("ns")),
    pa.array([2**60], pa.duration("s")),
    pa.array([2**60], pa.timestamp("us", "Nowhere/Land")),
    pa.array(["a"]).dictionary_encode(),
    pa.array([[CONVERSATION["messages"]]]),
]


@pytest.mark.parametrize("column", ARROW, ids=lambda column: str(column.type)[:30])
def test_columns_of_any_type(folder: Path, column: pa.Array) -> None:
    for names in (["text"], ["messages"], ["question"]):
        file = BytesIO()
        pq.write_table(pa.table([column], names=names), file)
        for data in DATA:
            read_or_refuse(folder / "rows.parquet", file.getvalue(), data)


# A run's own files

FEW = settings(FUZZ, max_examples=max(10, FUZZ.max_examples // 6))
LAST = "checkpoints/step-00000002"
OWN_FILES = ("run.json", "metrics.jsonl", f"{LAST}/manifest.json", f"{LAST}/state.json")


@pytest.fixture(scope="module")
def trained(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint of each."""
    home = tmp_path_factory.mktemp("trained")
    (home / "rows.jsonl").write_text(f"{json.dumps(ROWS[0])}\n" * 8)
    recipe = {
        "model": {"name_or_path": str(tiny_gpt2), "dtype": "float32"},
        "adapter": {"r": 1, "target_modules": ["c_attn"]},
        "data": {"train": str(home / "rows.jsonl"), "validation": 0.25},
        "training": {"output_dir": str(home / "run"), "max_steps": 2, "save_steps": 1},
    }
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done(run_lora("train", home / "recipe.yaml"))
    return home


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """The document with one of its values, at any depth, removed or replaced."""
    if not isinstance(document, dict | list) or not document or draw(st.integers(0, 5)) == 0:
        return draw(_JSON | _LEAVES | st.just([document]) | st.just({"a": document}))
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key, changed = draw(st.sampled_from(keys)), document.copy()
    if draw(st.integers(0, 3)) == 0:
        del changed[key]
    else:
        changed[key] = draw(altered(changed[key]))
    return changed


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of one JSON document or of JSON lines, with changed values or changed bytes."""
    if draw(st.booleans()):
        return draw(mutated([content], ODD))
    lines = content.splitlines() if content.count(b"\n{") else [content]
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(draw(altered(json.loads(lines[at])))).encode()
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize("name", OWN_FILES)
@given(st.data())
@FEW
def test_any_content_of_a_runs_own_files(folder: Path, trained: Path, name: str, draw: st.DataObject) -> None:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(trained / "run", run)
    content = draw.draw(spoilt((run / name).read_bytes()))
    (run / name).write_bytes(content)
    if name.endswith("state.json"):  # with a wrong checksum it would not be read
        listed = json.loads((run / LAST / "manifest.json").read_text())
        listed["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (run / LAST / "manifest.json").write_text(json.dumps(listed))
    result = run_lora("train", trained / "recipe.yaml", f"training.output_dir={run}", "--resume")
    assert result.exit_code in (0, 2, 3), result.stderr
    assert "Traceback" not in result.stderr and "bug in lora" not in result.stderr
    assert len(result.stderr) < 10_000
