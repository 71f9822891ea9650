"""The registry of adapter methods: recipe section -> PEFT configuration -> adapted model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import RunError, UserError
from lora_cli.model.base import ties_embeddings
from lora_cli.model.fast_paths.fused_lora import register
from lora_cli.recipe.schema import Adapter


def lora_config(adapter: Adapter, targets: Sequence[str]) -> LoraConfig:
    """The configuration of LoRA (arXiv:2106.09685), optionally with rsLoRA's scaling or DoRA's magnitudes."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,  # type: ignore[arg-type]  # PEFT divides by r; a fraction works
        lora_dropout=adapter.lora_dropout,
        target_modules=list(targets),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
    )


METHODS: dict[str, Callable[[Adapter, Sequence[str]], LoraConfig]] = {"lora": lora_config}


def adapt(base: PreTrainedModel, adapter: Adapter, targets: Sequence[str], fused: bool) -> PeftModel:
    """Put a new trainable float32 adapter on ``targets`` (full module names). Raises RunError if PEFT adapts others."""
    config = METHODS[adapter.method](adapter, targets)
    layers = [base.get_submodule(name) for name in targets]
    # Stored for whoever loads the adapter: PEFT detects GPT-2's transposed layers by itself, unless they are quantized.
    if any(getattr(layer, "source_cls", type(layer)) is Conv1D for layer in layers):
        config.fan_in_fan_out = True
    if fused:
        register(config, layers)
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    if set(model.targeted_module_names) != set(targets):
        raise RunError(
            "PEFT would adapt other layers of this model than it was asked to",
            hint="choose other adapter.target_modules",
        )
    return model


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """Load the adapter in ``folder``, which check_adapter has accepted, onto the base.

    The base's embeddings are resized to those stored with the adapter, to which tokens may have been added. Without a
    safetensors file PEFT would read a pickle; check_adapter has made sure that there is one.
    """
    resize_embeddings(base, folder)
    return PeftModel.from_pretrained(base, str(folder))


def resize_embeddings(base: PreTrainedModel, folder: Path) -> None:
    """Resize the base's embeddings to the size of those stored with the adapter in ``folder``, if any are."""
    ends = [base.get_input_embeddings()]
    if ties_embeddings(base.config):
        ends.append(base.get_output_embeddings())
    names = [f"base_model.model.{name}" for name, module in base.named_modules() if module in ends]
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as stored:
        own = [f"{name}{part}.weight" for name in names for part in ("", ".base_layer", ".token_adapter.base_layer")]
        found = next((name for name in own if name in stored.keys()), None)  # noqa: SIM118 (safe_open is not a mapping)
        size = None if found is None else stored.get_slice(found).get_shape()[0]
    vocab_size = cast("torch.Tensor", ends[0].weight).shape[0]
    if size not in (None, vocab_size):  # resizing to the present size would tie weights that are stored separately
        base.resize_token_embeddings(size, mean_resizing=False)


def load_adapters(base: PreTrainedModel, folders: Sequence[Path]) -> PeftModel:
    """Load several adapters onto the base, all of them active; see ``load_adapter``. Raises UserError for an adapter of
    other expert parameters than the first adapter's, which PEFT cannot load together."""
    model = load_adapter(base, folders[0])
    names = ["default", *(f"adapter_{number}" for number in range(1, len(folders)))]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        try:
            model.load_adapter(str(folder), adapter_name=name)
        except ValueError as error:
            what = f"PEFT cannot run this adapter together with {folders[0]}: {error}"
            raise UserError(what, str(folder), "--no-verify merges them without running them") from error
    model.base_model.set_adapter(names)  # type: ignore[operator]  # PeftModel's own takes a single name
    return model


def continue_adapter(
    base: PreTrainedModel, folder: Path, adapter: Adapter, targets: Sequence[str], fused: bool
) -> PeftModel:
    """Load the adapter in ``folder`` onto the base to continue its training, with the recipe's dropout."""
    config = LoraConfig.from_pretrained(str(folder))
    config.lora_dropout = adapter.lora_dropout
    config.init_lora_weights = True  # the weights are loaded, and MiCA's initialization would freeze B
    if fused:
        register(config, [base.get_submodule(name) for name in targets])
    return PeftModel.from_pretrained(base, str(folder), config=config, is_trainable=True)


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that are trained, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
