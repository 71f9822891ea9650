"""A typical script with Transformers' Trainer: dynamic padding, no gradient checkpointing;
``python -m bench.peers.script job.json``. The option ``bf16`` applies to weights and autocast."""

from __future__ import annotations

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bench.peers.meter import Meter, common_arguments, settings_of
from bench.work import read_job, read_rows, write_report


def main(job: str) -> None:
    work, folder, options = read_job(job)
    set_seed(work.seed)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    rows = read_rows(work.train)
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    wholes = tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]
    examples = []
    for prompt, whole in zip(prompts, wholes, strict=True):
        ids = [*whole, tokenizer.eos_token_id][: work.max_length]
        labels = [-100] * min(len(prompt), len(ids)) + ids[len(prompt) :]
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})

    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16 if options["bf16"] else torch.float32)
    model.config.use_cache = False
    lora = LoraConfig(r=work.r, lora_alpha=work.lora_alpha, target_modules=list(work.targets), task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    arguments = TrainingArguments(**common_arguments(work, folder, packing=False), bf16=options["bf16"])
    meter = Meter()
    meter.watch(model)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[meter],
    )
    trainer.train()
    model.save_pretrained(folder / "adapter")
    write_report(meter.report(work, model, folder / "adapter", settings_of(arguments, model)), folder)


if __name__ == "__main__":
    main(sys.argv[1])
