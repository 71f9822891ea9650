"""The names that PEFT, Transformers, TRL, axolotl, LLaMA-Factory, torchtune, LitGPT, MLX and others use for a recipe's
keys and values."""

from __future__ import annotations

EQUIVALENTS = {
    name: own
    for own, names in {
        "model.name_or_path": "base_model model_name_or_path base_model_name_or_path model_name model_id "
        "pretrained_model_name_or_path checkpoint_dir",
        "model.dtype": "torch_dtype mixed_precision precision",
        "model.dtype: bfloat16": "bf16 bfloat16 pure_bf16",
        "model.dtype: float16": "fp16 float16",
        "model.attn_implementation: flash_attention_2": "flash_attention flash_attn use_flash_attn",
        "model.attn_implementation": "xformers_attention",
        "model.attn_implementation: sdpa": "sdp_attention",
        "model.attn_implementation: flex_attention": "flex_attention",
        "model.attn_implementation: eager": "eager_attention",
        "quantization.method: nf4": "load_in_4bit use_4bit_quantization",
        "quantization.method: int8": "load_in_8bit use_8bit_quantization",
        "quantization.method": "quantize quantization_bit bits quantization_method bnb_4bit_quant_type "
        "quantization.type",
        "quantization.compute_dtype": "bnb_4bit_compute_dtype",
        "quantization.double_quant": "bnb_4bit_use_double_quant use_nested_quant use_bnb_nested_quant "
        "double_quantization",
        "training.output_dir": "save_dir out_dir",
        "adapter.method": "adapter.type peft_type finetuning_type fine_tune_type",
        "adapter.r": "lora_r lora_rank rank",
        "adapter.target_modules, with all-linear for all and a list for several": "lora_target",
        "adapter.target_modules": "lora_attn_modules lora_target_modules lora_query lora_key lora_value "
        "lora_projection lora_mlp apply_lora_to_mlp finetune_attention_modules finetune_mlp_modules",
        "adapter.target_modules: all-linear": "lora_target_linear",
        "adapter.target_modules, a list of the modules to adapt": "exclude_modules",
        "adapter.r, adapter.target_modules and adapter.lora_alpha, which is scale times r": "lora_parameters",
        "adapter.target_modules, of linear layers alone": "target_parameters lora_target_parameters",
        "adapter.layers_to_transform, the layers' numbers": "num_layers peft_layers_to_transform",
        "adapter.init_from": "lora_model_dir adapter_name_or_path resume_adapter_file",
        "training.output_dir, or adapter.init_from to start from one": "adapter_path",
        "data.train": "dataset data.path data.files datasets pretraining_dataset dataset_name dataset_mixer "
        "dataset_mixture train_dataset train_file train_data data_path",
        "data.train, with paths that include the folder": "dataset_dir",
        "data.train, a path or a glob of the files themselves": "data_files",
        "data.train, a list of mappings: [{path: ..., split: ...}]": "splits dataset_split dataset_train_split",
        "data.train, a list of mappings: [{path: ..., streaming: true}]": "streaming dataset_streaming",
        "data.train, a list of mappings: [{path: ..., name: ...}]": "data.name data.config data.subset dataset_config",
        "data.train, a list with weights": "mix_strategy interleave_probs",
        "data.columns": "dataset_text_field field field_messages field_instruction field_input "
        "field_output field_system",
        "data.validation": "test_datasets eval_dataset val_set_size val_size test_size validation_file",
        "data.validation, a list of mappings: [{path: ..., split: ...}]": "dataset_test_split",
        "data.format": "data.type",
        "data.max_length": "sequence_len cutoff_len max_seq_length max_seq_len eval_sequence_len block_size "
        "model_max_length",
        "training.seed": "data_seed random_state",
        "data.packing": "sample_packing neat_packing",
        "data.shuffle": "shuffle_dataset shuffle_merged_datasets",
        "data.shuffle: false": "disable_shuffling",
        "data.train_on: all": "train_on_inputs train_on_input train_on_prompt",
        "data.train_on: completion": "train_on_responses_only",
        "data.train_on": "mask_prompt completion_only_loss assistant_only_loss roles_to_train",
        "training.num_train_epochs": "num_epochs epochs",
        "training.max_steps": "iters",
        "training.max_steps, of the whole run": "max_steps_per_epoch",
        "training.per_device_train_batch_size": "micro_batch_size batch_size train_batch_size per_gpu_train_batch_size",
        "training.per_device_train_batch_size, for validation as well": "per_device_eval_batch_size eval_batch_size",
        "training.gradient_accumulation_steps": "gradient_accumulation grad_accum accumulate_grad_batches",
        "training.gradient_accumulation_steps, times per_device_train_batch_size": "global_batch_size "
        "effective_batch_size",
        "training.per_device_train_batch_size: auto": "auto_find_batch_size",
        "training.learning_rate": "lr",
        "training.lr_scheduler_type": "lr_scheduler lr_schedule",
        "training.warmup_steps": "lr_warmup_steps num_warmup_steps",
        "training.optim": "optimizer",
        "training.max_grad_norm": "gradient_clipping gradient_clip_val grad_clip clip_grad_norm",
        "training.eval_steps, in steps": "eval_strategy evaluation_strategy evals_per_epoch",
        "training.eval_steps": "steps_per_eval",
        "training.save_steps, in steps": "save_strategy saves_per_epoch",
        "training.save_steps": "save_every",
        "training.logging_steps": "log_every_n_steps steps_per_report",
        "training.report_to": "logger_name metric_logger log_with",
        "training.report_to: [tensorboard]": "use_tensorboard",
        "training.report_to: [wandb]": "use_wandb",
        "training.report_to: [mlflow]": "use_mlflow",
        "training.report_to: [trackio]": "use_trackio",
        "training.report_to: [swanlab]": "use_swanlab",
        "training.gradient_checkpointing": "enable_activation_checkpointing activation_checkpointing "
        "use_gradient_checkpointing use_unsloth_gc",
        "training.gradient_checkpointing: false": "disable_gradient_checkpointing",
        "training.gradient_checkpointing: offload": "enable_activation_offloading activation_offloading",
        "training.torch_compile": "torch_compile_backend torch_compile_mode",
        "training.fsdp: true": "fsdp_config fsdp_version",
    }.items()
    for name in names.split()
} | {
    "adapter: qlora": "quantization.method: nf4",
    "adapter.method: dora": "adapter.use_dora: true",
    "adapter.method: rslora": "adapter.use_rslora: true",
    "adapter.method: qlora": "quantization.method: nf4",
    "quantization.method: 4": "quantization.method: nf4",
    "quantization.method: 8": "quantization.method: int8",
    "quantization.method: bnb": "quantization.method: nf4, or int8",
    "quantization.method: bitsandbytes": "quantization.method: nf4, or int8",
    "quantization.method: 4bit": "quantization.method: nf4",
    "quantization.method: 8bit": "quantization.method: int8",
    "quantization.method: int4": "quantization.method: nf4",
    "data.format: chat_template": "data.format: chat",
    "data.format: messages": "data.format: chat",
    "data.format: conversation": "data.format: chat",
    "data.format: conversations": "data.format: chat",
    "data.format: sharegpt": "data.format: chat",
    "data.train_on: assistant": "data.train_on: completion",
    "data.format: completion": "data.format: text",
    "data.format: pretrain": "data.format: text",
    "training.lr_scheduler_type: cosine_with_restarts": "training.lr_scheduler_type: cosine, without restarts",
    "training.lr_scheduler_type: constant_with_warmup": "training.lr_scheduler_type: constant, with its warmup_ratio",
    "training.lr_scheduler_type: cosine_with_min_lr": "training.lr_scheduler_type: cosine, down to 0",
    "model.dtype: fp32": "model.dtype: float32",
    "model.dtype: fp16": "model.dtype: float16",
    "model.dtype: half": "model.dtype: float16",
    "quantization.compute_dtype: fp32": "quantization.compute_dtype: float32",
    "quantization.compute_dtype: fp16": "quantization.compute_dtype: float16",
    "quantization.compute_dtype: half": "quantization.compute_dtype: float16",
    "model.attn_implementation: flash_attn": "model.attn_implementation: flash_attention_2",
    "model.attn_implementation: flash_attention": "model.attn_implementation: flash_attention_2",
    "model.attn_implementation: fa2": "model.attn_implementation: flash_attention_2",
    "training.gradient_checkpointing: unsloth": "training.gradient_checkpointing: offload",
    "training.optim: adam": "training.optim: adamw_torch",
    "training.optim: adamw": "training.optim: adamw_torch",
    "training.optim: adamw_hf": "training.optim: adamw_torch",
    "training.optim: adamw_torch_8bit": "training.optim: adamw_8bit",
    "training.optim: paged_adamw_32bit": "training.optim: adamw_torch, which is not paged",
    "training.warmup_steps: a share": "training.warmup_ratio",
    "training.eval_steps: a share": "training.eval_steps, in steps",
    "training.save_steps: a share": "training.save_steps, in steps",
    "training.fsdp: full_shard": "training.fsdp: true",
    "training.fsdp: full_shard auto_wrap": "training.fsdp: true",
}
"""Another tool's key, with or without a section, or our key with another tool's value → our key or value."""

WITHOUT_KEY = {
    name: f"leave it out: {why}"
    for why, names in {
        "a chat goes through the tokenizer's own template": "chat_template chat_template_format chat_template_path "
        "chat_template_jinja chat_template_kwargs template conversation tool_format enable_thinking",
        "a turn is read by its role and content, or from and value": "message_property_mappings message_field_role "
        "message_field_content roles",
        "the chat template itself shows where an answer begins": "instruction_template response_template "
        "instruction_part response_part",
        "write it into the rows, as their first turn": "default_system default_system_message system_prompt",
        "this is read from the model's and the data's files": "model_type tokenizer_type ds_type rope_scaling "
        "tokenizer tokenizer_config processor_type base_model_config overrides_of_model_config use_fast_tokenizer "
        "tokenizer_use_fast tokenizer_legacy",
        "this is read from the tokenizer": "special_tokens eos_token pad_token eot_tokens add_special_tokens tokens "
        "add_tokens added_tokens_overrides split_special_tokens",
        "a row that is too long loses its end": "truncation_mode excess_length_strategy sequence_len_overflow_handling "
        "max_prompt_length max_prompt_len",
        "the output layer is not adapted": "lora_head apply_lora_to_output",
        "every row and turn ends with its end token, which is supervised": "append_concat_token train_on_eos "
        "train_on_eot",
        "download that revision, and give its folder": "revision model_revision revision_of_model",
        "HF_TOKEN and HF_HOME in the environment say this": "token hf_hub_token hf_use_auth_token use_auth_token "
        "cache_dir",
        "give fewer rows, or a source in data.train a weight below 1": "max_samples max_train_samples num_samples "
        "max_num_samples shards",
        "rows are taken as they are, repeated and short ones too": "dataset_exact_deduplication min_sample_len",
        "in the rows, give a turn that is not to be learned weight: 0": "mask_history",
        "lora trains on text (sft, pt), and not on preferences or rewards": "rl stage reward_model ref_model pref_beta "
        "pref_loss",
        "lora trains on text alone": "image_max_pixels video_max_pixels media_dir freeze_vision_tower "
        "finetune_vision_layers",
        "data.packing decides how rows make batches": "pad_to_sequence_len eval_sample_packing eval_packing "
        "group_by_length packing_strategy padding_free pad_to_multiple_of max_packed_sequence_len "
        "train_sampling_strategy length_column_name dataloader_drop_last sample_packing_group_size "
        "sample_packing_bin_size sample_packing_eff_est sample_packing_sequentially multipack_real_batches "
        "batch_flattening",
        "rows are kept in the run's cache": "dataset_prepared_path overwrite_cache tokenized_path "
        "dataset_keep_in_memory dataset_batch_size skip_prepare_dataset preprocessing_batch_size",
        "all available cores are used": "preprocessing_num_workers dataset_num_proc dataset_processes "
        "dataloader_num_workers",
        "use lora train --overwrite": "overwrite_output_dir",
        "use lora train --resume": "resume_from_checkpoint auto_resume_from_checkpoints",
        "use lora train --num-processes, or accelerate launch": "devices num_nodes num_processes nproc_per_node "
        "accelerator_config parallelism_config ddp use_ray ray_num_workers",
        "several processes divide the rows among them, not layers or a row": "tensor_parallel_size "
        "context_parallel_size sequence_parallel_degree expert_parallel_size",
        "use lora merge ADAPTER --out FOLDER": "export_dir export_size export_device export_legacy_format "
        "merge_lora save_method",
        "use lora quantize": "export_quantization_bit export_quantization_dataset",
        "lora uploads nothing; hf upload does": "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo "
        "hub_always_push hub_revision push_dataset_to_hub export_hub_model_id",
        "training.report_to names a tracked run after its folder; its project is in WANDB_PROJECT": "run_name project "
        "wandb_name wandb_run_id wandb_project wandb_entity mlflow_run_name mlflow_experiment_name swanlab_project "
        "swanlab_run_name",
        "a tracker's own environment variables say this": "wandb_mode mlflow_tracking_uri swanlab_mode swanlab_api_key",
        "training.report_to has tensorboard, wandb, mlflow, trackio and swanlab": "use_comet comet_api_key "
        "comet_project_name",
        "TensorBoard's files are in the run's folder": "logging_dir",
        "trackers get the metrics and the recipe alone": "wandb_watch wandb_log_model trackio_space_id "
        "trackio_bucket_id trackio_static_space_id",
        "its settings are keys of adapter": "peft peft_config lora_config",
        "its settings are keys of quantization": "bnb_config bnb_config_kwargs quantization_config",
        "an adapter trains no biases": "bias lora_bias",
        "an adapter trains LoRA's own weights only": "modules_to_save lora_modules_to_save additional_target "
        "unfrozen_parameters trainable_token_indices resize_vocab resize_token_embeddings_to_32x ensure_weight_tying "
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules full_finetuning train_from_scratch",
        "all layers have the same adapter.r and adapter.lora_alpha": "rank_pattern alpha_pattern",
        "an adapter begins with PEFT's own start, B at 0": "init_lora_weights pissa_init pissa_iter pissa_convert "
        "loftq_config eva_config corda_config lora_ga_config peft_init_lora_weights",
        "of LoRA's variants only adapter.use_dora and adapter.use_rslora are supported": "velora_config "
        "alora_invocation_tokens use_qalora qalora_group_size use_bdlora layer_replication arrow_config kasa_config "
        "monteclora_config megatron_config megatron_core peft_layer_replication relora relora_prune_ratio "
        "s2_attention shift_attn",
        "this is read from the model's layers": "fan_in_fan_out lora_fan_in_fan_out layers_pattern peft_layers_pattern",
        "all of the adapter has training.learning_rate": "loraplus_lr_ratio loraplus_lr_embedding optim_target_modules "
        "embedding_lr embedding_lr_scale embedding_learning_rate lr_groups",
        "the loss is plain cross-entropy, of rows as they are": "neftune_noise_alpha noisy_embedding_alpha "
        "label_smoothing_factor router_aux_loss_coef moe_aux_loss_coef loss_type use_dft_loss use_eaft_loss "
        "use_asft_loss",
        "AdamW has its usual 0.9, 0.999 and 1e-8": "adam_beta1 adam_beta2 adam_beta3 adam_epsilon "
        "adam_epsilon2 betas eps optim_args",
        "the optimizer is AdamW, with its state in 32 or 8 bits": "use_galore use_apollo use_badam use_adam_mini "
        "use_muon",
        "a schedule has no settings but its warm-up": "lr_scheduler_kwargs min_lr min_lr_ratio cosine_min_lr_ratio "
        "cosine_constant_lr_ratio jagged_restart_steps jagged_restart_warmup_steps",
        "training.on_nonfinite ends a run whose loss is infinite or NaN": "loss_watchdog_threshold "
        "loss_watchdog_patience",
        "a step's loss is the mean over all its tokens": "average_tokens_across_devices",
        "the loss on all validation rows is measured, before the first step too": "metric_for_best_model "
        "greater_is_better compute_accuracy do_predict val_batches include_for_metrics batch_eval_metrics eval_delay "
        "eval_on_start eval_causal_lm_metrics do_causal_lm_eval do_bench_eval",
        "lora generates no text": "predict_with_generate eval_max_new_tokens eval_table_size eval_num_beams "
        "max_new_tokens temperature top_p top_k do_sample num_beams",
        "a GPU is used if there is one": "device device_map",
        "lora runs no code from a model's folder": "trust_remote_code",
        "set CUDA_VISIBLE_DEVICES= (empty) to use the CPU": "use_cpu no_cuda",
        "adapter.fused does something similar": "use_liger_kernel enable_liger_kernel liger_kernel_config use_unsloth "
        "plugins lora_mlp_kernel lora_qkv_kernel lora_o_kernel cut_cross_entropy liger_rope liger_rms_norm "
        "liger_glu_activation liger_layer_norm liger_fused_linear_cross_entropy flash_attn_cross_entropy "
        "flash_attn_rms_norm flash_attn_fuse_mlp unsloth_lora_mlp unsloth_cross_entropy_loss unsloth_rope",
        "nothing here needs it": "do_train do_eval use_peft use_peft_lora lora_task_type lora_on_cpu "
        "bnb_4bit_quant_storage gpu_memory_limit max_memory low_cpu_mem_usage upcast_layernorm use_reentrant_gc "
        "peft_autocast_adapter_dtype gradient_checkpointing_use_reentrant strict tf32 bf16_full_eval fp16_full_eval "
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
} | {
    f"{key}: {value}": hint
    for key, hint, values in (
        (
            "adapter.method",
            "leave it out: LoRA is the only kind (with adapter.use_dora, adapter.use_rslora); no other part of a model "
            "is trained",
            "full freeze oft boft vera adalora ia3 loha lokr prefix_tuning p_tuning prompt_tuning",
        ),
        (
            "quantization.method",
            "write nf4, fp4 or int8, or leave the section out: a base is quantized to no other type",
            "gptq awq hqq aqlm eetq quanto fp8 mxfp4",
        ),
        (
            "training.optim",
            "leave it out: the optimizer is AdamW, with its state in 32 or 8 bits",
            "adafactor sgd adagrad rmsprop lion lion_8bit lion_32bit paged_lion_8bit paged_lion_32bit ademamix "
            "ademamix_8bit adamw_anyprecision galore_adamw apollo_adamw lomo adalomo grokadamw stable_adamw "
            "schedule_free_adamw schedule_free_sgd muon came_pytorch optimi_adamw adopt_adamw prodigy",
        ),
    )
    for value in values.split()
}
"""Another tool's key, in whatever section, or our key with another tool's value, that has no counterpart in a recipe →
a hint that says why."""

PEERS_KEYS = [name for name in (*EQUIVALENTS, *WITHOUT_KEY) if name.isidentifier()]
"""The entries above that are keys alone, without a section or value."""


def peers_hint(section: str, name: str, value: object = True) -> str | None:
    """Return a hint for another tool's key ``name`` in a section, or None when the key is unknown."""
    own = EQUIVALENTS.get(f"{section}.{name}") or EQUIVALENTS.get(name)
    if own is None:
        return WITHOUT_KEY.get(name)
    left_out = value in (False, None) and ": " in own.partition(", ")[0]  # a value of ours, not the form of a key
    return f"leave it out: true is {own} here" if left_out else f"here it is {own}"


def peers_value_hint(key: str, value: object) -> str | None:
    """Return a hint for another tool's ``value`` of our dotted ``key``, or None when the value is unknown."""
    entry = f"{key}: {value}".lower()
    return f"here it is {EQUIVALENTS[entry]}" if entry in EQUIVALENTS else WITHOUT_KEY.get(entry)
