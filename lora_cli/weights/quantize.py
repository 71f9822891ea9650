"""Write a model in 4 or 8 bits, so that plain ``from_pretrained`` loads it, and measure the quantization error. An
adapter can be merged in during the same pass.

Works tensor by tensor, from file to file. Models for which ``model_names`` returns None are quantized in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lora_cli.model.base import bitsandbytes_config, load_config, load_tokenizer, meta_model, save_tokenizer
from lora_cli.model.device import DTYPES, best_device
from lora_cli.model.files import tokenizer_folder
from lora_cli.recipe.schema import Quantization
from lora_cli.system.folders import atomic_folder, copy_if_there, draft_folder
from lora_cli.weights.adapter.origin import AdapterOrigin
from lora_cli.weights.adapter.provenance import PROVENANCE
from lora_cli.weights.codes import PARTS, encode
from lora_cli.weights.files.check_model import check_weights
from lora_cli.weights.files.shards import GENERATION, check_finite, model_headers, read_headers, weight_files
from lora_cli.weights.files.stored_model import StoredModel, model_names, stored_model
from lora_cli.weights.files.stream import shard_writer
from lora_cli.weights.merge import merge, merged_tensors
from lora_cli.weights.quantize_in_memory import quantize_in_memory
from lora_cli.weights.quantized_layers import check_layers, layer_error, replace_layers

FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Quantized:
    """The model that a quantization wrote: sizes in bytes, and each layer's relative error, worst first.

    A layer whose weight is not a stored tensor of its own has no error. ``in_experts`` counts the values that were left
    unquantized because they belong to experts joined in one parameter.
    """

    bytes_before: int
    bytes_after: int
    in_experts: int
    layers: dict[str, float]


def quantize(
    source: StoredModel,
    out: Path,
    quantization: Quantization,
    skip: Sequence[str],
    max_shard: int,
    check: Callable[[Path], None] | None = None,
) -> Quantized:
    """Write the model to ``out`` with its linear layers in 4 or 8 bits, except the head and those in ``skip``.

    ``check`` gets the complete folder before it is renamed to ``out``; if ``check`` raises, the folder is removed.

    The caller has checked that the model is unquantized. Raises UserError when it has no tokenizer, weights are damaged
    or hold NaN or infinity, layers could not be loaded again, ``skip`` matches no layer, or ``out`` cannot be used.
    """
    folder, adapter = source.folder, source.adapter
    bare = meta_model(load_config(folder))
    check_weights(folder, bare)
    check_layers(folder, quantization, skip)
    tokenizer = load_tokenizer(tokenizer_folder(folder, adapter))
    dtype, compute_dtype = _loaded_dtype(folder, bare), DTYPES[quantization.compute_dtype]
    with atomic_folder(out) as draft:
        errors = write_quantized(source, draft, quantization, dtype, compute_dtype, skip, max_shard)
        save_tokenizer(tokenizer, draft)
        copy_if_there(draft, folder / GENERATION, (adapter or folder) / PROVENANCE)
        if check is not None:
            check(draft)
    files = weight_files(folder)
    before, after = (sum(file.stat().st_size for file in found) for found in (files, weight_files(out)))
    worst_first = dict(sorted(errors.items(), key=lambda layer: -layer[1]))
    return Quantized(before, after, _in_experts(bare), worst_first)


def _loaded_dtype(folder: Path, bare: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which Transformers loads a checkpoint: its configuration's, else that of its first
    floating-point tensor."""
    configured = bare.config.dtype
    if isinstance(configured, torch.dtype):
        return configured
    stored = sorted(read_headers(weight_files(folder)[:1]).items())  # the order in which safetensors lists them
    return next((info.torch_dtype for _, info in stored if info.dtype in FLOATS), torch.float32)


def _in_experts(bare: PreTrainedModel) -> int:
    """Count the values of joined experts, which are not layers of their own and therefore not quantized."""
    return sum(each.numel() for name, each in bare.named_parameters() if each.dim() > 2 and ".experts." in name)


def write_quantized(
    source: StoredModel,
    out: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip: Sequence[str],
    max_shard: int,
) -> dict[str, float]:
    """Write configuration and weights as ``from_pretrained`` and ``save_pretrained`` would, without loading the model.
    Return each layer's relative error.

    Tensors are read, quantized and written one at a time; unquantized ones are written as ``dtype``. Only a model for
    which ``model_names`` returns None, such as one with joined or split tensors, is loaded completely. Raises UserError
    when weights are missing or hold NaN or infinity.
    """
    settings = bitsandbytes_config(quantization, compute_dtype)
    config = load_config(source.folder)
    if source.untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    bare = meta_model(config)
    if skip:  # skip_modules replaces the default (the head), so keep that too
        default = AutoHfQuantizer.from_config(settings).get_modules_to_not_convert(bare)
        settings.llm_int8_skip_modules = sorted({*default, *skip})
    names = model_names(bare, source.headers)
    if names is None:
        return quantize_in_memory(source, bare, out, quantization, dtype, settings, max_shard)
    if source.vocab_size is not None:
        bare.config.vocab_size = source.vocab_size
    transposed = replace_layers(bare, settings)
    bare.config.dtype, bare.config.quantization_config = dtype, settings
    bare.config.architectures = [type(bare).__name__]
    bare.config.save_pretrained(str(out))
    if bare.can_generate():
        bare.generation_config.save_pretrained(str(out))
    return _write_by_tensors(source, names, transposed, out, quantization, dtype, max_shard)


def quantize_merged(
    origin: AdapterOrigin,
    out: Path,
    quantization: Quantization,
    skip: Sequence[str],
    max_shard: int,
    tell: Callable[[str], object],
    check: Callable[[Path], None] | None = None,
) -> Quantized:
    """Write what ``merge`` and then ``quantize``, with its ``check``, would write.

    Only if one of the two needs the model in memory, the merged model is stored beside ``out`` for a while. ``tell`` is
    called first if the merge needs it. Raises UserError as both do.
    """
    headers = model_headers(origin.base)
    tensors = merged_tensors([origin], headers, origin.quantization, None)
    if tensors is None or not is_streamed(origin.base):
        check_layers(origin.base, quantization, skip)  # before a merge that may take long
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with draft_folder(out.absolute()) as place:
            merged = place / "merged"
            merge([origin], merged, tell)
            return quantize(stored_model(merged), out, quantization, skip, max_shard, check)
    read, vocab_size, untied = tensors.read, tensors.changes.vocab_size, bool(tensors.changes.untied)
    source = StoredModel(
        origin.base, tensors.headers, lambda name: read(name).tensor, origin.folder, vocab_size, untied
    )
    return quantize(source, out, quantization, skip, max_shard, check)


def is_streamed(folder: Path) -> bool:
    """Whether ``write_quantized`` processes the model one tensor at a time."""
    return model_names(meta_model(load_config(folder)), model_headers(folder)) is not None


def _write_by_tensors(
    source: StoredModel,
    names: Mapping[str, str],
    transposed: Mapping[str, bool],
    out: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    max_shard: int,
) -> dict[str, float]:
    """``names`` maps the names that ``source`` stores to the model's. ``transposed`` holds the layers to quantize."""
    errors, headers = {}, source.headers
    announced = [*names, *names.values(), *(f"{layer}.{part}" for layer in transposed for part in PARTS)]
    with shard_writer(out, announced, max_shard) as write:
        for stored, name in names.items():
            tensor = source.read(stored)
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
            layer, _, kind = name.rpartition(".")
            if kind != "weight" or layer not in transposed:
                check_finite(tensor, stored, headers[stored].file)
                is_renamed = not name.endswith(stored) and not stored.endswith(name)
                write(stored if is_renamed else name, tensor)  # save_pretrained restores these names
                continue
            weight = tensor.T.contiguous() if transposed[layer] else tensor
            encoded = encode(weight.to(best_device()), quantization)
            errors[layer] = layer_error(layer, encoded.error, encoded.size, headers[stored])
            for suffix, part in encoded.tensors.items():
                write(f"{layer}.{suffix}", part)
    return errors
