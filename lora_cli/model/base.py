"""The base model: its folder, configuration, tokenizer and weights, in full precision or quantized by bitsandbytes."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from lora_cli.errors import UserError, first_few, first_line, is_refused_thread, unreadable
from lora_cli.model.device import best_device, resolve_compute_dtype
from lora_cli.model.files import (
    check_tokenizer,
    custom_code,
    hub_kernels,
    read_config,
    stored_quantization,
    unknown_type,
)
from lora_cli.model.linear4bit import patch_4bit_layers, set_quant_storage
from lora_cli.model.linear8bit import patch_8bit_layers
from lora_cli.recipe.schema import Model, Quantization
from lora_cli.system.cores import usable_cores
from lora_cli.system.memory import is_out_of_memory

CONFIG_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that Transformers raises for a configuration with impossible values."""
ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
"""Types of models in which a token sees later ones unless ``is_decoder`` is set."""
ALWAYS_BIDIRECTIONAL = {"cpmant", "xlnet"}
BIDIRECTIONAL = {"is_causal": (False,), "use_bidirectional_attention": (True, "all"), "causal": (False,)}
"""Keys (of any configuration, Gemma's, XLM's) and the values for which a token sees later ones."""
transformers_logging.disable_progress_bar()


def load_config(folder: Path) -> PreTrainedConfig:
    """The model's configuration. Raises UserError when it is unusable, not a causal LM's, or asks for hub code."""
    where = str(folder / "config.json")
    stored = read_config(folder)
    kind = stored.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise unknown_type(stored, folder)
    kernels = sorted(set(hub_kernels(stored)))
    if kernels:
        what = f"the model asks for code from the hub ({', '.join(kernels)}), which lora does not run"
        raise UserError(what, where, "remove its *_implementation keys")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*CONFIG_ERRORS, StrictDataclassError, OSError) as error:
        raise _unusable(error, where) from error
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"model type '{config.model_type}' is not a causal language model",
            where,
            "lora trains only models that generate text",
        )
    return cast("PreTrainedConfig", config)


def check_causal(config: PreTrainedConfig) -> None:
    """Raises UserError for a model whose tokens see those that they are to predict: an encoder such as BERT, or a
    decoder that its configuration makes one, as models for embeddings are."""
    kind, stated = config.model_type, config.get_text_config()
    is_encoder = kind in ENCODERS and not config.is_encoder_decoder
    keys = BIDIRECTIONAL | ({"is_decoder": (False,)} if is_encoder else {})
    found = {key: getattr(stated, key, None) for key in keys}
    seen = [f" ({key}: {json.dumps(value)})" for key, value in found.items() if value in keys[key]]
    if seen or kind in ALWAYS_BIDIRECTIONAL:
        what = f"a model of type '{kind}' sees the tokens that it is to predict{seen[0] if seen else ''}"
        where = str(Path(config.name_or_path or "") / "config.json")
        raise UserError(what, where, "lora trains only models that generate text")


def check_trainable(config: PreTrainedConfig) -> None:
    """Raises UserError for a Reformer, whose reversible layers compute gradients only if their input, the embeddings,
    needs some too."""
    if config.model_type == "reformer":
        where = str(Path(config.name_or_path or "") / "config.json")
        what = "a model of type 'reformer' passes no gradient to adapters on frozen embeddings"
        raise UserError(what, where, "train a model of another type")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError when it is missing or unusable."""
    check_tokenizer(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"tokenizer_class is {type(tokenizer).__name__}")
    except Exception as error:  # tokenizer_class may name any class of Transformers
        if isinstance(error, OSError) and error.errno:  # from the system: Transformers sets no errno
            raise unreadable(Path(error.filename or folder), error) from error
        if is_out_of_memory(error) or is_refused_thread(error):
            raise
        raise _unusable_tokenizer(error, folder) from error
    return tokenizer


def _unusable_tokenizer(error: Exception, folder: Path) -> UserError:
    file = "tokenizer_config.json"
    own_code = custom_code(read_config(folder, file)) if (folder / file).is_file() else []
    if own_code:
        what = f"the tokenizer needs its own code ({', '.join(own_code)}), which lora does not run (trust_remote_code)"
        return UserError(what, str(folder), "use a model with a tokenizer.json")
    return UserError(f"no usable tokenizer: {first_line(error)}", str(folder), "copy or download it again")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer's files. Raises OSError when they cannot be written."""
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # tokenizers raises nothing more specific when the disk is full
        raise OSError(str(error)) from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to pad with. Any id will do: padding is masked out and never supervised."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def max_positions(config: PreTrainedConfig) -> int | None:
    """The model's maximum number of positions, or None when its configuration states none."""
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(value) if value else None


def ties_embeddings(config: PreTrainedConfig) -> bool:
    """Whether the output layer shares its weight with the input embeddings."""
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))  # Inkling's lacks the key


def longrope_bounds(config: PreTrainedConfig) -> list[int]:
    """The row lengths in tokens above which LongRoPE (arXiv:2402.13753) changes the position embeddings of a batch.

    Once one row is longer than the model's original context, all rows of its batch get the long-context frequencies.
    Rows on different sides of a bound must not share a batch.
    """
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [given] if "rope_type" in given else [each for each in given.values() if isinstance(each, dict)]
    return [each["original_max_position_embeddings"] for each in kinds if each.get("rope_type") == "longrope"]


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights: every module and shape, on the meta device.

    Raises UserError when no model can be built from the configuration.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise _unusable(error, str(Path(config.name_or_path or "") / "config.json")) from error
    return model


def _unusable(error: Exception, where: str) -> UserError:
    what = f"not a usable model configuration: {type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(what, where, "copy or download it again")


def check_attention(config: PreTrainedConfig, implementation: str, device: torch.device) -> None:
    """Raises UserError when the model cannot be trained with this attention on ``device``."""
    if implementation == "auto":
        return
    where, hint = f"model.attn_implementation: {implementation}", "leave it at auto"
    if implementation.startswith(("flash", "flex")) and device.type == "cpu":
        raise UserError(f"{where} trains on a GPU only", hint=hint)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
    except (ImportError, ValueError) as error:
        raise UserError(f"{where}: {str(error).split('. ')[0]}", hint=hint) from error


def bitsandbytes_config(quantization: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """The recipe's quantization section, with its resolved ``compute_dtype``, as Transformers' configuration."""
    if quantization.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.method,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_base(
    folder: Path,
    model: Model,
    quantization: Quantization | None,
    device: torch.device,
    dtype: torch.dtype,
    sharded: bool = False,
    skip: list[str] | None = None,
) -> PreTrainedModel:
    """Load the base with frozen weights on ``device``.

    For ``sharded`` training, 4-bit codes are stored as ``dtype``. Layers in ``skip`` are not quantized; None skips the
    output head. Raises UserError for configurations that ``load_config`` refuses, and when weights cannot be loaded or
    are missing: Transformers would initialize missing weights at random.
    """
    load_config(folder)
    _configure_process(model.attn_implementation)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    if model.attn_implementation != "auto":
        options["attn_implementation"] = model.attn_implementation
    if quantization is not None:
        computes = best_device() if sharded else device
        quantized = bitsandbytes_config(quantization, resolve_compute_dtype(quantization, dtype, computes))
        quantized.llm_int8_skip_modules = skip
        options["quantization_config"] = quantized
    if device.type == "cuda" or stored_quantization(folder):
        options["device_map"] = {"": device}  # by default, Transformers puts codes on a GPU and quantizes there
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    except (ImportError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error) or is_refused_thread(error):
            raise
        raise UserError(f"the model could not be loaded: {first_line(error)}", str(folder)) from error
    base, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if info["missing_keys"]:
        lacking = first_few(sorted(info["missing_keys"]), 3)
        raise UserError(f"the weights lack {lacking}", str(folder), "copy or download them again")
    patch_4bit_layers(base)
    patch_8bit_layers(base)
    if sharded:
        set_quant_storage(base, dtype)
    _cast_parameters(base, dtype)
    base.requires_grad_(False)
    base.config.use_cache = False
    return base


def _configure_process(attn_implementation: str) -> None:
    """Set torch's number of threads and its kernels of attention, for the whole process."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    if attn_implementation == "flex_attention":  # its first call compiles it; uncompiled, it stores all scores
        os.environ.pop("TORCHDYNAMO_DISABLE", None)
    if best_device().type == "cuda":  # the device that computes, wherever the weights are loaded
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN takes a second to plan each new shape of padded rows


def _cast_parameters(base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast all parameters except quantized codes and their scales to ``dtype``: Transformers (5.23) leaves some
    parameters of a stored quantized base in their stored dtype."""
    for module in base.modules():
        own = dict(module.named_parameters(recurse=False))
        codes = any(each.itemsize == 1 or getattr(each, "quant_state", None) is not None for each in own.values())
        for name, parameter in own.items():
            if parameter.is_floating_point() and (name == "bias" or not codes):
                parameter.data = parameter.data.to(dtype)
