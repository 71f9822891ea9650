"""Make a LoRA adapter with PEFT that changes its base (B is not 0); ``python -m bench.prepare_adapter job.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

STD = 0.02


def main(job: str) -> None:
    """Write the adapter, and adapter.json with its path."""
    arguments = json.loads(Path(job).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype="auto")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=arguments["r"], lora_alpha=arguments["lora_alpha"], target_modules=arguments["targets"]
    )
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=STD)
    adapted.save_pretrained(str(Path(arguments["folder"]) / "adapter"))
    found = {"adapter": str(Path(arguments["folder"]) / "adapter")}
    (Path(arguments["folder"]) / "adapter.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
