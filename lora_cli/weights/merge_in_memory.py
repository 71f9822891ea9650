"""Merge any adapter that PEFT can merge, with the whole model in memory."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel

from lora_cli.errors import Fault, UserError, grouped_error
from lora_cli.model.adapters import load_adapter
from lora_cli.model.base import load_base
from lora_cli.recipe.schema import Model, Quantization
from lora_cli.system.memory import is_out_of_memory
from lora_cli.weights.adapter.adapter_config import ADAPTER_WEIGHTS, read_adapter_config
from lora_cli.weights.adapter.check_adapter import MISFIT
from lora_cli.weights.adapter.origin import AdapterOrigin
from lora_cli.weights.files.shards import TensorInfo, check_finite, read_headers, stored_dtype
from lora_cli.weights.quantized_layers import dequantize_quantized

UNMERGED = {"POLY", "XLORA"}
"""Kinds of adapters that PEFT cannot merge: their update depends on the input."""


def check_kind(folder: Path) -> None:
    """Raises UserError when an adapter is of a kind that PEFT does not support or cannot merge into the weights."""
    kind = read_adapter_config(folder)["peft_type"]
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        what = f"PEFT {version('peft')} cannot read an adapter of kind {kind}: {error}"
        raise UserError(what, str(folder)) from error
    why = "depends on its input" if kind in UNMERGED else "changes no weights"
    if kind in UNMERGED or not hasattr(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], "merge_and_unload"):
        what = f"an adapter of kind {kind} {why} and cannot be merged"
        raise UserError(what, str(folder), "use it unmerged, with PEFT")


def _load(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Load the adapter onto the base.

    Raises UserError when the file's tensors are not those that PEFT expects, or when the adapter adds to a tied
    embedding or head, or trains tokens of a tied head.
    """
    is_tied = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    try:
        adapted = load_adapter(base, folder)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        what = f"PEFT cannot load the adapter: {' '.join(str(error).split())}"
        raise UserError(what, str(folder), "it belongs to another base, or its file is damaged") from error
    if read_adapter_config(folder)["peft_type"] != "LORA":  # LoRA's tensors were checked before
        found = set(read_headers([folder / ADAPTER_WEIGHTS]))
        wanted, known = (
            set(get_peft_model_state_dict(adapted, save_embedding_layers=saved)) for saved in (False, True)
        )
        faults = [Fault(f"tensor {name} is missing", str(folder)) for name in sorted(wanted - found)]
        faults += [
            Fault(f"tensor {name} does not belong in this adapter", str(folder)) for name in sorted(found - known)
        ]
        if faults:
            raise grouped_error(faults, MISFIT)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    adds = [end for end in ends if isinstance(end, BaseTunerLayer) and not isinstance(end, TrainableTokensLayer)]
    if adds and is_tied:
        what = "the adapter adds to the embedding or the head, which are tied in its base"
        raise UserError(what, str(folder), "only plain LoRA is supported there, without DoRA")
    head = ends[1]
    if is_tied and isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is None:
        what = "the adapter trains tokens of the head, which is tied to the embedding in its base"
        raise UserError(what, str(folder), "use it unmerged, with PEFT")
    return adapted


def merge_in_memory(
    origin: AdapterOrigin,
    quantization: Quantization | None,
    seen: torch.dtype,
    headers: dict[str, TensorInfo],
    dtype: torch.dtype | None,
    draft: Path,
    max_shard: int,
) -> int:
    """Write the merged model to ``draft``, its weights as ``dtype`` (None: the base's own). Return the number of
    adapted layers.

    ``quantization`` says how the base was quantized in training, ``seen`` from which dtype. Raises UserError when PEFT
    cannot load or merge the adapter, or a sum holds NaN or infinity.
    """
    folder = origin.base
    base = load_base(folder, Model(name_or_path=str(folder)), None, torch.device("cpu"), torch.float32)
    if quantization is not None:
        dequantize_quantized(base, quantization, seen)
    adapted = _load(base, origin.folder)
    modules = len(adapted.targeted_module_names) + len(adapted.base_model.targeted_parameter_names)  # type: ignore[arg-type]
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        what = f"PEFT cannot merge this adapter: {' '.join(str(error).split())}"
        raise UserError(what, str(origin.folder), "use it unmerged, with PEFT") from error
    except ValueError as error:  # NaN or infinity in the sum
        raise UserError(f"the weights cannot be merged: {error}", str(origin.folder)) from error
    for name, parameter in merged.named_parameters():  # a base in bfloat16 may keep its norms in float32
        info = headers.get(name) or headers.get(name.removeprefix(f"{merged.base_model_prefix}."))
        parameter.data = parameter.data.to(dtype or stored_dtype({name: info} if info else headers))
        check_finite(parameter.data, name, folder)
    merged.config.use_cache = True
    merged.save_pretrained(str(draft), max_shard_size=max_shard)
    return modules
