"""Fold an adapter into its base: W + (alpha / r) BA for LoRA (arXiv:2106.09685, section 4.1)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_cli.errors import UserError
from lora_cli.model.adapters import load_adapter
from lora_cli.model.base import DTYPES, load_base, load_tokenizer
from lora_cli.recipe.schema import Model
from lora_cli.weights.provenance import PROVENANCE, AdapterOrigin
from lora_cli.weights.quantize import expand_quantized
from lora_cli.weights.shards import TensorInfo, check_out, read_headers, stored_dtype, weight_files, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Merged:
    """What a merge wrote. ``into`` says which weights the adapter was added to."""

    out: Path
    base: str
    modules: int
    into: str
    dtype: str
    bytes: int


def merge(origin: AdapterOrigin, out: Path) -> Merged:
    """Write the base with the adapter folded in to ``out``: weights in the base's dtype, tokenizer, generation config.

    The sum is taken in float32. An adapter that was trained on a quantized base is added to that base's weights as
    training saw them (quantized and expanded again), which is what it was fitted to.

    Raises UserError when ``out`` will not do or the sum is no number; ``trace`` has checked adapter and base.
    """
    check_out(out)
    adapter = origin.folder
    headers = read_headers(weight_files(origin.base))
    dtype = stored_dtype(headers)
    base = load_base(origin.base, Model(name_or_path=str(origin.base)), None, torch.device("cpu"), torch.float32)
    quantization = origin.recipe.quantization if origin.recipe else None
    if quantization is not None:
        expand_quantized(base, quantization, DTYPES[origin.dtype] if origin.dtype else dtype)
    model = load_adapter(base, adapter)
    modules = len(model.targeted_module_names)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN or infinity in the sum
        raise UserError(f"the weights cannot be merged: {error}", str(adapter)) from error
    _cast_as_stored(merged, headers, dtype)
    merged.config.use_cache = True
    tokenizer = load_tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else origin.base)
    with whole_folder(out) as draft:
        merged.save_pretrained(str(draft))
        tokenizer.save_pretrained(str(draft))
        for folder, name in ((origin.base, "generation_config.json"), (adapter, PROVENANCE)):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, draft / name)
    size = sum(file.stat().st_size for file in weight_files(out))
    into = f"the base in {quantization.method}, expanded" if quantization else "the base"
    return Merged(out, origin.base_name, modules, into, str(dtype).removeprefix("torch."), size)


def _cast_as_stored(model: PreTrainedModel, headers: dict[str, TensorInfo], otherwise: torch.dtype) -> None:
    """Give every weight the type the base stores it in: a base in bfloat16 may keep its norms in float32."""
    for name, parameter in model.named_parameters():
        info = headers.get(name) or headers.get(name.removeprefix(f"{model.base_model_prefix}."))
        parameter.data = parameter.data.to(stored_dtype({name: info}) if info else otherwise)
