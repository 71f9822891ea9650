"""Read safetensors checkpoints: list a folder's tensors from the headers, and read them one at a time.

Torch is imported in functions: headers are checked without it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from safetensors import SafetensorError, safe_open

from lora_cli.errors import UserError, reading, repair_hint, unreadable
from lora_cli.model.files import MODEL_FOLDER, read_config

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MAX_SHARD = 50 * 10**9
"""The largest number of bytes of tensors in a file, as in ``save_pretrained``."""
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Torch's names for safetensors' dtypes."""
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, file, shape and safetensors dtype ('F32', 'BF16', 'U8', …), the offset of its first byte and its
    size in bytes."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype. Raises KeyError when it is not in ``TORCH_NAMES``."""
        import torch

        found: torch.dtype = getattr(torch, TORCH_NAMES[self.dtype])
        return found


def read_headers(files: list[Path]) -> dict[str, TensorInfo]:
    """Return the tensors of these files by name, from their headers alone.

    Raises UserError for a damaged or missing file, RunError when reading fails, which may be temporary.
    """
    found: dict[str, TensorInfo] = {}
    for file in files:
        try:
            file.open("rb").close()  # gives the reason; safetensors reports any file it cannot open as missing
            with safe_open(file, framework="np"):  # detects damage, without importing torch
                found.update({info.name: info for info in _entries(file)})
        except (SafetensorError, OSError) as error:
            if isinstance(error, OSError) and file.is_file():
                raise unreadable(file, error) from error
            size = f"{file.stat().st_size:,} bytes" if file.exists() else "missing"
            raise UserError(f"not a whole safetensors file ({size}): {error}", str(file), repair_hint(file)) from error
    return found


def model_headers(folder: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a model folder by name. Raises the errors of ``weight_files`` and ``read_headers``."""
    return read_headers(weight_files(folder))


def _entries(file: Path) -> Iterator[TensorInfo]:
    """Yield a safetensors file's tensors. The header is the JSON's length in eight bytes, and the JSON."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            shape, dtype, (start, end) = tuple(entry["shape"]), entry["dtype"], entry["data_offsets"]
            yield TensorInfo(name, file, shape, dtype, 8 + length + start, end - start)


def check_complete(folder: Path) -> None:
    """Raises UserError when a model folder holds no safetensors weights, a damaged file, or fewer tensors than layers,
    or when Transformers would load other weights than lora checks, merges and quantizes.

    Does not import torch: a configuration of a billion layers must be refused before the model is built.
    """
    files = weight_files(folder)
    tensors = read_headers(files)
    if not tensors:
        raise UserError("holds no tensor", str(files[0]), repair_hint(files[0]))
    if (folder / GENERATION).is_file():
        read_config(folder, GENERATION)
    config = read_config(folder)
    text_config = config.get("text_config")
    for section in (config, text_config if isinstance(text_config, dict) else {}):
        if named := section.get("transformers_weights"):
            what = f"names the weights to load ({named}; transformers_weights), which is not supported"
            raise UserError(
                what, str(folder / "config.json"), f"remove the key, and give these weights the name {SINGLE}"
            )
        for key in DEPTHS:
            depth = section.get(key)
            if isinstance(depth, int) and depth > len(tensors):
                what = f"{key} says {depth:,} layers, but the weights are {len(tensors):,} tensors"
                hint = "config.json and the weights are from different models"
                raise UserError(what, str(folder / "config.json"), hint)


def stored_name(name: str, stored: Container[str]) -> str | None:
    """Return the name under which a model's tensor or layer is stored, or None. Checkpoints may omit the base model's
    prefix, as in h.0.attn for transformer.h.0.attn."""
    return next((each for each in (name, name.partition(".")[2]) if each in stored), None)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder: the single file if there is one, as in Transformers,
    else those of the index. Raises UserError when there are none, or the index is invalid or names missing files."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if index.is_file():
        try:
            with reading(index):
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if not names or any(Path(name).name != name for name in names):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = "not a readable shard index (a JSON object with a weight_map to files beside it)"
            raise UserError(what, str(index), repair_hint(index)) from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            what = f"shards named in the index are missing: {', '.join(missing)}"
            raise UserError(what, str(index), "copy or download them again")
        return [folder / name for name in names]
    raise UserError("the model folder holds no safetensors weights", str(folder), pickled(folder) or MODEL_FOLDER)


def pickled(folder: Path) -> str | None:
    """Return a hint that names a folder's pickled weights, which run code when they are read; None without any."""
    names = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES) if folder.is_dir() else []
    found = ", ".join(names)
    return f"found {found}: pickled weights are not read; save the model again with safetensors" if names else None


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Read one tensor from its file. safetensors itself would parse the whole header for each tensor.

    Raises UserError when the dtype is not supported or the file ends too early, RunError when reading fails.
    """
    import torch

    if info.dtype not in TORCH_NAMES:
        raise UserError(f"tensor {info.name} has dtype {info.dtype}, which is not supported", str(info.file))
    tensor = torch.empty(info.shape, dtype=info.torch_dtype)
    with reading(info.file), info.file.open("rb") as file:
        file.seek(info.start)
        if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
            raise UserError(f"ends inside tensor {info.name}", str(info.file), repair_hint(info.file))
    return tensor


def mapped(info: TensorInfo, file: BinaryIO | None = None) -> torch.Tensor:
    """Map a tensor's file into memory, copy-on-write. Only what is accessed is read, and none of it fragments the
    process's own memory. ``file`` is the file if it is already open, so that it is not opened by its name."""
    import numpy as np
    import torch

    raw = torch.from_numpy(np.memmap(file or info.file, np.uint8, "c", info.start, (info.bytes,)))
    return raw.view(info.torch_dtype).view(info.shape)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    import torch

    if not tensor.is_floating_point() or tensor.itemsize == 1 or not tensor.numel():
        return True
    return all(map(math.isfinite, torch.aminmax(tensor)))


def check_finite(tensor: torch.Tensor, name: str, file: Path) -> None:
    """Raises UserError when a tensor, ``name`` in ``file``, holds NaN or infinity in its present dtype.

    ``masked_bias`` is exempt: old GPT-NeoX checkpoints hold it, no model reads it, and its -1e9 is infinite in float16.
    """
    if not is_finite(tensor) and not name.endswith(".masked_bias"):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"tensor {name} holds NaN or infinity (as {kind})", str(file))


def stored_dtype(headers: Mapping[str, TensorInfo]) -> torch.dtype:
    """Return the dtype of most of a checkpoint's floating-point values (float32 if there are none)."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for info in headers.values():
        if info.dtype in ("F32", "BF16", "F16"):
            sizes[info.torch_dtype] += math.prod(info.shape)
    return sizes.most_common(1)[0][0] if sizes else torch.float32
