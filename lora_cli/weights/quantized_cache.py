"""A cache of quantized bases: a run that loads one neither holds the unquantized weights nor waits for them.

A base lies in a run's cache as ``base-<key>``, where the key is a hash of all that its tensors depend on. The folder
also holds the SHA-256 of its files. One that does not match them is written again. A run links or copies a base from a
neighbouring run's cache to its own, since the other run may remove it at any time.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import torch

from lora_cli import __version__
from lora_cli.errors import RunError
from lora_cli.model.base import load_config, meta_model
from lora_cli.recipe.schema import Quantization
from lora_cli.system.disk import in_neighbours
from lora_cli.system.folders import atomic_folder
from lora_cli.weights.files.fingerprint import file_sha256
from lora_cli.weights.files.shards import model_headers, weight_files
from lora_cli.weights.files.stored_model import stored_model, unstorable
from lora_cli.weights.quantize import write_quantized
from lora_cli.weights.quantized_layers import quantized_layers

SUMS = "sha256.json"
SHARD = 10**9  # bytes: several files, so that they are hashed in parallel
OWN_FOLDER = re.compile(r"base-[0-9a-f]{64}|\.base-[0-9a-f]{64}\..*")
"""The name of a cached base, or of a draft of one."""
VERSIONS = ("bitsandbytes", "transformers", "torch")


def cached_name(
    base: Path, digest: str, quantization: Quantization, dtype: torch.dtype, compute_dtype: torch.dtype
) -> str:
    """Return the name of this base's folder in a cache, when quantized like this from ``dtype``. ``digest`` is the
    base's fingerprint."""
    depends_on = [
        [__version__, *map(version, VERSIONS)],
        [digest, (base / "config.json").read_text(encoding="utf-8")],
        [quantization.model_dump(mode="json"), str(dtype), str(compute_dtype)],
    ]
    return f"base-{hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()}"


def find_cached(cache: Path, name: str) -> Path | None:
    """Return the intact folder of this name in a run's cache or a neighbouring run's, or None when there is none."""
    return next((folder for folder in chain([cache / name], in_neighbours(cache, name)) if _is_intact(folder)), None)


def write_cached(
    base: Path, folder: Path, quantization: Quantization, dtype: torch.dtype, compute_dtype: torch.dtype
) -> None:
    """Write the quantized base to ``folder``, replacing a damaged one.

    Raises UserError when weights are missing or hold NaN or infinity; RunError when disk space is short, or the result
    could not be loaded again.
    """
    bare = meta_model(load_config(base))
    layers = quantized_layers(bare, quantization)
    needed = sum(file.stat().st_size for file in weight_files(base))  # unquantized: leaves space for the run
    free = shutil.disk_usage(next(place for place in folder.absolute().parents if place.is_dir())).free
    if free < needed:
        raise RunError(f"{needed:,} bytes are wanted, {free:,} are free", str(folder))
    if unstorable(bare, model_headers(base), layers):
        raise RunError("its layers are stored joined or split, and could not be loaded again quantized", str(base))
    with _replacing(folder, needed) as draft:
        write_quantized(stored_model(base), draft, quantization, dtype, compute_dtype, (), SHARD)
        (draft / SUMS).write_text(json.dumps(_sums(draft)), encoding="utf-8")


def link_cached(found: Path, folder: Path) -> bool:
    """Hard-link a cached base to ``folder``, or copy it where links are not supported. False when neither succeeds, as
    when its files have been removed meanwhile."""
    try:
        with _replacing(folder) as draft:
            for name in (SUMS, *json.loads((found / SUMS).read_text(encoding="utf-8"))):
                _link_or_copy(found / name, draft / name)
    except RunError:
        return False
    return True


def prune_cached(cache: Path, name: str | None) -> None:
    """Remove from a cache the bases of other names, and drafts that a process left behind."""
    for folder in cache.glob("*"):
        if OWN_FOLDER.fullmatch(folder.name) and folder.name != name:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _replacing(folder: Path, needed: int | None = None) -> Iterator[Path]:
    """Remove a damaged ``folder`` and yield a draft of a new one. If another process, perhaps on another machine,
    writes it at the same time, the first to finish wins."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic_folder(folder, needed=needed) as draft:
            yield draft
    except RunError:
        if not _is_intact(folder):
            raise


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:  # another disk, or one without links
        shutil.copyfile(file, target)


def _is_intact(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / SUMS).read_text(encoding="utf-8")) == _sums(folder))
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file except ``SUMS``."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(file_sha256, files), strict=True))
