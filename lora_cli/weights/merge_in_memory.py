"""Adapters folded into their base by PEFT, with the whole model in memory: whatever PEFT can merge."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_cli.errors import UserError
from lora_cli.model.adapters import load_adapter
from lora_cli.model.base import load_base
from lora_cli.recipe.schema import Model, Quantization
from lora_cli.weights.provenance import AdapterOrigin
from lora_cli.weights.quantize import expand_quantized
from lora_cli.weights.shards import TensorInfo, stored_dtype


def merge_in_memory(
    origin: AdapterOrigin,
    quantization: Quantization | None,
    seen: torch.dtype,
    headers: dict[str, TensorInfo],
    dtype: torch.dtype | None,
    draft: Path,
    max_shard: int,
) -> int:
    """Write the merged model, its weights as ``dtype`` (None for the base's own), to ``draft``; the number of layers
    adapted.

    ``quantization`` and ``seen`` say what the base was quantized to and from in training. Raises UserError when a sum
    is no number.
    """
    folder = origin.base
    base = load_base(folder, Model(name_or_path=str(folder)), None, torch.device("cpu"), torch.float32)
    if quantization is not None:
        expand_quantized(base, quantization, seen)
    adapted = load_adapter(base, origin.folder)
    modules = len(adapted.targeted_module_names)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # NaN or infinity in the sum
        raise UserError(f"the weights cannot be merged: {error}", str(origin.folder)) from error
    for name, parameter in merged.named_parameters():  # a base in bfloat16 may keep its norms in float32
        info = headers.get(name) or headers.get(name.removeprefix(f"{merged.base_model_prefix}."))
        parameter.data = parameter.data.to(dtype or stored_dtype({name: info} if info else headers))
    merged.config.use_cache = True
    merged.save_pretrained(str(draft), max_shard_size=max_shard)
    return modules
