"""What a finished run produces for others: the adapter folder, its provenance and its model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lora_cli.errors import pluralize
from lora_cli.model.base import save_tokenizer
from lora_cli.recipe.schema import Recipe
from lora_cli.weights.provenance import PROVENANCE


def write_adapter(
    folder: Path,
    model: PeftModel,
    weights: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    provenance: dict[str, Any],
    recipe: Recipe,
) -> None:
    """Write the adapter into ``folder`` in PEFT's layout, with tokenizer, chat template, provenance and model card.

    ``weights`` are the complete trained tensors by name; the model itself may hold only this process's shards.
    """
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = provenance["base"]["name_or_path"]
    model.save_pretrained(str(folder), True, state_dict=dict(weights), save_embedding_layers=False)
    save_tokenizer(tokenizer, folder)
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(recipe, provenance), encoding="utf-8")


def model_card(recipe: Recipe, provenance: dict[str, Any]) -> str:
    """Return the adapter's README.md: its settings, its training data and its validation scores."""
    adapter, training = recipe.adapter, recipe.training
    base = provenance["base"]["name_or_path"]
    data, result = provenance["data"], provenance["result"]
    front = ["---", "library_name: peft", "pipeline_tag: text-generation", f"base_model: {json.dumps(base)}"]
    front += ["tags: [lora, peft]", "---", ""]
    quantized = f", trained on the base in {recipe.quantization.method}" if recipe.quantization else ""
    body = [
        f"# LoRA adapter for {Path(base).name}",
        "",
        f"Rank {adapter.r}, alpha {adapter.lora_alpha:g}{quantized}; {result['trainable_parameters']:,} trained "
        f"parameters, {pluralize(result['steps'], 'step')} at a peak learning rate of {training.learning_rate:g}.",
        "",
        f"Base fingerprint: `{provenance['base']['fingerprint'][:16]}`. Training data: "
        f"{pluralize(data['rows'], 'row')} ({data['supervised_tokens']:,} supervised tokens).",
    ]
    if result["adapter_step"] != result["steps"]:
        body[-1] += f" The weights are those of step {result['adapter_step']:,}, which had the lowest validation loss."
    if result.get("validation"):
        body += [
            "",
            "| validation | loss | perplexity |",
            "|---|---|---|",
            _card_row("base", result["base"]),
            _card_row("with this adapter", result["validation"]),
        ]
    body += [
        "",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "model = AutoPeftModelForCausalLM.from_pretrained(path_of_this_folder)",
        "```",
        "",
    ]
    return "\n".join(front + body)


def _card_row(name: str, score: dict[str, float]) -> str:
    return f"| {name} | {score['loss']:.4f} | {score['perplexity']:.2f} |"
