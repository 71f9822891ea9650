"""Fold adapters into their base: W + (alpha / r) BA for LoRA (arXiv:2106.09685, section 4.1).

Works tensor by tensor, from file to file. Where ``find_changes`` returns None, PEFT merges the model in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lora_cli.errors import UserError
from lora_cli.model.device import dtype_name
from lora_cli.model.files import check_tokenizer, copy_tokenizer, read_config, tokenizer_folder
from lora_cli.recipe.schema import Quantization
from lora_cli.system.folders import atomic_folder, copy_if_there
from lora_cli.weights.adapter.origin import AdapterOrigin
from lora_cli.weights.adapter.provenance import PROVENANCE, check_trained_alike
from lora_cli.weights.files.shards import (
    GENERATION,
    MAX_SHARD,
    TensorInfo,
    check_finite,
    model_headers,
    read_tensor,
    stored_dtype,
    stored_name,
    weight_files,
)
from lora_cli.weights.files.stream import shard_writer
from lora_cli.weights.updates import Changes, MergedTensor, find_changes, merged_tensor

Into = Literal["expanded", "original"]
BOTH = 1.5
"""Two tensors are held at once only if together they have at most this many times the values of the largest one."""
IN_MEMORY = "note: PEFT merges this kind of adapter, with the whole model in memory in float32"


@dataclass(frozen=True)
class Merged:
    """The model that a merge wrote.

    ``into`` says which weights the adapters were added to. ``unchanged`` is the share of the updated weights' values
    that are the same as before once they are stored; None where PEFT merged ``in_memory``.
    """

    out: Path
    base: str
    modules: int
    into: str
    dtype: str
    bytes: int
    unchanged: float | None
    in_memory: bool


@dataclass(frozen=True)
class MergedTensors:
    """A merged model's tensors, by the base's stored names. Each is computed when it is read.

    ``expanded`` maps the weights to quantize from ``training_dtype`` and dequantize before the sum to whether they are
    stored as (in, out). Tensors are stored as ``dtype``; None keeps each tensor's own.
    """

    headers: dict[str, TensorInfo]
    changes: Changes
    quantization: Quantization | None
    expanded: Mapping[str, bool]
    training_dtype: torch.dtype
    dtype: torch.dtype | None

    def read(self, name: str) -> MergedTensor:
        """Return one tensor. Raises UserError when the base's tensor, or the sum as stored, holds NaN or infinity."""
        weight = read_tensor(self.headers[name])
        dtype = self.dtype or weight.dtype
        if name in self.expanded or name not in self.changes.products:
            check_finite(weight, name, self.headers[name].file)
        if name in self.expanded and self.quantization is not None:
            from lora_cli.weights.codes import quantize_dequantize

            weight = quantize_dequantize(weight.to(self.training_dtype), self.quantization, self.expanded[name])
        try:
            result = merged_tensor(self.changes, name, weight, dtype)
        except UserError:
            check_finite(weight, name, self.headers[name].file)  # names the base's tensor if it is the cause
            raise
        if name in self.changes.replaced or (name not in self.changes.products and dtype != weight.dtype):
            check_finite(result.tensor, name, self.headers[name].file)
        return result


def merge(
    origins: Sequence[AdapterOrigin],
    out: Path,
    tell: Callable[[str], object],
    into: Into | None = None,
    dtype: torch.dtype | None = None,
    max_shard: int = MAX_SHARD,
    check: Callable[[Path], None] | None = None,
) -> Merged:
    """Write the base with the adapters folded in to ``out``: weights, tokenizer, configurations.

    The sum is computed in float32 and stored as ``dtype`` (None: the base's own). An adapter that was trained on a
    quantized base is added by default to the weights as training saw them (quantized and dequantized), to which it was
    fitted, and with ``into`` "original" to the unquantized weights. ``tell`` is called first if PEFT has to merge.
    ``check`` gets the complete folder before it is renamed to ``out``; if ``check`` raises, the folder is removed.

    Raises UserError when ``out`` cannot be used, the adapters cannot be added up, or a sum holds NaN or infinity. The
    caller has checked each adapter against its base (``find_origin``), and that all have the same base.
    """
    origin = origins[0]
    headers = model_headers(origin.base)
    stored = dtype or stored_dtype(headers)
    quantization = None
    if into != "original":
        hint = "give --into original to add both to the unquantized base"
        check_trained_alike([each.folder for each in origins], hint)
        quantization = origin.quantization
    tensors = merged_tensors(origins, headers, quantization, dtype)
    if len(origins) > 1:
        _check_addable(tensors, origin.folder)
    if tensors is None:
        tell(IN_MEMORY)
    with_tokenizer = tokenizer_folder(origin.base, *(each.folder for each in origins))
    check_tokenizer(with_tokenizer)
    needed = sum(math.prod(info.shape) for info in (tensors.headers if tensors else headers).values()) * stored.itemsize
    with atomic_folder(out, needed=needed) as draft:
        if tensors is None:
            from lora_cli.weights.merge_in_memory import merge_in_memory

            seen = training_dtype(origin)
            modules, unchanged = merge_in_memory(origin, quantization, seen, headers, dtype, draft, max_shard), None
        else:
            modules, unchanged = tensors.changes.layers, _write(tensors, draft, max_shard)
            _write_config(origin.base, draft, dtype, tensors.changes)
        copy_tokenizer(with_tokenizer, draft)
        copy_if_there(draft, origin.base / GENERATION, origin.folder / PROVENANCE)
        if check is not None:
            check(draft)
    size = sum(file.stat().st_size for file in weight_files(out))
    target = f"the base in {quantization.method}, expanded" if quantization else "the base"
    return Merged(out, origin.base_name, modules, target, dtype_name(stored), size, unchanged, tensors is None)


def merged_tensors(
    origins: Sequence[AdapterOrigin],
    headers: dict[str, TensorInfo],
    quantization: Quantization | None,
    dtype: torch.dtype | None,
) -> MergedTensors | None:
    """Return the merged model's tensors, to be stored as ``dtype``, or None where PEFT has to merge in memory."""
    base = origins[0].base
    changes = find_changes([origin.folder for origin in origins], base, headers)
    if changes is None:
        return None
    expanded: dict[str, bool] = {}
    if quantization is not None:
        from lora_cli.model.base import load_config, meta_model
        from lora_cli.weights.quantized_layers import quantized_layers

        for layer, transposed in quantized_layers(meta_model(load_config(base)), quantization).items():
            name = stored_name(f"{layer}.weight", headers)
            if name is None:
                return None
            expanded[name] = transposed
    seen = training_dtype(origins[0])
    return MergedTensors({**headers, **changes.untied}, changes, quantization, expanded, seen, dtype)


def fits_in_memory(base: Path) -> bool:
    """Whether the base in float32, with a reserve of 25%, fits into the device's free memory."""
    from lora_cli.model.device import best_device
    from lora_cli.system.memory import free_bytes

    numbers = sum(math.prod(info.shape) for info in model_headers(base).values())
    return numbers * 4 * 1.25 < free_bytes(best_device())


def training_dtype(origin: AdapterOrigin) -> torch.dtype:
    """Return the dtype in which the base was loaded to train the adapter; if not recorded, its stored dtype."""
    return getattr(torch, origin.dtype) if origin.dtype else stored_dtype(model_headers(origin.base))


def _check_addable(tensors: MergedTensors | None, first: Path) -> None:
    """Raises UserError when several adapters, of which ``first`` is one, do more than add to the base's weights."""
    if tensors is None or tensors.changes.replaced or tensors.changes.rescaled:
        what = "only plain LoRA adapters can be added up: no DoRA, and no tensors other than LoRA's"
        raise UserError(what, str(first), "merge one, then train the others on the result")


def _write(tensors: MergedTensors, draft: Path, max_shard: int) -> float:
    """Write all tensors. Return the share of the updated weights' values that are stored unchanged."""
    same = numbers = before = 0
    sizes = {name: math.prod(info.shape) for name, info in tensors.headers.items()}
    most = BOTH * max(sizes.values())
    found: MergedTensor | None = None
    # Compute a tensor while the previous one is written, unless both are large: writing takes as long as summing.
    with shard_writer(draft, tensors.headers, max_shard) as write, ThreadPoolExecutor(1) as writer:
        written = writer.submit(lambda: None)
        for name, size in sizes.items():
            if before + size > most:
                written.result()
                found = None
            found = tensors.read(name)
            written.result()
            written = writer.submit(write, name, found.tensor)
            before = size
            if name in tensors.changes.products:
                same += found.unchanged
                numbers += size
        written.result()
    return same / numbers if numbers else 0.0


def _write_config(base: Path, draft: Path, dtype: torch.dtype | None, changes: Changes) -> None:
    config = read_config(base)
    if dtype is not None:
        config.pop("torch_dtype", None)  # the key of older versions
        config["dtype"] = dtype_name(dtype)
    if changes.vocab_size is not None:
        config["vocab_size"] = changes.vocab_size
    if changes.untied:
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                section["tie_word_embeddings"] = False
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
