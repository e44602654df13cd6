"""Fields of LLaMA-Factory's training files, beside those of TrainingArguments: which are without a bearing on memory, and which have one
that no formula covers.

Source: LLaMA-Factory 0.9.5, hparams/model_args.py, data_args.py, finetuning_args.py, training_args.py, generating_args.py.
"""

from collections.abc import Mapping

from app.fields import TRAINING_ARGUMENTS, names

# Fields that only its files have.
ONLY = names("""
    additional_target cutoff_len disable_gradient_checkpointing double_quantization enable_liger_kernel finetuning_type flash_attn
    freeze_trainable_layers lora_rank lora_target neat_packing pref_beta pref_loss pure_bf16 quantization_bit quantization_method stage
    template upcast_layernorm use_reentrant_gc
""")

# Source: transformers, training_args_seq2seq.py, Seq2SeqTrainingArguments.
_SEQ2SEQ = names("generation_config generation_max_length generation_num_beams predict_with_generate sortish_sampler")

# Fields that are translated from TrainingArguments as they stand.
TRAINING = TRAINING_ARGUMENTS

INERT = _SEQ2SEQ | names("""
    adapter_folder add_special_tokens add_tokens apollo_layerwise apollo_proj apollo_proj_type apollo_rank apollo_scale
    apollo_scale_front apollo_scale_type apollo_target apollo_update_interval asft_alpha audio_sampling_rate badam_mask_mode badam_mode
    badam_start_block badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose buffer_size cache_dir compute_accuracy
    crop_to_patches data_shared_file_system dataset dataset_dir default_system disable_shuffling do_sample dpo_label_smoothing
    early_stopping_steps eaft_alpha enable_thinking enable_torch_profiler eval_dataset eval_num_beams eval_on_each_dataset export_device
    export_dir export_hub_model_id export_legacy_format export_quantization_bit export_quantization_dataset export_quantization_maxlen
    export_quantization_nsamples export_size fp8_backend fp8_enable_fsdp_float8_all_gather freeze_extra_modules freeze_language_model
    freeze_multi_modal_projector freeze_trainable_layers freeze_trainable_modules freeze_vision_tower galore_layerwise galore_proj_type
    galore_rank galore_scale galore_target galore_update_interval hf_hub_token hyper_parallel_args ignore_pad_token_for_loss
    image_do_pan_and_scan image_max_pixels image_min_pixels include_effective_tokens_per_second infer_backend infer_dtype
    init_special_tokens interleave_probs kt_expert_checkpoint_path kt_lora_expert_intermediate_size kt_lora_expert_num
    kt_use_lora_experts kt_weight_path kto_chosen_weight kto_rejected_weight ld_alpha length_penalty lora_alpha loraplus_lr_embedding
    loraplus_lr_ratio low_cpu_mem_usage mask_history master_addr master_port max_length max_new_tokens max_samples media_dir
    mix_strategy module_dropout ms_hub_token new_special_tokens_config num_beams offload_folder oft_block_size oft_rank oft_target
    om_hub_token overwrite_cache pissa_convert pissa_iter plot_loss ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
    ppo_whiten_rewards pref_bco_weight pref_beta pref_ftx pref_loss preprocessing_batch_size preprocessing_num_workers
    preserve_thinking print_param_status profile_modules profiler_active_steps profiler_output_dir profiler_profile_memory
    profiler_record_shapes profiler_repeat profiler_wait_steps profiler_warmup_steps profiler_with_stack quantization_device_map
    ray_init_kwargs ray_num_workers ref_model ref_model_adapters ref_model_quantization_bit repetition_penalty reward_model
    reward_model_adapters reward_model_quantization_bit reward_model_type sglang_config sglang_lora_backend sglang_maxlen
    sglang_mem_fraction sglang_tp_size simpo_gamma skip_special_tokens split_special_tokens streaming swanlab_api_key
    swanlab_lark_secret swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project swanlab_run_name swanlab_workspace
    temperature template tokenized_path tool_format top_k top_p train_on_prompt trust_remote_code use_audio_in_video use_fast_tokenizer
    use_kv_cache use_swanlab val_size video_fps video_maxlen video_max_pixels video_min_pixels vllm_config vllm_enforce_eager
    vllm_gpu_util vllm_max_lora_rank vllm_maxlen
""")

_OPTIMIZER = "it takes an optimizer of its own, whose states differ from those that are counted"

UNMODELLED: Mapping[str, str] = {
    "adapter_name_or_path": "the adapter there brings a rank and targets of its own; those of this file are counted",
    "create_new_adapter": "an adapter is merged before a new one is made",
    "fp8": "matrices are multiplied in FP8, from copies",
    "mixture_of_depths": "it replaces the layers",
    "moe_aux_loss_coef": "router logits of all layers are kept for the load-balancing loss",
    "pissa_init": "the weights are decomposed when the adapter is made",
    "resize_vocab": "the embeddings grow by the added tokens",
    "rope_scaling": "it changes the positions of the model",
    "shift_attn": "shifted sparse attention keeps other tensors",
    "train_from_scratch": "the weights are made in torch's default type and not in the checkpoint's",
    "upcast_layernorm": "norms are float32, so that what they put out is too",
    "upcast_lmhead_output": "the logits are turned into float32 once more",
    "use_adam_mini": _OPTIMIZER,
    "use_apollo": _OPTIMIZER,
    "use_asft_loss": "a reference model's logits are needed beside its own loss over the full logits",
    "use_badam": _OPTIMIZER,
    "use_dft_loss": "it takes its loss from the full logits by operators of its own",
    "use_eaft_loss": "it takes its loss from the full logits by operators of its own",
    "use_galore": _OPTIMIZER,
    "use_hyper_parallel": "it spreads the model over several processes",
    "use_kt": "experts are computed on the host",
    "use_llama_pro": "only expanded blocks are trained",
    "use_mca": "Megatron trains in place of the Trainer",
    "use_muon": _OPTIMIZER,
    "use_unsloth": "Unsloth's own kernels keep fewer tensors",
    "use_unsloth_gc": "inputs of checkpointed layers are moved to the host",
    "use_v1_kernels": "fused kernels keep other tensors",
}

# All of its fields, some of which TRL has too.
KNOWN = ONLY | INERT | UNMODELLED.keys() | TRAINING | names("lora_dropout packing quantization_type use_dora use_rslora")
