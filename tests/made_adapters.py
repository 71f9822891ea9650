"""Models and adapters made by Transformers and PEFT alone, and their logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ALL_LINEAR = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
R, ALPHA = 4, 6.0


def in_dtype(folder: Path, dtype: torch.dtype, out: Path) -> Path:
    """Save a copy of a model with its weights in another dtype."""
    shutil.copytree(folder, out)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(out)
    return out


def make_adapter(
    name: str,
    folder: Path,
    out: Path,
    save_embedding_layers: bool | str = False,
    seed: int = 5,
    noise: float = 0.1,
    **config: Any,
) -> Path:
    """Save an adapter made by PEFT alone, with random changes to its LoRA tensors, trained modules and tokens.

    Linear layers' B has the standard deviation ``noise``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = LoraConfig(
        task_type="CAUSAL_LM",
        fan_in_fan_out=name == "gpt2",
        **{"r": R, "lora_alpha": ALPHA, "target_modules": ALL_LINEAR[name], **config},
    )
    adapted = get_peft_model(model, wanted)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in adapted.named_parameters():
            if "lora_magnitude" in key:
                weight.mul_(1 + 0.2 * torch.rand(weight.shape, generator=draw))
            elif "lora_" in key:
                weight.copy_((noise if "lora_B" in key else 0.1) * torch.randn(weight.shape, generator=draw))
            elif "modules_to_save" in key or "trainable_tokens_delta" in key:
                weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    adapted.save_pretrained(str(out), save_embedding_layers=save_embedding_layers)
    return out


def answers(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    """The logits of the model in a folder, with an adapter loaded by PEFT if given."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    return logits(adapted, AutoTokenizer.from_pretrained(folder))


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer("Which class does this drug belong to? It is one of many.", return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.double()
