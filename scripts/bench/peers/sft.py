"""TRL's SFTTrainer on the work; ``python -m bench.peers.sft job.json``. Options: SFTConfig's, attn_implementation."""

from __future__ import annotations

import sys
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from bench.peers.meter import Meter, common_arguments, settings_of
from bench.work import read_job, read_rows, write_report


def main(job: str) -> None:
    work, folder, options = read_job(job)
    attention = options.pop("attn_implementation", None)
    loading: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    if work.precision == "float32":
        options, loading = options | {"bf16": False}, loading | {"dtype": "float32"}
    arguments = SFTConfig(
        **common_arguments(work, folder, options.get("packing", False)),
        **options,
        max_length=work.max_length,
        model_init_kwargs=loading,
    )
    meter = Meter()
    trainer = SFTTrainer(
        model=work.model,
        args=arguments,
        train_dataset=Dataset.from_list(read_rows(work.train)),
        peft_config=LoraConfig(
            r=work.r, lora_alpha=work.lora_alpha, target_modules=list(work.targets), task_type="CAUSAL_LM"
        ),
        callbacks=[meter],
    )
    meter.watch(trainer.model)
    trainer.train()
    trainer.model.save_pretrained(folder / "adapter")
    write_report(meter.report(work, trainer.model, folder / "adapter", settings_of(arguments, trainer.model)), folder)


if __name__ == "__main__":
    main(sys.argv[1])
