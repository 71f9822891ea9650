"""Collecting tokenized rows as they arrive: few in memory, many in files, so that memory does not grow with them."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from lora_cli.data.examples import Examples, Ints, Store, Tokens, end_to_end, joined_store, offsets_of
from lora_cli.errors import writing

BUFFER_TOKENS = 1 << 24
"""Tokens held in memory before they are written to files: 84 MB."""


def gather(parts: Iterable[Examples], folder: Path | None) -> Examples:
    """The rows of all parts, each of one source, end to end. From BUFFER_TOKENS tokens on they are stored in files in
    ``folder`` (None: the system's temporary folder). The files have no name, so that none remains however the process
    ends.

    Raises RunError when the files cannot be written, as on a full disk.
    """
    held: list[Examples] = []
    files: list[IO[bytes]] = []
    lengths: list[Ints] = [np.zeros(0, np.int64)]
    sources: list[Tokens] = [np.zeros(0, np.int32)]
    formats: dict[int, str] = {}
    place = folder or Path(tempfile.gettempdir())
    waiting = 0
    try:
        for part in parts:
            held.append(part)
            lengths.append(part.lengths)
            sources.append(part.source)
            formats[int(part.source[0])] = part.format
            waiting += part.tokens
            if waiting >= BUFFER_TOKENS:
                _write(held, files, place)
                waiting = 0
        if files:
            _write(held, files, place)
            mappings = tuple(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for file in files)
            store = Store(np.frombuffer(mappings[0], np.int32), np.frombuffer(mappings[1], np.bool_), mappings)
        else:
            flats = [part.flat() for part in held]
            store = joined_store([flat.ids for flat in flats], [flat.supervised for flat in flats])
    finally:
        for file in files:
            file.close()
    offsets = offsets_of(np.concatenate(lengths))
    return end_to_end(store, offsets, np.concatenate(sources), tuple(formats.values()))


def _write(held: list[Examples], files: list[IO[bytes]], place: Path) -> None:
    """Append the held rows to the files of ids and of supervision, which the first call creates; clear ``held``."""
    with writing(place / "tokenized rows"):
        while len(files) < 2:
            files.append(tempfile.TemporaryFile(dir=place))  # noqa: SIM115 (gather closes them)
        for part in held:
            flat = part.flat()
            files[0].write(flat.ids.data)
            files[1].write(flat.supervised.data)
        for file in files:
            file.flush()
    held.clear()
