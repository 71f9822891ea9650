"""Check that an adapter and its base hold the tensors that PEFT and Transformers expect. No weight is loaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import PreTrainedModel

from lora_cli.errors import Fault, UserError, grouped_error
from lora_cli.model.adapters import resize_embeddings
from lora_cli.model.base import CONFIG_ERRORS, load_config, meta_model
from lora_cli.model.files import stored_quantization
from lora_cli.weights.adapter.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX, read_adapter_config
from lora_cli.weights.adapter.experts import joins_experts
from lora_cli.weights.files.shards import model_headers, read_headers
from lora_cli.weights.files.stored_model import converters_of, sources_of

Shapes = dict[str, tuple[int, ...]]


def adapter_faults(folder: Path, base: Path) -> list[Fault]:
    """Return what is wrong with a LoRA adapter's tensors according to the base's model; empty for other kinds. Raises
    UserError when the base lacks tensors, PEFT cannot inject the adapter, or it uses the names of Transformers 4."""
    bare = meta_model(load_config(base))
    _check_base_tensors(base, bare)  # before the adapter is injected
    return _lora_faults(folder, bare) if read_adapter_config(folder)["peft_type"] == "LORA" else []


def _check_base_tensors(base: Path, bare: PreTrainedModel) -> None:
    """Raises UserError, by tensor, when a base lacks tensors, which Transformers would initialize at random."""
    if stored_quantization(base) or any(len(each.target_patterns) > 1 for each in converters_of(bare)):
        return  # stored names do not show what is missing
    sources = sources_of(bare, model_headers(base))
    tied: dict[int, list[str]] = {}
    for name, parameter in bare.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    spare = bare._keys_to_ignore_on_load_missing or ()
    missing = [
        Fault(f"tensor {names[0]} is missing", str(base))
        for names in tied.values()
        if not any(name in sources or any(re.search(key, name) for key in spare) for name in names)
    ]
    missing += [Fault(what, str(base)) for what in _missing_experts(bare, sources)]
    if missing:
        raise grouped_error(missing, "copy or download the model again")


def _missing_experts(bare: PreTrainedModel, sources: Mapping[str, Mapping[str, str | None]]) -> Iterator[str]:
    """Yield a message for each parameter that is made of one stored tensor per expert and lacks some of these."""
    for converter in filter(joins_experts, converters_of(bare)):
        for name, parameter in bare.named_parameters():
            stored = sources.get(name, {})
            wanted = parameter.shape[0] * len(converter.source_patterns)
            if stored and {*stored.values()} <= {*converter.source_patterns} and len(stored) < wanted:
                yield f"{wanted - len(stored)} of the {wanted} tensors that {name} is made of are missing"


def _lora_faults(folder: Path, bare: PreTrainedModel) -> list[Fault]:
    """Return the tensors that a LoRA adapter's file lacks, that its configuration does not describe, or whose shapes do
    not fit the base. The adapter is injected into ``bare``. Raises UserError for tensors named as in Transformers 4."""
    resize_embeddings(bare, folder)
    wanted, known = _wanted(folder, bare)
    stored = read_headers([folder / ADAPTER_WEIGHTS])
    found = {_plain(name): (name, info.shape) for name, info in stored.items()}
    place = str(folder)
    if any(re.search(r"\.experts\.\d+\.", name) for name in found.keys() - wanted.keys()):
        hint = "load it on its base with PEFT and save it again: PEFT joins them"
        raise UserError("has factors for each expert (Transformers 4), but the base's experts are joined", place, hint)
    unprefixed = {name.removeprefix(PEFT_PREFIX): info for name, info in stored.items()}
    if any(f"{PEFT_PREFIX}{name}" in wanted.keys() - found.keys() for name in sources_of(bare, unprefixed)):
        hint = "load it on its base with PEFT and save it again: PEFT renames them"
        raise UserError("its tensors have the names of this base's layers in Transformers 4", place, hint)
    faults = [Fault(f"tensor {name} is missing", place) for name in sorted(wanted.keys() - found.keys())]
    for plain, (name, shape) in found.items():
        right = known.get(plain)
        if right is None:
            faults.append(Fault(f"tensor {name} is not described by {ADAPTER_CONFIG}", place))
        elif shape != right:
            faults.append(Fault(f"tensor {name} has shape {list(shape)}, expected {list(right)}", place))
    return faults


def _plain(name: str) -> str:
    """Return a tensor's name without the ``base_layer`` that PEFT adds for a layer it wraps."""
    return name if ".lora_" in name else name.replace(".base_layer.", ".")


def _wanted(folder: Path, bare: PreTrainedModel) -> tuple[Shapes, Shapes]:
    """Inject the adapter in ``folder`` into ``bare``. Return the tensors that its file must hold, and these with the
    base's embedding and head, which PEFT may save too. Raises UserError when PEFT cannot inject the adapter."""
    try:
        with warnings.catch_warnings(action="ignore"):  # PEFT's are meant for training or loading the adapter
            config = LoraConfig.from_pretrained(str(folder))
            config.init_lora_weights = True  # there are no weights to initialize from
            config.alpha_pattern = {}  # no tensor depends on it
            adapted = get_peft_model(bare, config, low_cpu_mem_usage=True)
            states = [get_peft_model_state_dict(adapted, save_embedding_layers=saved) for saved in (False, True)]
    except (*CONFIG_ERRORS, NotImplementedError) as error:
        what = f"PEFT cannot put this adapter on its base: {' '.join(str(error).split())}"
        hint = "it belongs to another base, or its file is damaged"
        raise UserError(what, str(folder / ADAPTER_CONFIG), hint) from error
    wanted, known = ({_plain(name): tuple(tensor.shape) for name, tensor in state.items()} for state in states)
    return wanted, known
