"""Safetensors written as a stream: each tensor goes to its file when it comes, and none is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lora_cli.disk import reserve
from lora_cli.weights.shards import INDEX, SINGLE, TORCH_NAMES

ENTRY = 160  # bytes that a tensor takes in a file's header at most, beside its name
RESERVE = 2**26  # bytes
ALIGNMENT = 8  # bytes: the format has no room between tensors, and readers want each where its type may lie
NAMES = {getattr(torch, dtype): name for name, dtype in TORCH_NAMES.items()}


@contextmanager
def shard_writer(folder: Path, names: Iterable[str], max_shard: int) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """A function that writes a tensor of any device under a name, into files of at most ``max_shard`` bytes of tensors
    (one tensor at least). When the block ends well, they get their names and, if there are several, their index.

    ``names`` are those that may come, for which room is kept in the headers.
    """
    room = ENTRY + sum(len(json.dumps(name)) + ENTRY for name in names)
    shards = [_Shard(folder / f".{SINGLE}.1", room)]

    def write(name: str, tensor: torch.Tensor) -> None:
        if shards[-1].entries and shards[-1].size + tensor.nbytes > max_shard:
            shards[-1].close()
            shards.append(_Shard(folder / f".{SINGLE}.{len(shards) + 1}", room))
        shards[-1].add(name, tensor)

    try:
        yield write
        shards[-1].close()
    finally:
        for shard in shards:
            shard.file.close()
    stem, ending = SINGLE.split(".")
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}"
        shard.path.rename(folder / name)
        places |= dict.fromkeys(shard.entries, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(shard.size for shard in shards)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _Shard:
    """A file being written: room for the header, the tensors as they come, the header last.

    Tensors that would leave the next ones unaligned, which are small but for odd shapes, wait for the end.
    """

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.file = path.open("wb")
        self.room = -(-room // ALIGNMENT) * ALIGNMENT
        self.entries: dict[str, dict[str, Any]] = {}
        self.size = 0
        self._written = 0
        self._reserved = 0
        self._waiting: list[tuple[str, int, bytes]] = []
        self.file.seek(8 + self.room)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.size += tensor.nbytes
        self.entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        if tensor.nbytes % ALIGNMENT:
            self._waiting.append((name, tensor.itemsize, _bytes(tensor).tobytes()))
        else:
            self._write(name, _bytes(tensor))

    def _write(self, name: str, content: bytes | memoryview) -> None:
        self.entries[name]["data_offsets"] = [self._written, self._written + len(content)]
        self._reserve(8 + self.room + self._written + len(content))
        self.file.write(content)
        self._written += len(content)

    def _reserve(self, size: int) -> None:
        """Have the disk set room aside in long runs: found block by block, it may take ten times as long to write."""
        if size > self._reserved:
            more = max(RESERVE, size - self._reserved)
            with suppress(OSError):  # a disk that has no room for a run may have it for what is written
                reserve(self.file.fileno(), self._reserved, more)
            self._reserved += more

    def close(self) -> None:
        """Write what has waited, and the header, padded with spaces as the format allows."""
        for name, _, content in sorted(self._waiting, key=lambda waiting: -waiting[1]):
            self._write(name, content)
        self._waiting.clear()
        self.file.truncate()
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")).encode()
        if len(header) > self.room:
            raise ValueError(f"{self.path}: more tensors were written than announced")
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.close()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
