"""The registry of adapter methods: recipe section -> PEFT configuration -> adapted model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from lora_cli.errors import RunError, UserError
from lora_cli.model.base import ties_words
from lora_cli.model.fused_lora import register
from lora_cli.recipe.schema import Adapter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def lora_config(adapter: Adapter, targets: Sequence[str]) -> LoraConfig:
    """LoRA (arXiv:2106.09685), with rsLoRA's scaling or DoRA's magnitudes when asked for."""
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
    """The base with a new trainable adapter on ``targets`` (full module names); adapter weights are float32."""
    config = METHODS[adapter.method](adapter, targets)
    layers = [base.get_submodule(name) for name in targets]
    # For those who load the adapter: PEFT sees GPT-2's transposed layers by itself, but not once they are quantized.
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
    """The base with the adapter stored in ``folder``, which check_adapter has passed; its embeddings are of the size
    that the adapter holds them in, which may have had words added.

    PEFT reads a pickle where there is no safetensors file: check_adapter sees to it that there is one.
    """
    resize_words(base, folder)
    return PeftModel.from_pretrained(base, str(folder))


def resize_words(base: PreTrainedModel, folder: Path) -> None:
    """Give the base's embeddings the size that the adapter in ``folder`` holds them in, if it does."""
    ends = [base.get_input_embeddings()]
    if ties_words(base.config):
        ends.append(base.get_output_embeddings())
    names = [f"base_model.model.{name}" for name, module in base.named_modules() if module in ends]
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as stored:
        own = [f"{name}{part}.weight" for name in names for part in ("", ".base_layer", ".token_adapter.base_layer")]
        found = next((name for name in own if name in stored.keys()), None)  # noqa: SIM118 (safe_open is no mapping)
        size = None if found is None else stored.get_slice(found).get_shape()[0]
    words = cast("torch.Tensor", ends[0].weight).shape[0]
    if size not in (None, words):  # to its own size it would tie what is stored apart
        base.resize_token_embeddings(size, mean_resizing=False)


def load_adapters(base: PreTrainedModel, folders: Sequence[Path]) -> PeftModel:
    """The base with several adapters, all of them at work; each as ``load_adapter`` has it. Raises UserError for those
    of other experts' parameters than the first, which PEFT does not take beside it."""
    model = load_adapter(base, folders[0])
    names = ["default", *(f"adapter_{number}" for number in range(1, len(folders)))]
    for name, folder in zip(names[1:], folders[1:], strict=True):
        try:
            model.load_adapter(str(folder), adapter_name=name)
        except ValueError as error:
            what = f"PEFT cannot run this adapter together with {folders[0]}: {error}"
            raise UserError(what, str(folder), "--no-verify merges them without running them") from error
    model.base_model.set_adapter(names)  # type: ignore[operator]  # PeftModel has one for a single name
    return model


def continue_adapter(
    base: PreTrainedModel, folder: Path, adapter: Adapter, targets: Sequence[str], fused: bool
) -> PeftModel:
    """The base with the adapter stored in ``folder``, as ``load_adapter``; trained on with the recipe's dropout."""
    config = LoraConfig.from_pretrained(str(folder))
    config.lora_dropout = adapter.lora_dropout
    config.init_lora_weights = True  # it has begun, and MiCA's start would freeze B
    if fused:
        register(config, [base.get_submodule(name) for name in targets])
    return PeftModel.from_pretrained(base, str(folder), config=config, is_trainable=True)


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Name and parameter of everything that is trained, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
