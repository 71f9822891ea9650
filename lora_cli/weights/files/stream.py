"""Write safetensors as a stream: each tensor goes to its file as soon as it arrives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lora_cli.system.disk import preallocate
from lora_cli.weights.files.shards import INDEX, SINGLE, TORCH_NAMES

ENTRY = 160  # most bytes that a tensor takes in a file's header, besides its name
RESERVE = 2**26  # bytes
ALIGNMENT = 8  # bytes: the format allows no gaps between tensors, and readers need each aligned for its dtype
NAMES = {getattr(torch, dtype): name for name, dtype in TORCH_NAMES.items()}


@contextmanager
def shard_writer(folder: Path, names: Iterable[str], max_shard: int) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """Yield a function that writes a tensor on any device under a name. A file holds at most ``max_shard`` bytes of
    tensors, but at least one tensor. When the block succeeds, the files get their names and, if several, an index.

    ``names`` are the tensors that may be written, for which the headers reserve space.
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
    """A file being written: space for the header, the tensors as they arrive, and finally the header.

    Tensors that would leave the next ones unaligned wait until the end. Except for odd shapes, these are small.
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
        """Preallocate disk space in long runs. Allocated block by block, writing may take ten times as long."""
        if size > self._reserved:
            more = max(RESERVE, size - self._reserved)
            with suppress(OSError):  # a disk without space for a run may have enough for what is written
                preallocate(self.file.fileno(), self._reserved, more)
            self._reserved += more

    def close(self) -> None:
        """Write the waiting tensors, and the header padded with spaces, as the format allows."""
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
