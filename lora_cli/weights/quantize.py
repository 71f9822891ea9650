"""A model in 4 or 8 bits: written so that plain ``from_pretrained`` loads it, with the error that it cost.

Tensor by tensor, from file to file; a model whose tensors are not the stored ones Transformers quantizes, in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lora_cli.model.base import (
    DTYPES,
    best_device,
    bitsandbytes_config,
    load_config,
    load_tokenizer,
    save_tokenizer,
    skeleton,
)
from lora_cli.model.files import tokenizer_folder
from lora_cli.recipe.schema import Quantization
from lora_cli.weights.check_model import check_weights
from lora_cli.weights.codes import PARTS, encode
from lora_cli.weights.folders import copy_if_there, whole_folder
from lora_cli.weights.provenance import PROVENANCE
from lora_cli.weights.quantize_in_memory import quantize_in_memory
from lora_cli.weights.quantized_layers import LayerError, check_layers, layer_error, replace_layers
from lora_cli.weights.shards import GENERATION, MAX_SHARD, check_finite, read_headers, weight_files
from lora_cli.weights.stored_model import StoredModel
from lora_cli.weights.stored_names import model_names
from lora_cli.weights.stream import shard_writer

FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Quantized:
    """What a quantization wrote: sizes in bytes, and each layer's error, worst first.

    There is none for a layer whose weight is not stored by itself. ``in_experts`` is how many numbers were left as they
    are, being those of experts that are joined in a parameter.
    """

    out: Path
    method: str
    bytes_before: int
    bytes_after: int
    layers: tuple[LayerError, ...]
    in_experts: int


def quantize(
    source: StoredModel,
    out: Path,
    quantization: Quantization,
    skip: Sequence[str] = (),
    max_shard: int = MAX_SHARD,
    check: Callable[[Path], None] | None = None,
) -> Quantized:
    """Write the model to ``out`` with its linear layers in 4 or 8 bits, but for the head and those in ``skip``.

    ``check`` is given the whole folder before it stands at ``out``, which it does not when that raises.

    Raises UserError when its weights are damaged or no numbers, its layers could not be loaded again, it has no
    tokenizer, a name in ``skip`` is no layer's, or ``out`` will not do; that it is not quantized has been checked.
    """
    folder, adapter = source.folder, source.adapter
    bare = skeleton(load_config(folder))
    check_weights(folder, bare)
    check_layers(folder, quantization, skip)
    tokenizer = load_tokenizer(tokenizer_folder(folder, *([adapter] if adapter else [])))
    dtype, compute_dtype = _loaded_dtype(folder, bare), DTYPES[quantization.compute_dtype]
    with whole_folder(out) as draft:
        layers = write_quantized(source, draft, quantization, dtype, compute_dtype, skip, max_shard)
        save_tokenizer(tokenizer, draft)
        copy_if_there(draft, folder / GENERATION, (adapter or folder) / PROVENANCE)
        if check is not None:
            check(draft)
    files = weight_files(folder)
    before, after = (sum(file.stat().st_size for file in found) for found in (files, weight_files(out)))
    worst_first = sorted(layers, key=lambda layer: -layer.relative)
    return Quantized(out, quantization.method, before, after, tuple(worst_first), _in_experts(bare))


def _loaded_dtype(folder: Path, bare: PreTrainedModel) -> torch.dtype:
    """The type that Transformers loads a checkpoint in: the one of its configuration, else that of its first tensor of
    floating-point numbers."""
    told = bare.config.dtype
    if isinstance(told, torch.dtype):
        return told
    stored = sorted(read_headers(weight_files(folder)[:1]).items())  # the order in which safetensors tells them
    return next((info.torch_dtype for _, info in stored if info.dtype in FLOATS), torch.float32)


def _in_experts(bare: PreTrainedModel) -> int:
    """How many numbers are in the parameters of experts that are no layers of their own: these nobody quantizes."""
    return sum(each.numel() for name, each in bare.named_parameters() if each.dim() > 2 and ".experts." in name)


def write_quantized(
    source: StoredModel,
    out: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip: Sequence[str] = (),
    max_shard: int = MAX_SHARD,
) -> list[LayerError]:
    """Write configuration and weights as ``from_pretrained`` and ``save_pretrained`` would, without the model.

    Tensors are read, quantized and written one at a time; what is not quantized is written as ``dtype``. Only a model
    whose tensors Transformers renames, joins or splits while loading is loaded whole. Raises UserError when weights are
    missing or no numbers.
    """
    settings = bitsandbytes_config(quantization, best_device())
    if quantization.method != "int8":  # not always what this machine computes best in
        settings.bnb_4bit_compute_dtype = compute_dtype
    config = load_config(source.folder)
    if source.untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    bare = skeleton(config)
    if skip:  # in place of the default, the head
        default = AutoHfQuantizer.from_config(settings).get_modules_to_not_convert(bare)
        settings.llm_int8_skip_modules = sorted({*default, *skip})
    names = model_names(bare, source.headers)
    if names is None:
        return quantize_in_memory(source, bare, out, quantization, dtype, settings, max_shard)
    if source.words is not None:
        bare.config.vocab_size = source.words
    turned = replace_layers(bare, settings)
    bare.config.dtype, bare.config.quantization_config = dtype, settings
    bare.config.architectures = [type(bare).__name__]
    bare.config.save_pretrained(str(out))
    if bare.can_generate():
        bare.generation_config.save_pretrained(str(out))
    return _write_by_tensors(source, names, turned, out, quantization, dtype, max_shard)


def is_streamed(folder: Path) -> bool:
    """Whether ``write_quantized`` takes the model a tensor at a time."""
    return model_names(skeleton(load_config(folder)), read_headers(weight_files(folder))) is not None


def _write_by_tensors(
    source: StoredModel,
    names: Mapping[str, str],
    turned: Mapping[str, bool],
    out: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    max_shard: int,
) -> list[LayerError]:
    """``names`` are the model's by those that ``source`` stores, ``turned`` the layers to quantize."""
    layers, headers = [], source.headers
    announced = [*names, *names.values(), *(f"{layer}.{part}" for layer in turned for part in PARTS)]
    with shard_writer(out, announced, max_shard) as write:
        for stored, name in names.items():
            tensor = source.read(stored)
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
            layer, _, kind = name.rpartition(".")
            if kind != "weight" or layer not in turned:
                check_finite(tensor, stored, headers[stored].file)
                is_renamed = not name.endswith(stored) and not stored.endswith(name)
                write(stored if is_renamed else name, tensor)  # Transformers gives these their old names back
                continue
            weight = tensor.T.contiguous() if turned[layer] else tensor
            encoded = encode(weight.to(best_device()), quantization)
            layers.append(layer_error(layer, encoded.error, encoded.size, stored, headers[stored]))
            for suffix, part in encoded.tensors.items():
                write(f"{layer}.{suffix}", part)
    return layers
