"""A model in 4 or 8 bits: written so that plain ``from_pretrained`` loads it, with the error that it cost."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lora_cli.errors import UserError, did_you_mean
from lora_cli.model.base import (
    DTYPES,
    best_device,
    bitsandbytes_config,
    load_base,
    load_config,
    load_tokenizer,
    skeleton,
)
from lora_cli.model.files import check_quantizable
from lora_cli.model.linear4bit import expand
from lora_cli.recipe.schema import Model, Quantization
from lora_cli.weights.check import check_weights
from lora_cli.weights.codes import PARTS, encode, roundtrip
from lora_cli.weights.provenance import PROVENANCE
from lora_cli.weights.shards import DTYPES as TYPES
from lora_cli.weights.shards import (
    MAX_SHARD,
    TensorInfo,
    check_finite,
    check_out,
    read_headers,
    read_tensor,
    weight_files,
    whole_folder,
)
from lora_cli.weights.stream import shard_writer

FLOATS = ("F64", "F32", "BF16", "F16")
Sources = Mapping[str, Mapping[str, str | None]]
"""The stored tensors that each of a model's is made of, as ``experts.sources_of`` finds them."""

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


@dataclass(frozen=True)
class Source:
    """The model to quantize: the one in ``folder``, or what an adapter makes of it.

    ``read`` gives a tensor by the name ``folder`` stores it under; ``words`` is the size of the vocabulary where the
    adapter has grown it, ``untied`` says that it has given the head a tensor of its own.
    """

    folder: Path
    headers: dict[str, TensorInfo]
    read: Callable[[str], torch.Tensor]
    adapter: Path | None = None
    words: int | None = None
    untied: bool = False


@dataclass(frozen=True)
class LayerError:
    """A layer's relative error in the Frobenius norm, |Q(W) - W| / |W|."""

    name: str
    relative: float


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


def stored_model(folder: Path) -> Source:
    """The model in ``folder`` as it is."""
    headers = read_headers(weight_files(folder))
    return Source(folder, headers, lambda name: read_tensor(headers[name], name))


def quantize(
    source: Source,
    out: Path,
    quantization: Quantization,
    skip: Sequence[str] = (),
    max_shard: int = MAX_SHARD,
    check: Callable[[Path], None] | None = None,
) -> Quantized:
    """Write the model to ``out`` with its linear layers in 4 or 8 bits, but for the head and those in ``skip``.

    ``check`` is given the whole folder before it stands at ``out``, which it does not when that raises.

    Raises UserError when it is quantized already, its weights are damaged or no numbers, it has no tokenizer, a name in
    ``skip`` is no layer's, or ``out`` will not do.
    """
    folder, adapter = source.folder, source.adapter
    check_out(out)
    check_quantizable(folder)
    bare = skeleton(load_config(folder))
    check_weights(folder, bare)
    check_skip(folder, quantization, skip)
    with_tokenizer = adapter if adapter and (adapter / "tokenizer_config.json").is_file() else folder
    tokenizer = load_tokenizer(with_tokenizer)
    dtype, compute_dtype = _loaded_dtype(folder, bare), DTYPES[quantization.compute_dtype]
    with whole_folder(out) as draft:
        layers = write_quantized(source, draft, quantization, dtype, compute_dtype, skip, max_shard)
        tokenizer.save_pretrained(str(draft))
        for place, name in ((folder, "generation_config.json"), (adapter or folder, PROVENANCE)):
            if (place / name).is_file():
                shutil.copyfile(place / name, draft / name)
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
    with safe_open(weight_files(folder)[0], framework="pt") as file:
        kinds = (file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 (safe_open is no mapping)
        return next((getattr(torch, TYPES[kind]) for kind in kinds if kind in FLOATS), torch.float32)


def _in_experts(bare: PreTrainedModel) -> int:
    """How many numbers are in the parameters of experts that are no layers of their own: these nobody quantizes."""
    return sum(each.numel() for name, each in bare.named_parameters() if each.dim() > 2 and ".experts." in name)


def check_skip(folder: Path, quantization: Quantization, skip: Sequence[str]) -> None:
    """Raises UserError for a name that none of the layers to quantize has, and when no layer is left."""
    layers = list(quantized_layers(folder, quantization))
    ends = sorted({layer.rpartition(".")[2] for layer in layers})
    for name in skip:
        try:
            if not any(should_convert_module(layer, [name]) is False for layer in layers):
                raise UserError(
                    f"--skip {name}: no layer that would be quantized has this name", hint=did_you_mean(name, ends)
                )
        except re.error as error:
            raise UserError(f"--skip {name}: neither a name nor a regular expression: {error}") from error
    if not any(should_convert_module(layer, list(skip)) for layer in layers):
        raise UserError("no layer is left to quantize", str(folder), "skip fewer" if skip else None)


def write_quantized(
    source: Source,
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
    config, headers = load_config(source.folder), source.headers
    if source.untied:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    bare = skeleton(config)
    if skip:  # in place of the default, the head
        default = AutoHfQuantizer.from_config(settings).get_modules_to_not_convert(bare)
        settings.llm_int8_skip_modules = sorted({*default, *skip})
    names = _model_names(bare, headers)
    if names is None:
        return _write_whole(source, bare, out, quantization, dtype, settings, max_shard)
    if source.words is not None:
        bare.config.vocab_size = source.words
    turned = _quantized_skeleton(bare, settings)
    bare.config.dtype, bare.config.quantization_config = dtype, settings
    bare.config.architectures = [type(bare).__name__]
    bare.config.save_pretrained(str(out))
    if bare.can_generate():
        bare.generation_config.save_pretrained(str(out))
    layers = []
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
            if not math.isfinite(encoded.size):
                raise _no_numbers(stored, headers[stored])
            for suffix, part in encoded.tensors.items():
                write(f"{layer}.{suffix}", part)
            layers.append(LayerError(layer, encoded.error / encoded.size if encoded.size else encoded.error))
    return layers


def is_streamed(folder: Path) -> bool:
    """Whether ``write_quantized`` takes the model a tensor at a time."""
    return _model_names(skeleton(load_config(folder)), read_headers(weight_files(folder))) is not None


def _model_names(bare: PreTrainedModel, headers: dict[str, TensorInfo]) -> dict[str, str] | None:
    """The model's name for each stored tensor that it has, but for repeated tied ones.

    None when the model has other tensors than the stored ones, with or without the name of its body before them and
    that of its head by another name, when tied ones are not the same, and when it has buffers among them, whose types
    are its own affair.
    """
    first = {id(parameter): name for name, parameter in bare.named_parameters()}
    known = {name: first[id(parameter)] for name, parameter in bare.named_parameters(remove_duplicate=False)}
    buffers = bare.state_dict().keys() - known.keys()
    prefix, renamed = f"{bare.base_model_prefix}.", _renamed_head(bare, headers)
    names: dict[str, str] = {}
    tied: dict[str, str] = {}
    for stored in headers:
        own = renamed.get(stored, stored)
        found = [name for name in (own, prefix + own, own.removeprefix(prefix)) if name in known or name in buffers]
        if found and found[0] in buffers:
            return None
        if found:
            (names if known[found[0]] == found[0] else tied)[stored] = known[found[0]]
    places = {name: stored for stored, name in names.items()}
    if set(places) != set(first.values()) or len(names) != len(places):
        return None
    repeated = all(_is_same(headers, stored, places[name]) for stored, name in tied.items())
    return names if repeated else None


def _renamed_head(bare: PreTrainedModel, headers: dict[str, TensorInfo]) -> dict[str, str]:
    """The model's name for a head that is stored by another one, which Transformers changes in loading."""
    found = get_model_conversion_mapping(bare, add_legacy=False)
    renamings = [each for each in found if isinstance(each, WeightRenaming)]
    if len(renamings) < len(found):
        return {}
    head = bare.get_output_embeddings()
    own = {f"{name}.weight" for name, module in bare.named_modules() if module is head}
    renamed = {stored: rename_source_key(stored, renamings, [])[0] for stored in headers}
    return {stored: name for stored, name in renamed.items() if name != stored and name in own}


def _is_same(headers: dict[str, TensorInfo], one: str, other: str) -> bool:
    return torch.equal(read_tensor(headers[one], one), read_tensor(headers[other], other))


def _quantized_skeleton(bare: PreTrainedModel, settings: BitsAndBytesConfig) -> dict[str, bool]:
    """Replace the layers that Transformers quantizes, in place; their names, and whether their weight lies turned."""
    quantizer = AutoHfQuantizer.from_config(settings)
    quantizer.preprocess_model(model=bare, device_map=None)
    return {
        name: module.source_cls is Conv1D  # set by Transformers where it replaces a layer
        for name, module in bare.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }


def quantized_layers(folder: Path, quantization: Quantization) -> dict[str, bool]:
    """The layers of a model that Transformers quantizes, and whether their weight lies turned, as (in, out)."""
    return _quantized_skeleton(skeleton(load_config(folder)), bitsandbytes_config(quantization, torch.device("cpu")))


def _no_numbers(name: str, info: TensorInfo) -> UserError:
    return UserError(f"tensor {name} holds values that are no finite numbers", str(info.file))


def _write_whole(
    source: Source,
    bare: PreTrainedModel,
    out: Path,
    quantization: Quantization,
    dtype: torch.dtype,
    settings: BitsAndBytesConfig,
    max_shard: int,
) -> list[LayerError]:
    """By Transformers itself, with the quantized model in memory."""
    from lora_cli.weights.experts import sources_of  # with PEFT, which a model taken by tensors does without

    sources, folder, skip = sources_of(bare, source.headers), source.folder, settings.llm_int8_skip_modules
    _check_numbers(source, bare, sources, dtype)
    model = load_base(folder, Model(name_or_path=str(folder)), quantization, best_device(), dtype, skip=skip)
    model.config.use_cache = True
    model.config.quantization_config = settings
    layers = list(_errors(model, source, sources))
    model.save_pretrained(str(out), max_shard_size=max_shard)
    return layers


def _check_numbers(source: Source, bare: PreTrainedModel, sources: Sources, dtype: torch.dtype) -> None:
    """Raises UserError when a tensor that the model's parameters are made of is not all numbers, as it is loaded: codes
    do not tell."""
    for name, _ in bare.named_parameters(remove_duplicate=False):
        for stored in sources.get(name, {}):
            check_finite(source.read(stored).to(dtype), stored, source.headers[stored].file)


def _errors(model: PreTrainedModel, source: Source, sources: Sources) -> Iterator[LayerError]:
    """Of the layers whose weight is one stored tensor as it is, by whatever name."""
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit | Linear8bitLt):
            continue
        found = sources.get(f"{name}.weight", {})
        stored = next((each for each, pattern in found.items() if pattern is None), None)
        if stored is None:
            continue
        original = source.read(stored).to(module.weight.device, torch.float32)
        if module.source_cls is Conv1D:  # set by Transformers where it replaces a layer
            original = original.T
        size = float(original.norm())
        error = float((_expand(module).float() - original).norm())
        if not math.isfinite(size + error):
            raise _no_numbers(stored, source.headers[stored])
        yield LayerError(name, error / size if size else error)


def _expand(module: Linear4bit | Linear8bitLt) -> torch.Tensor:
    """The layer's weight (out, in) as a matrix product sees it."""
    weight: Any = module.weight
    if isinstance(module, Linear4bit):
        return expand(weight.data, weight.quant_state)
    return cast("torch.Tensor", functional.int8_vectorwise_dequant(weight.data, weight.SCB))


def expand_quantized(model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> None:
    """Replace the weights that training held quantized by what their quantized form stands for, in place.

    ``dtype`` is the type they were quantized from. Transformers itself says which layers those are.
    """
    settings = bitsandbytes_config(quantization, torch.device("cpu"))
    for name, turned in _quantized_skeleton(skeleton(model.config), settings).items():
        parameter = model.get_parameter(f"{name}.weight")
        weight = (parameter.data.T if turned else parameter.data).to(dtype).contiguous()
        expanded = roundtrip(weight, quantization)
        parameter.data = (expanded.T if turned else expanded).to(parameter.dtype).contiguous()
