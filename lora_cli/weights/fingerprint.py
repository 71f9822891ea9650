"""Which base this is: a digest that tells two models apart without reading all of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open

from lora_cli.weights.shards import read_headers, weight_files


def fingerprint(folder: Path) -> str:
    """SHA-256 over every tensor's name, dtype, shape and its first, middle and last row, in order of names.

    The same however the tensors are spread over shards. Raises UserError for a folder without whole safetensors files.
    """
    parts: dict[str, bytes] = {}
    for file in weight_files(folder):
        headers = read_headers([file])
        with safe_open(file, framework="pt") as shard:
            for name, info in headers.items():
                digest = hashlib.sha256(f"{name} {info.dtype} {info.shape}".encode())
                if info.shape and info.shape[0]:
                    rows = shard.get_slice(name)
                    for row in (0, info.shape[0] // 2, info.shape[0] - 1):
                        digest.update(_bytes(rows[row : row + 1]))
                else:
                    digest.update(_bytes(shard.get_tensor(name)))
                parts[name] = digest.digest()
    whole = hashlib.sha256()
    for name in sorted(parts):
        whole.update(parts[name])
    return whole.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
