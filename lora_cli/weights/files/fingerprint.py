"""Identify a base by a digest of its weights and configuration, or a file by its SHA-256, without importing torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from lora_cli.errors import reading
from lora_cli.model.files import read_config
from lora_cli.weights.files.shards import TensorInfo, model_headers

CHUNK = 1 << 22
IRRELEVANT_KEYS = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of config.json that do not affect the model's outputs. Neither do keys that begin with _."""


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 over the keys of config.json that affect outputs, and over every tensor's name, dtype, shape
    and XXH3 digest, sorted by name. All bytes are read, at gigabytes a second; once, while the files stay as they are.

    The result does not depend on how tensors are split into shards. It detects accidental changes, not contrived ones.
    Raises UserError for a folder without a configuration or complete safetensors files, RunError when reading fails.
    """
    stored = dict(sorted(model_headers(folder).items()))
    states = {file: _state(file) for file in {info.file for info in stored.values()}}
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda info: _digest(info, states[info.file]), stored.values())
        found = zip(stored.items(), digests, strict=True)
        tensors = [[name, info.dtype, info.shape, digest] for (name, info), digest in found]
    stated = json.dumps([_relevant(read_config(folder)), tensors], sort_keys=True)
    return hashlib.sha256(stated.encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _state(file: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    with reading(file):
        found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@cache  # several adapters of one merge have the same base
def _digest(info: TensorInfo, state: tuple[int, ...]) -> str:
    """A tensor's XXH3 digest, of its file in this ``state``."""
    digest = xxh3_128()
    with reading(info.file), info.file.open("rb") as file:
        file.seek(info.start)
        left = info.bytes
        while left and (piece := file.read(min(CHUNK, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the keys that do not affect outputs, at any depth."""
    return {
        key: _relevant(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in IRRELEVANT_KEYS and not key.startswith("_")
    }
