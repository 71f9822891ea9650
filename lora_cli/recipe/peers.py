"""What axolotl, LLaMA-Factory, TRL, Transformers and bitsandbytes call what a recipe says."""

from __future__ import annotations

WRITTEN_HERE = {
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "flash_attention": "model.attn_implementation: flash_attention_2",
    "flash_attn": "model.attn_implementation: flash_attention_2",
    "load_in_4bit": "quantization.method: nf4",
    "load_in_8bit": "quantization.method: int8",
    "quantization_bit": "quantization.method",
    "bnb_4bit_quant_type": "quantization.method",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules: all-linear",
    "lora_model_dir": "adapter.init_from",
    "adapter_name_or_path": "adapter.init_from",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "test_datasets": "data.validation",
    "eval_dataset": "data.validation",
    "val_set_size": "data.validation",
    "val_size": "data.validation",
    "data.type": "data.format",
    "quantization.type": "quantization.method",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "sample_packing": "data.packing",
    "train_on_inputs": "data.train_on",
    "train_on_prompt": "data.train_on",
    "num_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "micro_batch_size": "training.per_device_train_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "eval_strategy": "training.eval_steps",
    "save_strategy": "training.save_steps",
}


def written_here(section: str, name: str) -> str | None:
    """What to write here for a peer's key that stands in a section."""
    return WRITTEN_HERE.get(f"{section}.{name}") or WRITTEN_HERE.get(name)
