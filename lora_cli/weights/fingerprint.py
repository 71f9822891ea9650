"""Which base this is, by a digest of all that its numbers come from, or which file; without importing torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from lora_cli.errors import reading
from lora_cli.model.files import read_config
from lora_cli.weights.shards import TensorInfo, read_headers, weight_files

CHUNK = 1 << 22
CHANGES_NO_NUMBER = {"architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of config.json on which what the weights compute does not depend; nor does it on those that begin with _."""


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json, without what changes no number, and over every tensor's name, dtype, shape and XXH3 of
    its bytes, in order of names: all bytes are read, gigabytes a second.

    The same however the tensors are spread over shards. It tells changes apart that come about, not those that somebody
    has contrived. Raises UserError for a folder without a configuration or whole safetensors files, RunError for one
    that cannot be read.
    """
    stored = sorted(read_headers(weight_files(folder)).items())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, (info for _, info in stored))
        tensors = [[name, info.dtype, info.shape, digest] for (name, info), digest in zip(stored, digests, strict=True)]
    stated = json.dumps([_deciding(read_config(folder)), tensors], sort_keys=True)
    return hashlib.sha256(stated.encode()).hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _digest(info: TensorInfo) -> str:
    digest = xxh3_128()
    with reading(info.file), info.file.open("rb") as file:
        file.seek(info.start)
        left = info.bytes
        while left and (piece := file.read(min(CHUNK, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what changes no number, at any depth."""
    return {
        key: _deciding(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in CHANGES_NO_NUMBER and not key.startswith("_")
    }
