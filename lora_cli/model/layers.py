"""A model's layers: the linear ones, those that an adapter can train, those that can be checkpointed, experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import UserError
from lora_cli.model.targets import Target, bypasses_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def linear_layers(model: PreTrainedModel) -> dict[str, Target]:
    """Every linear layer, GPT-2's Conv1D included, except the output head, expert routers and gates with one output."""
    head, layers = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        wide = in_out_features(module)
        if wide is not None and module is not head and wide[1] > 1 and not _is_router(name, wide[1], model):
            layers[name] = Target(name, *wide)
    return layers


def adaptable_layers(model: PreTrainedModel) -> dict[str, Target]:
    """The ``linear_layers`` that an adapter can train: not those whose weight the model reads past the adapter, whose
    names PEFT takes for experts' or does not find again, or that are in vision or audio towers (Gemma 3), which no text
    goes through."""
    config, kind = model.config, model.config.model_type
    text = model if config.get_text_config() is config else model.get_decoder()
    within = set(text.modules())
    layers = {
        name: target
        for name, target in linear_layers(model).items()
        if model.get_submodule(name) in within and not bypasses_adapter(name, kind)
    }
    return _loadable(_not_for_experts(layers, model), model) if has_experts(model) else layers


def _not_for_experts(layers: dict[str, Target], model: PreTrainedModel) -> dict[str, Target]:
    """The layers whose names PEFT does not convert. Where Transformers joins the experts of a mixture, PEFT takes some
    names for those of single experts, even names of dense layers or shared experts (DeepSeek-V3's gate_proj). It then
    adapts the joined experts instead, both when an adapter is created and when it is loaded."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=list(layers))
    convert_peft_config_for_transformers(config, model, None)
    return {name: target for name, target in layers.items() if name in (config.target_modules or ())}


def _loadable(layers: dict[str, Target], model: PreTrainedModel) -> dict[str, Target]:
    """Return the layers whose factors PEFT finds again when it loads an adapter. Transformers' patterns for older names
    also match some current names (Laguna's shared_experts)."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    factors = {name: f"base_model.model.{name}.lora_A.weight" for name in layers}
    stored = {factor: torch.empty(1, layers[name].in_features, device="meta") for name, factor in factors.items()}
    found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), stored)
    return {name: target for name, target in layers.items() if factors[name] in found}


def checkpointed_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that gradient checkpointing recomputes, one at a time."""
    if not model.supports_gradient_checkpointing:
        return {}
    return {name: part for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)}


def check_checkpointing(model: PreTrainedModel) -> None:
    """Raises UserError when the architecture does not support gradient checkpointing."""
    if not model.supports_gradient_checkpointing:
        what = "training.gradient_checkpointing: this architecture cannot recompute its activations"
        raise UserError(what, hint="set it to false; a smaller batch or a lower data.max_length keeps fewer of them")


def in_out_features(module: nn.Module) -> tuple[int, int] | None:
    """The input and output features of a linear layer; None for any other module."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None


def is_8_bit(module: nn.Module) -> bool:
    """Whether this is bitsandbytes' 8-bit layer or PEFT's wrapper of one; compares names, to import neither library."""
    return type(module).__name__ == "Linear8bitLt"


def has_experts(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model's configuration names a mixture of experts."""
    return _experts(model) is not None


def _is_router(name: str, out_features: int, model: PreTrainedModel) -> bool:
    within, _, own = name.rpartition(".")
    is_inside = "Router" in type(model.get_submodule(within)).__name__
    return is_inside or (own in ("gate", "router") and out_features == _experts(model))


def _experts(model: PreTrainedModel | PeftModel) -> int | None:
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((count for name in names if (count := getattr(config, name, None))), None)
