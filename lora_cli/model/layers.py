"""A model's linear layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lora_cli.model.targets import Target

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CANNOT = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What an architecture raises when its forward pass is asked for what it does not know."""

MAMBAS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Model types whose layers named out_proj have their weight read by a kernel, past an adapter: PEFT refuses them."""


def linear_layers(model: PreTrainedModel) -> dict[str, Target]:
    """Every linear layer but the output head, expert routers, gates of one number and those that Mamba's kernels read,
    GPT-2's Conv1D included."""
    head, read_by_kernels = model.get_output_embeddings(), model.config.model_type in MAMBAS
    layers = {}
    for name, module in model.named_modules():
        wide = widths(module)
        if wide is None or module is head or wide[1] == 1 or _is_router(name, wide[1], model):
            continue
        if not (read_by_kernels and name.rpartition(".")[2] == "out_proj"):
            layers[name] = Target(name, *wide)
    return layers


def checkpointed_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers that gradient checkpointing recomputes, one at a time."""
    if not model.supports_gradient_checkpointing:
        return {}
    return {name: part for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)}


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Features in and out of a linear layer; None for any other module."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None


def has_experts(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model's configuration names a mixture of experts."""
    return _experts(model) is not None


def _is_router(name: str, out_features: int, model: PreTrainedModel) -> bool:
    return name.rpartition(".")[2] in ("gate", "router") and out_features == _experts(model)


def _experts(model: PreTrainedModel | PeftModel) -> int | None:
    config = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((count for name in names if (count := getattr(config, name, None))), None)
