"""The names that PEFT, Transformers, TRL, axolotl, LLaMA-Factory, torchtune, LitGPT, MLX and others use for a recipe's
keys and values."""

from __future__ import annotations

EQUIVALENTS = {
    name: own
    for own, names in {
        "model.name_or_path": "base_model model_name_or_path base_model_name_or_path model_name checkpoint_dir",
        "model.dtype": "torch_dtype mixed_precision precision",
        "model.dtype: bfloat16": "bf16",
        "model.dtype: float16": "fp16",
        "model.attn_implementation: flash_attention_2": "flash_attention flash_attn use_flash_attn",
        "model.attn_implementation": "xformers_attention",
        "model.attn_implementation: sdpa": "sdp_attention",
        "quantization.method: nf4": "load_in_4bit use_4bit_quantization",
        "quantization.method: int8": "load_in_8bit use_8bit_quantization",
        "quantization.method": "quantize quantization_bit bits quantization_method bnb_4bit_quant_type "
        "quantization.type",
        "quantization.compute_dtype": "bnb_4bit_compute_dtype",
        "quantization.double_quant": "bnb_4bit_use_double_quant use_nested_quant double_quantization",
        "adapter.method": "adapter.type peft_type finetuning_type fine_tune_type",
        "adapter.r": "lora_r lora_rank rank",
        "adapter.target_modules, with all-linear for all and a list for several": "lora_target",
        "adapter.target_modules": "lora_attn_modules lora_target_modules lora_query lora_key lora_value "
        "lora_projection lora_mlp apply_lora_to_mlp",
        "adapter.target_modules: all-linear": "lora_target_linear",
        "adapter.target_modules, a list of the modules to adapt": "exclude_modules",
        "adapter.r, adapter.target_modules and adapter.lora_alpha, which is scale times r": "lora_parameters",
        "adapter.target_modules, of linear layers alone": "target_parameters",
        "adapter.layers_to_transform, the layers' numbers": "num_layers",
        "adapter.init_from": "lora_model_dir adapter_name_or_path resume_adapter_file",
        "training.output_dir, or adapter.init_from to start from one": "adapter_path",
        "data.train": "dataset data.path data.files datasets pretraining_dataset dataset_name dataset_mixer "
        "dataset_mixture",
        "data.train, with paths that include the folder": "dataset_dir",
        "data.train, a path or a glob of the files themselves": "data_files",
        "data.train, a list of mappings: [{path: ..., split: ...}]": "splits dataset_split",
        "data.train, a list of mappings: [{path: ..., name: ...}]": "data.name data.config data.subset dataset_config",
        "data.train, a list with weights": "mix_strategy interleave_probs",
        "data.columns": "dataset_text_field field_messages",
        "data.validation": "test_datasets eval_dataset val_set_size val_size",
        "data.format": "data.type",
        "data.max_length": "sequence_len cutoff_len max_seq_length max_seq_len",
        "training.seed": "data_seed random_state",
        "data.packing": "sample_packing neat_packing",
        "data.train_on: all": "train_on_inputs train_on_prompt",
        "data.train_on": "mask_prompt completion_only_loss assistant_only_loss roles_to_train",
        "training.num_train_epochs": "num_epochs epochs",
        "training.max_steps": "iters",
        "training.max_steps, of the whole run": "max_steps_per_epoch",
        "training.per_device_train_batch_size": "micro_batch_size batch_size",
        "training.per_device_train_batch_size, for validation as well": "per_device_eval_batch_size eval_batch_size",
        "training.gradient_accumulation_steps, times per_device_train_batch_size": "global_batch_size",
        "training.per_device_train_batch_size: auto": "auto_find_batch_size",
        "training.learning_rate": "lr",
        "training.lr_scheduler_type": "lr_scheduler lr_schedule",
        "training.warmup_steps": "lr_warmup_steps num_warmup_steps",
        "training.optim": "optimizer",
        "training.eval_steps, in steps": "eval_strategy evaluation_strategy evals_per_epoch",
        "training.eval_steps": "steps_per_eval",
        "training.save_steps, in steps": "save_strategy saves_per_epoch",
        "training.save_steps": "save_every",
        "training.logging_steps": "log_every_n_steps steps_per_report",
        "training.report_to": "logger_name metric_logger",
        "training.gradient_checkpointing": "enable_activation_checkpointing activation_checkpointing "
        "use_gradient_checkpointing",
        "training.gradient_checkpointing: offload": "enable_activation_offloading activation_offloading",
        "training.torch_compile": "torch_compile_backend torch_compile_mode",
        "training.fsdp: true": "fsdp_config",
    }.items()
    for name in names.split()
} | {
    "adapter: qlora": "quantization.method: nf4",
    "adapter.method: dora": "adapter.use_dora: true",
    "adapter.method: rslora": "adapter.use_rslora: true",
    "adapter.method: qlora": "quantization.method: nf4",
    "quantization.method: 4bit": "quantization.method: nf4",
    "quantization.method: int4": "quantization.method: nf4",
    "data.format: chat_template": "data.format: chat",
    "data.format: messages": "data.format: chat",
    "data.format: conversation": "data.format: chat",
    "data.format: completion": "data.format: text",
    "data.format: pretrain": "data.format: text",
    "training.lr_scheduler_type: cosine_with_restarts": "training.lr_scheduler_type: cosine, without restarts",
    "training.lr_scheduler_type: constant_with_warmup": "training.lr_scheduler_type: constant, with its warmup_ratio",
    "training.lr_scheduler_type: cosine_with_min_lr": "training.lr_scheduler_type: cosine, down to 0",
    "model.dtype: half": "model.dtype: float16",
    "training.gradient_checkpointing: unsloth": "training.gradient_checkpointing: offload",
    "training.optim: adamw": "training.optim: adamw_torch",
    "training.optim: adamw_hf": "training.optim: adamw_torch",
    "training.optim: adamw_torch_8bit": "training.optim: adamw_8bit",
    "training.optim: paged_adamw_32bit": "training.optim: adamw_torch, which is not paged",
    "training.warmup_steps: a share": "training.warmup_ratio",
}
"""Another tool's key, with or without a section, or our key with another tool's value → our key or value."""

WITHOUT_KEY = {
    name: f"leave it out: {why}"
    for why, names in {
        "a chat goes through the tokenizer's own template": "chat_template chat_template_format chat_template_path "
        "template",
        "write it into the rows, as their first turn": "default_system",
        "this is read from the model's and the data's files": "model_type tokenizer_type ds_type rope_scaling "
        "tokenizer",
        "this is read from the tokenizer": "special_tokens eos_token pad_token eot_tokens add_special_tokens",
        "a row that is too long loses its end": "truncation_mode",
        "the output layer is not adapted": "lora_head apply_lora_to_output",
        "every row and turn ends with its end token, which is supervised": "append_concat_token train_on_eos",
        "download that revision, and give its folder": "revision model_revision",
        "give fewer rows, or a source in data.train a weight below 1": "max_samples max_train_samples num_samples",
        "in the rows, give a turn that is not to be learned weight: 0": "mask_history",
        "lora trains on text (sft, pt), and not on preferences or rewards": "rl stage",
        "data.packing decides how rows make batches": "pad_to_sequence_len eval_sample_packing eval_packing "
        "group_by_length packing_strategy padding_free pad_to_multiple_of max_packed_sequence_len "
        "train_sampling_strategy length_column_name dataloader_drop_last",
        "rows are kept in the run's cache": "dataset_prepared_path overwrite_cache",
        "all available cores are used": "preprocessing_num_workers dataset_num_proc dataloader_num_workers",
        "use lora train --overwrite": "overwrite_output_dir",
        "use lora train --resume": "resume_from_checkpoint",
        "use lora train --num-processes, or accelerate launch": "devices num_nodes num_processes accelerator_config "
        "parallelism_config",
        "use lora merge ADAPTER --out FOLDER": "export_dir export_size export_device export_legacy_format",
        "lora uploads nothing; hf upload does": "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo "
        "hub_always_push hub_revision push_dataset_to_hub",
        "training.report_to names a tracked run after its folder; its project is in WANDB_PROJECT": "run_name project "
        "wandb_name wandb_run_id wandb_project wandb_entity",
        "trackers get the metrics and the recipe alone": "wandb_watch wandb_log_model trackio_space_id "
        "trackio_bucket_id trackio_static_space_id",
        "an adapter trains no biases": "bias lora_bias",
        "an adapter trains LoRA's own weights only": "modules_to_save additional_target unfrozen_parameters "
        "trainable_token_indices resize_vocab ensure_weight_tying",
        "all layers have the same adapter.r and adapter.lora_alpha": "rank_pattern alpha_pattern",
        "an adapter begins with PEFT's own start, B at 0": "init_lora_weights pissa_init pissa_iter pissa_convert "
        "loftq_config eva_config corda_config lora_ga_config",
        "of LoRA's variants only adapter.use_dora and adapter.use_rslora are supported": "velora_config "
        "alora_invocation_tokens use_qalora qalora_group_size use_bdlora layer_replication arrow_config kasa_config "
        "monteclora_config megatron_config megatron_core",
        "this is read from the model's layers": "fan_in_fan_out layers_pattern",
        "all of the adapter has training.learning_rate": "loraplus_lr_ratio optim_target_modules",
        "the loss is plain cross-entropy, of rows as they are": "neftune_noise_alpha label_smoothing_factor "
        "router_aux_loss_coef loss_type",
        "AdamW has its usual 0.9, 0.999 and 1e-8": "adam_beta1 adam_beta2 adam_epsilon optim_args",
        "a schedule has no settings but its warm-up": "lr_scheduler_kwargs min_lr cosine_min_lr_ratio",
        "a step's loss is the mean over all its tokens": "average_tokens_across_devices",
        "the loss on all validation rows is measured, before the first step too": "metric_for_best_model "
        "greater_is_better compute_accuracy predict_with_generate do_predict val_batches include_for_metrics "
        "batch_eval_metrics eval_delay eval_on_start",
        "a GPU is used if there is one": "device device_map",
        "lora runs no code from a model's folder": "trust_remote_code",
        "set CUDA_VISIBLE_DEVICES= (empty) to use the CPU": "use_cpu",
        "adapter.fused does something similar": "use_liger_kernel enable_liger_kernel liger_kernel_config use_unsloth "
        "plugins",
        "nothing here needs it": "do_train do_eval use_peft use_peft_lora strict tf32 bf16_full_eval fp16_full_eval "
        "logging_strategy plot_loss task_type inference_mode auto_mapping peft_version runtime_config local_rank "
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant use_cache log_level_replica "
        "torch_empty_cache_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level disable_tqdm "
        "include_num_input_tokens_seen prediction_loss_only eval_do_concat_batches eval_use_gather_object "
        "eval_accumulation_steps save_only_model save_on_each_node save_safetensors enable_jit_checkpoint "
        "ignore_data_skip restore_callback_states_from_checkpoint full_determinism remove_unused_columns label_names "
        "dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor debug "
        "dataloader_multiprocessing_context dataloader_in_order skip_memory_metrics ddp_find_unused_parameters "
        "ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend",
    }.items()
    for name in names.split()
}
"""Another tool's key, in whatever section, that has no counterpart in a recipe → a hint that says why."""

PEERS_KEYS = [name for name in (*EQUIVALENTS, *WITHOUT_KEY) if name.isidentifier()]
"""The entries above that are keys alone, without a section or value."""


def peers_hint(section: str, name: str, value: object = True) -> str | None:
    """Return a hint for another tool's key ``name`` in a section, or None when the key is unknown."""
    own = EQUIVALENTS.get(f"{section}.{name}") or EQUIVALENTS.get(name)
    if own is None:
        return WITHOUT_KEY.get(name)
    left_out = value in (False, None) and ": " in own
    return f"leave it out: true is {own} here" if left_out else f"here it is {own}"
