"""The names that axolotl, LLaMA-Factory, TRL, Transformers and bitsandbytes use for a recipe's keys and values."""

from __future__ import annotations

WRITTEN_HERE = {
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "torch_dtype": "model.dtype",
    "mixed_precision": "model.dtype",
    "precision": "model.dtype",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: float16",
    "flash_attention": "model.attn_implementation: flash_attention_2",
    "flash_attn": "model.attn_implementation: flash_attention_2",
    "load_in_4bit": "quantization.method: nf4",
    "load_in_8bit": "quantization.method: int8",
    "quantization_bit": "quantization.method",
    "bits": "quantization.method",
    "quantization_method": "quantization.method",
    "bnb_4bit_quant_type": "quantization.method",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "double_quantization": "quantization.double_quant",
    "adapter.type": "adapter.method",
    "peft_type": "adapter.method",
    "finetuning_type": "adapter.method",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "lora_target": "adapter.target_modules, with all-linear for all and a list for several",
    "lora_attn_modules": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules: all-linear",
    "lora_model_dir": "adapter.init_from",
    "adapter_name_or_path": "adapter.init_from",
    "dataset": "data.train",
    "data.path": "data.train",
    "data.files": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_mixer": "data.train",
    "dataset_mixture": "data.train",
    "dataset_text_field": "data.columns",
    "field_messages": "data.columns",
    "test_datasets": "data.validation",
    "eval_dataset": "data.validation",
    "val_set_size": "data.validation",
    "val_size": "data.validation",
    "data.type": "data.format",
    "quantization.type": "quantization.method",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "data_seed": "training.seed",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "train_on_inputs": "data.train_on: all",
    "train_on_prompt": "data.train_on: all",
    "num_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "micro_batch_size": "training.per_device_train_batch_size",
    "per_device_eval_batch_size": "training.per_device_train_batch_size, for validation as well",
    "eval_batch_size": "training.per_device_train_batch_size, for validation as well",
    "batch_size": "training.per_device_train_batch_size",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "optimizer": "training.optim",
    "eval_strategy": "training.eval_steps, in steps",
    "evaluation_strategy": "training.eval_steps, in steps",
    "evals_per_epoch": "training.eval_steps, in steps",
    "save_strategy": "training.save_steps, in steps",
    "saves_per_epoch": "training.save_steps, in steps",
    "log_every_n_steps": "training.logging_steps",
    "enable_activation_checkpointing": "training.gradient_checkpointing",
    "random_state": "training.seed",
    "adapter: qlora": "quantization.method: nf4",
    "adapter.method: dora": "adapter.use_dora: true",
    "adapter.method: rslora": "adapter.use_rslora: true",
    "adapter.method: qlora": "quantization.method: nf4",
    "quantization.method: 4bit": "quantization.method: nf4",
    "quantization.method: int4": "quantization.method: nf4",
    "data.format: chat_template": "data.format: chat",
    "training.lr_scheduler_type: cosine_with_restarts": "training.lr_scheduler_type: cosine, without restarts",
    "training.lr_scheduler_type: constant_with_warmup": "training.lr_scheduler_type: constant, with its warmup_ratio",
    "training.lr_scheduler_type: cosine_with_min_lr": "training.lr_scheduler_type: cosine, down to 0",
    "model.dtype: half": "model.dtype: float16",
    "training.gradient_checkpointing: unsloth": "training.gradient_checkpointing: offload",
    "training.optim: adamw": "training.optim: adamw_torch",
    "training.optim: adamw_hf": "training.optim: adamw_torch",
    "training.optim: adamw_torch_8bit": "training.optim: adamw_8bit",
    "training.optim: paged_adamw_32bit": "training.optim: adamw_torch, which is not paged",
}
"""Another tool's key, with or without a section, or our key with another tool's value → our key or value."""

NOT_HERE = {
    name: f"leave it out: {why}"
    for names, why in (
        ("chat_template template", "a chat goes through the tokenizer's own template"),
        ("model_type tokenizer_type ds_type", "the model's and the data's files tell it"),
        ("rl stage", "lora trains on text (sft, pt), and not on preferences or rewards"),
        ("pad_to_sequence_len eval_sample_packing group_by_length", "data.packing decides how rows make batches"),
        ("dataset_prepared_path overwrite_cache", "rows are kept in the run's cache"),
        ("preprocessing_num_workers dataset_num_proc dataloader_num_workers", "all available cores are used"),
        ("overwrite_output_dir", "use lora train --overwrite"),
        ("resume_from_checkpoint", "use lora train --resume"),
        ("bias", "an adapter trains no biases"),
        ("modules_to_save", "an adapter trains LoRA's own weights only"),
        ("fan_in_fan_out", "the model's layers tell it"),
        ("device device_map", "a GPU is used if there is one"),
        ("do_train do_eval use_peft strict tf32 ddp_timeout gradient_checkpointing_kwargs", "nothing here needs it"),
        ("trust_remote_code logging_strategy plot_loss task_type inference_mode", "nothing here needs it"),
    )
    for name in names.split()
}
"""Another tool's key that has no counterpart in a recipe → a hint that says why."""

PEERS_KEYS = [name for name in (*WRITTEN_HERE, *NOT_HERE) if name.isidentifier()]
"""The entries above that are keys alone, without a section or value."""


def peers_hint(section: str, name: str, value: object = True) -> str | None:
    """Return a hint for another tool's key ``name`` in a section, or None when the key is unknown."""
    own = WRITTEN_HERE.get(f"{section}.{name}") or WRITTEN_HERE.get(name)
    if own is None:
        return NOT_HERE.get(name)
    left_out = value in (False, None) and ": " in own
    return f"leave it out: true is {own} here" if left_out else f"here it is {own}"
