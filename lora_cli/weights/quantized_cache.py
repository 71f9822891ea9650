"""A base once quantized is kept so: loaded from there, a run never holds the unquantized weights, nor waits for them.

It lies in a run's cache as ``base-<key>``, the key made of all that its tensors depend on, with the SHA-256 of its
files: a folder that does not agree with these is made again. What a run beside it has kept a run takes over into its
own cache, since the other may remove it at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import torch

from lora_cli import __version__
from lora_cli.errors import RunError, UserError
from lora_cli.model.base import load_config, skeleton
from lora_cli.recipe.schema import Quantization
from lora_cli.weights.fingerprint import file_sha256
from lora_cli.weights.folders import whole_folder
from lora_cli.weights.quantize import write_quantized
from lora_cli.weights.quantized_layers import quantized_layers
from lora_cli.weights.shards import read_headers, weight_files
from lora_cli.weights.stored_model import stored_model
from lora_cli.weights.stored_names import unstorable

SUMS = "sha256.json"
SHARD = 10**9  # bytes: several files, so that their sums are taken at once
OWN_FOLDER = re.compile(r"base-[0-9a-f]{64}|\.base-[0-9a-f]{64}\..*")
"""A kept base, or the draft of one."""
VERSIONS = ("bitsandbytes", "transformers", "torch")


def kept_name(
    base: Path, digest: str, quantization: Quantization, dtype: torch.dtype, compute_dtype: torch.dtype
) -> str:
    """The name of this base's folder in a cache, when it is quantized so from ``dtype``; ``digest`` is its
    fingerprint."""
    depends_on = [
        [__version__, *map(version, VERSIONS)],
        [digest, (base / "config.json").read_text(encoding="utf-8")],
        [quantization.model_dump(mode="json"), str(dtype), str(compute_dtype)],
    ]
    return f"base-{hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()}"


def find_kept(cache: Path, name: str) -> Path | None:
    """The folder of this name, whole, in a run's cache or in that of a run beside it; None when there is none."""
    return next((folder for folder in _places(cache, name) if _is_whole(folder)), None)


def keep(base: Path, folder: Path, quantization: Quantization, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """Write the base, quantized, to ``folder``, in place of a damaged one.

    Raises UserError for weights that are missing or no numbers, and where no layer is quantized; RunError when there is
    no room, and when what would be written could not be loaded again.
    """
    bare = skeleton(load_config(base))
    layers = quantized_layers(bare, quantization)
    if not layers:  # Falcon's are of a kind of their own
        raise UserError("quantization: this model has no layer that can be quantized", str(base), "remove this section")
    needed = sum(file.stat().st_size for file in weight_files(base))  # unquantized: the run needs room of its own
    free = shutil.disk_usage(next(place for place in folder.absolute().parents if place.is_dir())).free
    if free < needed:
        raise RunError(f"{needed:,} bytes are wanted, {free:,} are free", str(folder))
    if unstorable(bare, read_headers(weight_files(base)), layers):
        raise RunError("its layers are stored joined or split, and could not be loaded again quantized", str(base))
    with _made_anew(folder, needed) as draft:
        write_quantized(stored_model(base), draft, quantization, dtype, compute_dtype, max_shard=SHARD)
        (draft / SUMS).write_text(json.dumps(_sums(draft)), encoding="utf-8")


def take_over(found: Path, folder: Path) -> bool:
    """Have a kept base in ``folder`` too, by links where there can be such; False when its files can be neither linked
    nor copied, as when they have been removed meanwhile."""
    try:
        with _made_anew(folder) as draft:
            for name in (SUMS, *json.loads((found / SUMS).read_text(encoding="utf-8"))):
                _link_or_copy(found / name, draft / name)
    except RunError:
        return False
    return True


def prune_kept(cache: Path, name: str | None) -> None:
    """Remove the bases kept in a cache under other names, and drafts that a process left behind."""
    for folder in cache.glob("*"):
        if OWN_FOLDER.fullmatch(folder.name) and folder.name != name:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _made_anew(folder: Path, needed: int | None = None) -> Iterator[Path]:
    """A draft of ``folder``, which is damaged if it is there. Another process may make it at the same time, on another
    machine: the first to finish leaves its own there."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with whole_folder(folder, needed=needed) as draft:
            yield draft
    except RunError:
        if not _is_whole(folder):
            raise


def _link_or_copy(file: Path, target: Path) -> None:
    try:
        target.hardlink_to(file)
    except OSError:  # another disk, or one that has no links
        shutil.copyfile(file, target)


def _places(cache: Path, name: str) -> Iterator[Path]:
    yield cache / name
    for folder in sorted(cache.parent.parent.glob(f"*/{cache.name}/{name}")):
        with suppress(FileNotFoundError):  # the run beside has removed it meanwhile
            if folder.stat().st_uid == os.getuid():  # nobody else's: /tmp is everybody's
                yield folder


def _is_whole(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / SUMS).read_text(encoding="utf-8")) == _sums(folder))
    except (OSError, ValueError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the list of them."""
    files = sorted(file for file in folder.iterdir() if file.name != SUMS)
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(file_sha256, files), strict=True))
