"""Fields of axolotl's files: which are without a bearing on memory, and which have one that no formula covers.

Source: axolotl 0.19.0, utils/schemas/*.py, AxolotlInputConfig and its bases, and integrations/*/args.py.
"""

from collections.abc import Mapping

from app.fields import names

# Source: axolotl 0.19.0, utils/schemas/enums.py, LEGACY_ATTN_FLAG_TO_IMPL, in its order.
ATTENTION_FLAGS: Mapping[str, str] = {
    "xformers_attention": "xformers",
    "sage_attention": "sage",
    "flex_attention": "flex_attention",
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
}

# Source: axolotl 0.19.0, utils/schemas/config.py, check_auto_enable_lora_kernels.
LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")

# Keys that mean something with an adapter alone, beside those of the tables below.
ADAPTER = frozenset(LORA_KERNELS) | names("""
    lora_dropout lora_model_dir lora_modules_to_save lora_r lora_rank_pattern lora_target_linear lora_target_modules
    lora_target_parameters peft peft_autocast_adapter_dtype peft_layers_pattern peft_layers_to_transform peft_trainable_token_indices
    peft_use_dora peft_use_rslora
""")

INERT = names("""
    adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 added_tokens_overrides auto_resume_from_checkpoints
    axolotl_config_path bench_dataset bench_split center_rewards_coefficient chat_template chat_template_jinja
    chat_template_kwargs chunked_cross_entropy_num_chunks cls_model_config comet_api_key comet_experiment_config comet_experiment_key
    comet_mode comet_online comet_project_name comet_workspace cosine_constant_lr_ratio cosine_min_lr_ratio cpo_alpha
    curriculum_sampling dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
    dataset_exact_deduplication dataset_keep_in_memory dataset_num_proc dataset_prepared_path dataset_processes dataset_shard_idx
    dataset_shard_num datasets ddp ddp_broadcast_buffers ddp_timeout default_system_message device dion_lr dion_momentum
    dion_rank_fraction dion_rank_multiple_of do_bench_eval do_causal_lm_eval dpo_beta dpo_generate_during_eval dpo_label_smoothing
    dpo_loss_type dpo_loss_weights dpo_norm_loss dpo_padding_free dpo_use_liger_kernel dpo_use_logits_to_keep dpo_use_weighting
    dynamic_checkpoint eaft_alpha eaft_k early_stopping_patience embedding_lr embedding_lr_scale embeddings_skip_upcast eot_tokens
    eval_causal_lm_metrics eval_max_new_tokens eval_sample_packing eval_sequence_len
    eval_table_size excess_length_strategy experimental_skip_move_to_device fix_untrained_tokens
    flex_attn_compile_kwargs float32 fp32_norm_classes fp8_config fp8_enable_fsdp_float8_all_gather freeze_mm_modules
    fsdp_final_state_dict_type gc_collect_steps generate_samples generation_do_sample generation_max_new_tokens
    generation_prompt_ratio generation_temperature generation_top_k generation_top_p gptq_disable_exllama gradio_max_new_tokens
    gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title greater_is_better group_by_length
    heads_k_stride hf_mlflow_log_artifacts hf_use_auth_token hub_model_id hub_revision hub_strategy image_resize_algorithm
    image_size include_tkps include_tokens_per_second is_falcon_derived_model is_llama_derived_model is_mistral_derived_model
    is_preprocess is_qwen_derived_model jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps
    kto_desirable_weight kto_undesirable_weight learning_rate lisa_layers_attribute lisa_step_interval load_best_model_at_end
    local_rank logging_steps lora_alpha lora_alpha_pattern lora_fan_in_fan_out loraplus_lr_embedding loraplus_lr_ratio
    loss_watchdog_patience loss_watchdog_threshold low_cpu_mem_usage lr_div_factor lr_groups lr_quadratic_warmup lr_scheduler
    lr_scheduler_kwargs max_grad_norm max_packed_sequence_len max_prompt_len max_steps mean_resizing_embeddings merge_lora
    merge_method metric_for_best_model min_sample_len mlflow_experiment_name mlflow_run_name mlflow_tracking_uri
    model_quantization_config_kwargs noisy_embedding_alpha num_dataset_shards_to_save num_epochs
    num_generation_samples num_labels orpo_alpha otel_metrics_host otel_metrics_port output_dir pose_max_context_len pose_num_chunks
    pose_split_on_token_ids precompute_ref_log_probs preprocess_iterable pretrain_multipack_attn pretrain_multipack_buffer_size
    pretraining_sample_concatenation processor_kwargs processor_type profiler_steps profiler_steps_start push_dataset_to_hub
    qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits qgalore_proj_group_size qgalore_proj_quant qgalore_proj_type
    qgalore_queue_size qgalore_rank qgalore_scale qgalore_update_proj_gap qlora_sharded_model_loading quantization
    ray_num_workers ray_run_name reinit_weights relora_prune_method relora_prune_ratio remove_unused_columns
    resources_per_worker resume_from_checkpoint ring_attn_func rl_beta role_boundaries rpo_alpha sample_packing_bin_size
    sample_packing_eff_est sample_packing_group_size sample_packing_mp_start_method sample_packing_sequentially save_first_step
    save_only_model save_safetensors save_steps save_strategy save_total_limit saves_per_epoch scaling_softmax_bias
    scaling_softmax_factor seed shuffle_before_merging_datasets shuffle_merged_datasets simpo_gamma skip_prepare_dataset
    special_tokens streaming streaming_multipack_buffer_size strict tf32 tiled_mlp_num_shards
    tiled_mlp_use_original_mlp tokenizer_config tokenizer_legacy tokenizer_save_jinja_files tokenizer_type tokenizer_use_fast
    tokenizer_use_mistral_common torch_compile_backend torch_compile_mode torch_compile_options torchdistx_path
    total_num_tokens total_supervised_tokens trackio_project_name trackio_run_name trackio_space_id train_on_inputs trl
    use_comet use_mlflow use_otel_metrics use_ray use_tensorboard use_trackio use_wandb vllm
    wandb_entity wandb_log_model wandb_mode wandb_name wandb_project wandb_run_id wandb_watch warmup_ratio warmup_steps
    trust_remote_code world_size ebft
""")

_DISTRIBUTED = "it spreads the work over several processes"
_KERNELS = "fused kernels keep other tensors than the operators they replace"
_GROWS = "the embeddings are resized"
_TRAINED = "it decides which parameters are trained"
_PLACED = "it decides where weights lie"
_ADAPTER = "it changes the adapter's tensors, or how they are made"
_COMPILED = "compiled kernels keep and take other tensors than the operators they replace"

UNMODELLED: Mapping[str, str] = {
    "accelerator_config": "it can change how gradients are synchronized",
    "auto_find_batch_size": "the batch is made smaller each time memory runs out",
    "base_model_config": "another config than the model's own is loaded",
    "batch_flattening": "samples of a batch are laid end to end, without padding; padded batches are counted",
    "chunked_cross_entropy": "the loss is taken from the logits in pieces",
    "context_parallel_size": _DISTRIBUTED,
    "deepcompile": _COMPILED,
    "device_map": _PLACED,
    "dp_replicate_size": _DISTRIBUTED,
    "dp_shard_size": _DISTRIBUTED,
    "experts_implementation": "it decides which tensors the experts keep",
    "flash_attn_cross_entropy": "another loss kernel is taken",
    "flash_attn_d512": _KERNELS,
    "flash_attn_fuse_mlp": _KERNELS,
    "flash_attn_rms_norm": _KERNELS,
    "flash_optimum": "BetterTransformer replaces layers",
    "fp32_norms": "norms stay float32",
    "fp8": "matrices are multiplied in FP8, from copies",
    "fused_attn_kernel": _KERNELS,
    "gc_steps": "unused segments are given back now and then, so that less than shown is reserved",
    "gemma4_hybrid_attn_impl": "layers take different attention implementations",
    "gpu_memory_limit": _PLACED,
    "large_head_attention": _KERNELS,
    "layer_offloading": "layers are moved to the host between their uses",
    "lisa_n_layers": _TRAINED,
    "llama4_linearized_experts": "experts become modules that are quantized",
    "lora_exclude_modules": "modules are left out of the adapter",
    "lora_on_cpu": _PLACED,
    "max_memory": _PLACED,
    "model_config": "the model's config is overridden",
    "model_kwargs": "arguments of from_pretrained are overridden",
    "neftune_noise_alpha": "noise of the embeddings' size is added to them",
    "optim_target_modules": "it decides which parameters get another kind of optimizer state",
    "overrides_of_model_config": "the model's config is overridden",
    "overrides_of_model_kwargs": "arguments of from_pretrained are overridden",
    "peft_ensure_weight_tying": "adapters or copies of tied modules are tied too",
    "peft_init_lora_weights": "the weights are decomposed or data is run through the model when the adapter is made",
    "peft_layer_replication": "layers are repeated, each with an adapter of its own",
    "ple_cpu_offload": "an embedding table stays on the host",
    "pretraining_dataset": "rows are made from a stream of text; sequences of full length are counted",
    "qat": "weights are quantized and dequantized in each pass",
    "quantize_moe_experts": "experts are quantized too; they are counted as transformers loads them",
    "relora": "adapters are merged and optimizer states pruned now and then",
    "relora_cpu_offload": _PLACED,
    "resize_token_embeddings_to_32x": _GROWS,
    "rope_scaling": "it changes the positions of the model",
    "s2_attention": "shifted sparse attention keeps other tensors",
    "scaling_softmax": _KERNELS,
    "sdpa_varlen": "packed rows are told apart by lengths and not by a mask; the mask is counted",
    "selective_checkpointing": "outputs of some operators are kept beside the layers' inputs",
    "sequence_parallel_degree": _DISTRIBUTED,
    "shrink_embeddings": _GROWS,
    "tensor_parallel_size": _DISTRIBUTED,
    "tiled_mlp": "the MLP runs in pieces, each with fewer tensors",
    "tokens": "the embeddings grow by the added tokens",
    "torch_compile": _COMPILED,
    "torch_empty_cache_steps": "unused segments are given back now and then, so that less than shown is reserved",
    "trainer_cls": "another trainer is taken",
    "unfrozen_parameters": _TRAINED + "; all are counted as trained",
    "use_eaft": "it takes its loss from the full logits by operators of its own",
    "use_kernels": _KERNELS,
    "use_onebitllms": "layers are replaced by BitNet's",
    "use_pose": "positions are stretched",
}

# Keys of plugins, in effect only where `plugins` lists theirs.
# Source: axolotl 0.19.0, integrations/*/args.py; utils/config, validate_config (merged from the plugins that are listed).
PLUGINS: Mapping[str, Mapping[str, str]] = {
    "liger": {
        "liger_cross_entropy": "Liger's cross-entropy works in place on the full logits",
        "liger_glu_activation": _KERNELS,
        "liger_layer_norm": _KERNELS,
        "liger_rms_norm": _KERNELS,
        "liger_rms_norm_gated": _KERNELS,
        "liger_rope": _KERNELS,
        "liger_swiglu": _KERNELS,
        "liger_use_token_scaling": _KERNELS,
    },
    "cut_cross_entropy": {},
    "spectrum": {"spectrum_top_fraction": _TRAINED, "spectrum_model_name": _TRAINED},
    "kernels": {
        "use_scattermoe": _KERNELS,
        "use_sonicmoe": _KERNELS,
        "expert_backend": _KERNELS,
        "moe_bnb_fast": _KERNELS,
        "moe_grouped_backend": _KERNELS,
    },
}
# Plugins that change nothing on the card while it trains, by a part of their name.
INERT_PLUGINS = ("lm_eval", "swanlab")
INERT_OF_PLUGINS = names("""
    grokfast_alpha grokfast_lamb liger_kernel_impl lm_eval_batch_size lm_eval_model lm_eval_post_train lm_eval_tasks
    moe_dequant_chunk_size swanlab_api_host swanlab_api_key swanlab_completion_log_interval swanlab_completion_max_buffer
    swanlab_description swanlab_experiment_name swanlab_lark_secret swanlab_lark_webhook_url swanlab_log_completions
    swanlab_log_model swanlab_mode swanlab_project swanlab_web_host swanlab_workspace use_swanlab
""")
