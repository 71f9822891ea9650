"""Cache of tokenized rows in the run's folder. The key is a digest of all contents they depend on, not paths or times.

A file ``<key>.safetensors`` holds the concatenated ids and supervision of the rows, their offsets and sources. Its
header holds their SHA-256; a file that does not match it is not used. Once the file is written, tokens are read from it
through a memory mapping, so that a run's memory does not grow with the number of rows. A run links a file from a
neighbouring run's cache to its own, since the other run may remove it at any time.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from lora_cli import __version__
from lora_cli.data.examples import CHUNK, Store, end_to_end
from lora_cli.data.sources import Row, valid_rows
from lora_cli.data.tokenize import Forged, Tokenized, check_usable, tokenize_rows
from lora_cli.errors import RunError, UserError, writing
from lora_cli.recipe.schema import Data, Source
from lora_cli.system.disk import in_neighbours, make_folder, sync

ARRAYS: dict[str, tuple[type[np.generic], str]] = {
    "offsets": (np.int64, "I64"),
    "ids": (np.int32, "I32"),
    "source": (np.int32, "I32"),
    "supervised": (np.bool_, "BOOL"),
}
"""The arrays in a file's order, with their dtypes and safetensors' names of these."""
SETTINGS = {"format", "columns", "template", "train_on"}
"""Keys of the ``data`` section on which a row's tokens depend."""
OWN_FILE = re.compile(r"([0-9a-f]{64})\.safetensors|\.[0-9a-f]{64}\.[0-9a-f]{32}")
"""Matches a cached file, with its key as group 1, or a draft of one."""
# Formats read only JSON values. For other values, which Parquet can hold, the name of the type is enough.
CONTENT = json.JSONEncoder(default=lambda value: type(value).__name__)


@dataclass(frozen=True)
class Cached:
    """Tokenized rows and their key. ``fresh`` rows are not in the run's cache yet: they were tokenized now, or are
    in ``neighbour``, a file in another run's cache."""

    tokenized: Tokenized
    key: str
    fresh: bool
    neighbour: Path | None = None


def tokenize_cached(
    data: Data,
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    published: Callable[[], Collection[str]] | None = None,
) -> Cached:
    """Read the sources' tokenized rows, uncut, from the folder ``cache`` or a neighbouring run's, or tokenize them; the
    cache is not written.

    With ``published``, another process tokenizes the rows; ``published`` waits for it and returns the keys. Raises
    UserError at the first invalid row, or when that process has other keys; RunError when its file cannot be read.
    """
    settings = _settings_digest(data, tokenizer)
    if published is not None or any(cache.glob("*.safetensors")) or any(in_neighbours(cache, "*.safetensors")):
        digest = settings.copy()
        for _ in _counted_in(digest, valid_rows(sources)):
            pass
        key = digest.hexdigest()
        if published is not None and key not in published():
            what = "this process has other rows or another tokenizer than the first process on this machine"
            paths = ", ".join(source.path for source in sources)
            raise UserError(what, paths, "start all with the same recipe, and do not change the rows meanwhile")
        found = _read(cache / f"{key}.safetensors", key)
        if found is None and published is not None:
            raise RunError("the tokenized rows just written here cannot be read", str(cache), "start the run again")
        if found is not None:
            return Cached(found, key, fresh=False)
        for file in in_neighbours(cache, f"{key}.safetensors"):
            if (found := _read(file, key)) is not None:
                return Cached(found, key, fresh=True, neighbour=file)
    digest = settings.copy()
    folder = next(place for place in (cache, *cache.absolute().parents) if place.is_dir())
    tokenized = tokenize_rows(data, _counted_in(digest, valid_rows(sources)), tokenizer, folder)
    return Cached(tokenized, digest.hexdigest(), fresh=True)


def publish(cache: Path, parts: list[Cached]) -> list[Path]:
    """Write the fresh parts to the cache, replace their tokens in memory by mappings of the files, and clear ``parts``.

    Return the created folders, then the created files. Raises RunError, with the bytes needed, when writing fails.
    """
    fresh = [part for part in parts if part.fresh]
    parts.clear()
    stood = set(cache.glob("*"))
    made = [folder for folder in (*reversed(cache.parents), cache) if not folder.exists()] if fresh else []
    for part in fresh:
        file = _write(cache, part)
        made += [file] if file not in stood else []
        store = part.tokenized.examples.store
        if (written := _mapped(file)) is not None:  # frees the tokens in memory
            store.mappings, store.ids, store.supervised = (written[0],), written[1]["ids"], written[1]["supervised"]
    return made


def withdraw(made: list[Path]) -> None:
    """Undo ``publish`` for a run that is refused. Folders in which others have put files meanwhile stay."""
    for path in reversed(made):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def prune(cache: Path, keys: Collection[str]) -> None:
    """Remove cached files with other keys, and abandoned drafts. Call it when all processes have published."""
    for file in cache.glob("*"):
        name = OWN_FILE.fullmatch(file.name)
        if name and name[1] not in keys:
            file.unlink(missing_ok=True)


def _settings_digest(data: Data, tokenizer: PreTrainedTokenizerBase) -> hashlib._Hash:
    """SHA-256 over all that tokens depend on, except the rows. Raises UserError for a tokenizer that cannot be used."""
    check_usable(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer call resets both, and would change the digest
    backend.no_padding()
    code = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
    stated = [
        [__version__, tokenizers.__version__, transformers.__version__, code],
        data.model_dump(mode="json", include=SETTINGS),
        [backend.to_str(), backend.encode_special_tokens, tokenizer.chat_template],
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode())


def _counted_in(digest: hashlib._Hash, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows and add each one's source and columns to the digest. Raises UserError for one nested too deep."""
    for row in rows:
        try:
            text = CONTENT.encode([row.source, row.columns])
        except (RecursionError, TypeError, ValueError) as error:
            raise UserError(f"cannot be read: {error}", row.where, "remove the column from the rows") from error
        digest.update(text.encode() + b"\n")
        yield row


def _read(file: Path, key: str) -> Tokenized | None:
    """The file's rows, memory-mapped; None when it is missing or does not match its key and checksum."""
    found = _mapped(file)
    if found is None:
        return None
    mapping, arrays, about_text = found
    checksum, _, about = about_text.partition(" ")
    store = Store(arrays["ids"], arrays["supervised"], (mapping,))
    if checksum != _checksum(key, about, arrays, store):
        return None
    stated, offsets = json.loads(about), arrays["offsets"].copy()
    examples = end_to_end(store, offsets, arrays["source"].copy(), tuple(stated["formats"]))
    return Tokenized(examples, stated["bos_removed"], Forged(**stated["forged"]))


def _mapped(path: Path) -> tuple[mmap.mmap, dict[str, Any], str] | None:
    """A file's memory mapping, its arrays and its header's text; None when it is unreadable or not a cached file."""
    try:
        with safe_open(path, framework="np") as file:  # checks length and layout
            about_text = (file.metadata() or {}).get("about", "")
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, SafetensorError):
        return None
    arrays = {}
    for name, (dtype, stored_dtype) in ARRAYS.items():
        if header.get(name, {}).get("dtype") != stored_dtype:
            return None
        start, end = header[name]["data_offsets"]
        arrays[name] = np.frombuffer(mapping, dtype, (end - start) // np.dtype(dtype).itemsize, 8 + size + start)
    return mapping, arrays, about_text


def _write(cache: Path, part: Cached) -> Path:
    examples = part.tokenized.examples
    flat = examples.flat()
    arrays = {"ids": flat.ids, "supervised": flat.supervised, "offsets": flat.offsets, "source": examples.source}
    counts = {"bos_removed": part.tokenized.bos_removed, "forged": asdict(part.tokenized.forged)}
    about = json.dumps({"formats": examples.formats, **counts})
    draft = cache / f".{part.key}.{uuid.uuid4().hex}"
    target = cache / f"{part.key}.safetensors"
    try:
        with writing(target, sum(array.nbytes for array in arrays.values())):
            make_folder(cache)
            if part.neighbour is not None:
                with suppress(OSError):  # it is on another disk, or was removed
                    draft.hardlink_to(part.neighbour)
            if not draft.exists():
                about_text = f"{_checksum(part.key, about, arrays, examples.store)} {about}"
                _save(draft, about_text, arrays, examples.store)
                sync(draft)
            draft.replace(target)
            sync(cache)
    finally:
        with suppress(OSError):
            draft.unlink()
    return target


def _save(path: Path, about_text: str, arrays: dict[str, Any], store: Store) -> None:
    """Write the arrays in the order of ARRAYS, piece by piece; safetensors would copy them all into memory."""
    header: dict[str, Any] = {"__metadata__": {"about": about_text}}
    at = 0
    for name, (_, stored_dtype) in ARRAYS.items():
        size = arrays[name].nbytes
        header[name] = {"dtype": stored_dtype, "shape": list(arrays[name].shape), "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the arrays, which are sorted by item size
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in ARRAYS:
            for piece in _pieces(arrays[name], store):
                file.write(piece)


def _checksum(key: str, about: str, arrays: dict[str, Any], store: Store) -> str:
    """SHA-256 over key, header and the arrays with their dtypes and shapes."""
    digest = hashlib.sha256(f"{key} {about}".encode())
    for name in ARRAYS:
        digest.update(f"{arrays[name].dtype}{arrays[name].shape}".encode())
        for piece in _pieces(arrays[name], store):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(array: Any, store: Store) -> Iterator[memoryview]:
    """Yield an array's bytes, CHUNK items at a time, and release the mapped pages of ``store`` after each piece."""
    for start in range(0, len(array), CHUNK):
        yield np.ascontiguousarray(array[start : start + CHUNK]).data
        store.release()
