"""A base's fingerprint: what it is computed from, what changes it and what does not, and how often files are read."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import edit_json, edited_weights, weights_of
from safetensors.torch import load_file, save_file
from xxhash import xxh3_128_hexdigest

from lora_cli.weights.files.fingerprint import fingerprint

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
UNRELATED = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def bytes_read() -> int:
    """The bytes that this process has asked files for."""
    return int(Path("/proc/self/io").read_text(encoding="utf-8").splitlines()[0].removeprefix("rchar: "))


def test_it_is_that_of_config_and_tensors(model: Path) -> None:
    tensors = [
        [name, DTYPES[weight.dtype], list(weight.shape), xxh3_128_hexdigest(weight.view(torch.uint8).numpy().tobytes())]
        for name, weight in sorted(weights_of(model).items())
    ]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    related = {key: value for key, value in config.items() if key not in UNRELATED}
    stated = json.dumps([related, tensors], sort_keys=True)
    assert fingerprint(model) == hashlib.sha256(stated.encode()).hexdigest()


def split_into_shards(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, model / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def flip_a_bit(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def rename_a_tensor(model: Path) -> None:
    with edited_weights(model) as weights:
        weights["model.other.weight"] = weights.pop("model.norm.weight")


def reshape_a_tensor(model: Path) -> None:
    with edited_weights(model) as weights:
        weights["model.norm.weight"] = weights["model.norm.weight"][None]


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (split_into_shards, True),
        (lambda model: edit_json(model / "config.json", transformers_version="4.0", use_cache=False), True),
        (lambda model: edit_json(model / "config.json", rms_norm_eps=1e-3), False),
        (flip_a_bit, False),
        (rename_a_tensor, False),
        (reshape_a_tensor, False),
    ],
    ids=["shards", "unrelated keys", "a related key", "a bit", "a name", "a shape"],
)
def test_it_changes_with_what_changes_outputs(model: Path, change: Callable[[Path], None], is_same: bool) -> None:
    before = fingerprint(model)
    change(model)
    assert (fingerprint(model) == before) == is_same


def test_unchanged_files_are_read_once(model: Path) -> None:
    def read_for() -> int:
        start = bytes_read()
        fingerprint(model)
        return bytes_read() - start

    size = (model / "model.safetensors").stat().st_size
    assert read_for() > size > 2 * read_for()
    flip_a_bit(model)
    assert read_for() > size
