"""Which base this is: a digest that tells two models apart without reading all of their weights, or importing torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lora_cli.weights.shards import read_headers, weight_files

SAMPLE = 1024


def fingerprint(folder: Path) -> str:
    """SHA-256 over every tensor's name, dtype, shape and the bytes at its beginning, middle and end, in order of names.

    The same however the tensors are spread over shards. Raises UserError for a folder without whole safetensors files.
    """
    parts: dict[str, bytes] = {}
    for file in weight_files(folder):
        headers = read_headers([file])
        with file.open("rb") as stream:
            # The format: eight bytes of header length, little-endian, the header in JSON, the tensors' bytes.
            length = int.from_bytes(stream.read(8), "little")
            spans = json.loads(stream.read(length))
            for name, info in headers.items():
                digest = hashlib.sha256(f"{name} {info.dtype} {info.shape}".encode())
                begin, end = spans[name]["data_offsets"]
                for at in (begin, (begin + end) // 2, max(begin, end - SAMPLE)):
                    stream.seek(8 + length + at)
                    digest.update(stream.read(min(SAMPLE, end - at)))
                parts[name] = digest.digest()
    whole = hashlib.sha256()
    for name in sorted(parts):
        whole.update(parts[name])
    return whole.hexdigest()
