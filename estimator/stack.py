"""Facts that change with library versions, each with its source, in one table."""

import re
from dataclasses import dataclass

from estimator.errors import RequestError

Version = tuple[int, ...]


def parse_version(field: str, text: str) -> Version:
    """`5.23.0` as (5, 23, 0); suffixes such as `+cpu`, `rc1`, `.dev0` are dropped.

    Raises:
        RequestError: if the text does not begin with a number.
    """
    match = re.match(r"\d+(\.\d+)*", text)
    if match is None:
        raise RequestError(f"{field}: {text!r} is not a version; expected for instance '5.23.0'", field=field)
    return tuple(int(part) for part in match.group().split("."))


_WITHOUT_CACHE_IN_TRAINING = frozenset(("cohere2", "gemma2", "gemma3_text"))
"""Decoders of transformers 4 that make a cache in evaluation alone."""

_CACHE_SETTING_REACHES_DECODER = frozenset(
    ("idefics2", "idefics3", "lighton_ocr", "llava_next", "llava_next_video", "llava_onevision", "mistral3", "smolvlm", "video_llava")
)
"""Models whose `use_cache` their text decoder is told; other decoders inside a model go by their own."""

_CHECKPOINTED_WITHIN_SINCE_4_52 = frozenset(
    ("cohere", "cohere2", "deepseek_v3", "gemma", "granite", "llama", "mistral", "olmo", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2")
)
"""Source: transformers 4.52.4, models/*/modeling_*.py: decoder layers that are GradientCheckpointingLayers; falcon, gemma2, gemma3, gpt2,
gpt_bigcode, gpt_neox, mixtral, opt, phi, qwen2_moe, qwen3_moe and stablelm are not yet."""

_FIRST: dict[str, Version] = {
    "olmo2": (4, 47),
    "cohere2": (4, 48),
    "gemma3_text": (4, 50),
    **dict.fromkeys(("deepseek_v3", "qwen3", "qwen3_moe"), (4, 51)),
    "smollm3": (4, 53),
    **dict.fromkeys(("deepseek_v2", "glm4_moe"), (4, 54)),
    "gpt_oss": (4, 55),
    "olmo3": (4, 57),
}
"""First releases of families that came after 4.45. Source: folders of transformers/models in the wheels of 4.45 to 4.57."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The library versions to answer for; facts that follow from them are properties."""

    torch: Version = (2, 13, 0)
    transformers: Version = (5, 23, 0)
    peft: Version = (0, 21, 2)
    bitsandbytes: Version = (0, 50, 2)
    trl: Version = (1, 16, 0)

    @property
    def experts_are_modules(self) -> bool:
        """Whether MoE experts are lists of nn.Linear (quantized by bitsandbytes) and not fused parameters (left as they are).

        Source: transformers 5.0, modeling code of Mixtral, Qwen-MoE, DeepSeek, gpt-oss; integrations/bitsandbytes.py,
        replace_with_bnb_linear.
        """
        return self.transformers < (5,)

    @property
    def loads_checkpoint_dtype_by_default(self) -> bool:
        """Whether `from_pretrained` without `dtype` follows the checkpoint; before, everything became float32.

        Source: transformers 5.0, modeling_utils.py, PreTrainedModel.from_pretrained (`dtype="auto"`).
        """
        return self.transformers >= (5,)

    @property
    def loads_quantized_float16_by_default(self) -> bool:
        """Whether a bitsandbytes load without `dtype` turns what stays unquantized into float16.

        Source: transformers 4.x, quantizers/quantizer_bnb_4bit.py and quantizer_bnb_8bit.py, update_torch_dtype; gone in 5.0.
        """
        return self.transformers < (5,)

    @property
    def fused_adamw_by_default(self) -> bool:
        """Whether `optim` defaults to `adamw_torch_fused` and not to `adamw_torch`.

        Source: transformers pull request 37358 (4.54), training_args.py, TrainingArguments.default_optim; needs torch 2.8.
        """
        return self.transformers >= (4, 54) and self.torch >= (2, 8)

    @property
    def trainer_takes_fsdp2(self) -> bool:
        """Whether `fsdp` without a version means FSDP2, with layers as units in any case; before, FSDP1 and `auto_wrap`.

        Source: transformers, training_args.py, TrainingArguments._process_fsdp_args: version 1 up to 5.9, 2 from 5.10.
        """
        return self.transformers >= (5, 10)

    @property
    def trainer_sets_sharding_strategy(self) -> bool:
        """Whether `fsdp="shard_grad_op"` reaches FSDP1: by the environment in 4.x, by `sharding_strategy` up to 5.3, later by an argument
        that accelerate passes over.

        Source: transformers 4.57, training_args.py, TrainingArguments.__post_init__ (FSDP_SHARDING_STRATEGY); 5.0 to 5.3,
        trainer.py (fsdp_plugin_args); accelerate 1.15, utils/dataclasses.py, FullyShardedDataParallelPlugin.__post_init__.
        """
        return self.transformers < (5, 4)

    @property
    def trainer_reads_fsdp_version(self) -> bool:
        """Whether `fsdp_config.version` of TrainingArguments has an effect; before, accelerate's default of 1 held.

        Source: transformers 4.57, training_args.py and trainer.py (neither reads it); 5.0, training_args.py.
        """
        return self.transformers >= (5,)

    @property
    def trainer_keeps_gathered_by_default(self) -> bool:
        """Whether FSDP2 without `reshard_after_forward` keeps parameters gathered after the forward pass.

        Source: transformers 5.0 to 5.3, training_args.py (`fsdp_config.get("reshard_after_forward", "false")`).
        """
        return (5,) <= self.transformers < (5, 4)

    @property
    def trainer_can_sync_each_batch(self) -> bool:
        """Whether `sync_each_batch` of `gradient_accumulation_kwargs` is looked at.

        Source: transformers 5.2, trainer.py (5.1: accelerator.no_sync in any case).
        """
        return self.transformers >= (5, 2)

    @property
    def trainer_checkpoints_reentrantly(self) -> bool:
        """Whether `gradient_checkpointing=True` without kwargs means `use_reentrant=True`.

        Source: transformers, modeling_utils.py, gradient_checkpointing_enable: True in 4.x, False from 5.0.
        """
        return self.transformers < (5,)

    def checkpoints_layers_from_outside(self, model_type: str) -> bool:
        """Whether a checkpoint lies around the call of a decoder layer, and around whatever wraps it, and not within that call.

        Source: transformers 4.51, models/llama/modeling_llama.py, LlamaModel.forward (`decoder_layer.__call__`); modeling_layers.py,
        GradientCheckpointingLayer.__call__, of the named families' layers since 4.52 and of all since 4.53.
        """
        return self.transformers < ((4, 52) if model_type in _CHECKPOINTED_WITHIN_SINCE_4_52 else (4, 53))

    @property
    def sft_checkpoints_without_reentry(self) -> bool:
        """Whether SFTTrainer sets `use_reentrant=False` itself where transformers 4 would not.

        Source: trl 0.27, trainer/sft_trainer.py, SFTTrainer.__init__ (setdefault of use_reentrant below transformers 5).
        """
        return self.trl >= (0, 27)

    @property
    def sft_trains_in_bfloat16_by_default(self) -> bool:
        """Whether SFTConfig turns `bf16` on unless `fp16` is.

        Source: trl pull request 3515 (0.20), trainer/sft_config.py, SFTConfig.__post_init__.
        """
        return self.trl >= (0, 20)

    @property
    def sft_packs_without_padding(self) -> bool:
        """Whether SFTTrainer lays packed samples end to end (`padding_free`) unless the strategy is `wrapped`.

        Source: trl 0.19, trainer/sft_trainer.py, SFTTrainer.__init__ (strategy `ffd`; `bfd` since 0.20).
        """
        return self.trl >= (0, 19)

    @property
    def sft_refuses_untruncated(self) -> bool:
        """Whether SFTTrainer refuses `padding_free` without packing while `max_length` is set.

        Source: trl 1.0 (absent from 0.29), trainer/sft_trainer.py, SFTTrainer.__init__.
        """
        return self.trl >= (1,)

    @property
    def sft_balances_experts(self) -> bool:
        """Whether SFTTrainer adds the load-balancing loss to every mixture of experts.

        Source: trl 1.7, trainer/sft_trainer.py, SFTTrainer.__init__; before, the config's `output_router_logits` decided.
        """
        return self.trl >= (1, 7)

    @property
    def sft_balances_with_own_coefficient(self) -> bool:
        """Whether the loss's weight is the config's `router_aux_loss_coef` and not 0.001 unless one is given.

        Source: trl 1.14 (absent from 1.13), trainer/sft_config.py, SFTConfig.router_aux_loss_coef.
        """
        return self.trl >= (1, 14)

    @property
    def masks_packed_samples(self) -> bool:
        """Whether samples in one row are told apart by a mask of all their tokens, for kernels that do not take their lengths.

        Source: transformers 4.53, masking_utils.py, find_packed_sequence_indices.
        """
        return self.transformers >= (4, 53)

    @property
    def sft_checkpoints_by_default(self) -> bool:
        """Whether SFTConfig turns `gradient_checkpointing` on.

        Source: trl 0.22, trainer/sft_config.py, SFTConfig.gradient_checkpointing.
        """
        return self.trl >= (0, 22)

    @property
    def sft_prepares_for_kbit_training(self) -> bool:
        """Whether SFTTrainer itself calls `prepare_model_for_kbit_training` on a quantized model that gets an adapter.

        Source: trl 0.13–0.25, trainer/sft_trainer.py; removed by pull request 4577 (0.26). Release 0.25 has a variant of its own
        (pull request 4335) that upcasts less: for it this is an upper bound.
        """
        return self.trl < (0, 26)

    @property
    def sft_loads_ids_in_float32(self) -> bool:
        """Whether SFTTrainer given a model id, and no `dtype` in `model_init_kwargs`, loads float32.

        Source: trl 0.27, trainer/utils.py, create_model_from_path.
        """
        return self.trl >= (0, 27)

    @property
    def sft_knows_chunked_loss(self) -> bool:
        """Whether `loss_type="chunked_nll"` exists.

        Source: trl 1.4, trainer/sft_config.py, SFTConfig.loss_type.
        """
        return self.trl >= (1, 4)

    @property
    def sft_chunks_loss_by_default(self) -> bool:
        """Whether `loss_type` defaults to `chunked_nll`.

        Source: trl 1.7, trainer/sft_config.py, SFTConfig.loss_type.
        """
        return self.trl >= (1, 7)

    @property
    def sft_tiles_loss(self) -> bool:
        """Whether the loss is computed tile by tile inside the head, and Liger's fused cross-entropy is refused.

        Source: trl 1.16, trainer/sft_trainer.py, SFTTrainer.__init__, and trainer/utils.py, add_fused_lm_head.
        """
        return self.trl >= (1, 16)

    @property
    def quantizes_linear_subclasses(self) -> bool:
        """Whether bitsandbytes replaces modules of classes derived from nn.Linear too (FalconLinear, some routers).

        Source: transformers, integrations/bitsandbytes.py: `isinstance(module, nn.Linear)` in 4.x, `type(module) is nn.Linear` in 5.
        """
        return self.transformers < (5,)

    @property
    def skips_by_prefix_or_suffix(self) -> bool:
        """Whether a skipped module name is a regular expression from the start, or a suffix; before, a part of the dotted name.

        Source: transformers 5.0, quantizers/quantizers_utils.py, should_convert_module; 4.x, integrations/bitsandbytes.py,
        _replace_with_bnb_linear.
        """
        return self.transformers >= (5,)

    @property
    def quantized_loads_always_keep_float32(self) -> bool:
        """Whether a bitsandbytes load honours `_keep_in_fp32_modules` under bfloat16 too, and not under float16 alone.

        Source: transformers 4.x, modeling_utils.py, from_pretrained (`hf_quantizer.use_keep_in_fp32_modules`); gone in 5.0.
        """
        return self.transformers < (5,)

    @property
    def rewrites_expert_targets(self) -> bool:
        """Whether PEFT turns the names of single experts' projections into `target_parameters` on fused experts.

        Source: peft 0.19, utils/transformers_weight_conversion.py, convert_peft_config_for_transformers; runs from transformers 5.0 on.
        """
        return self.transformers >= (5,) and self.peft >= (0, 19)

    @property
    def sft_casts_4bit_models_by_name(self) -> bool:
        """Whether SFTTrainer, under bf16, casts a 4-bit model by names: float32 embeddings and head to bfloat16, norms to float32.

        Adapters keep the type PEFT gave them.

        Source: trl 0.9.6, 0.13, 0.18, 0.24 and 0.25, trainer/utils.py or models/utils.py, peft_module_casting_to_bf16.
        """
        return self.trl < (0, 26)

    @property
    def linear_4bit_keeps_input(self) -> bool:
        """Whether a 4-bit linear layer keeps its input, in the compute type, until the graph is freed.

        Source: bitsandbytes pull request 1270 (0.43.2), autograd/_functions.py, MatMul4Bit.forward.
        """
        return self.bitsandbytes < (0, 43, 2)

    @property
    def linear_4bit_casts_bias_to_input(self) -> bool:
        """Whether the first forward pass of a 4-bit linear layer gives its bias, for good, the type of the layer's input; later the compute
        type.

        Source: bitsandbytes 0.50.0, nn/modules.py, Linear4bit.forward.
        """
        return self.bitsandbytes < (0, 50)

    @property
    def rows_of_fused_4bit(self) -> int:
        """Up to how many rows every card multiplies by 4-bit weights as they are. Some cards do for more, by the weight's size: there the
        weight is counted as unpacked, which is more.

        Source: bitsandbytes 0.50.0, backends/cuda/ops.py, gemm_4bit (_GEMM_4BIT_CUSTOM_FLOOR_M); before, autograd/_functions.py,
        matmul_4bit (gemv_4bit for one row).
        """
        return 4 if self.bitsandbytes >= (0, 50) else 1

    @property
    def fused_4bit_unpacks_scales(self) -> bool:
        """Whether that kernel wants nested scales in float32.

        Source: bitsandbytes 0.49.2, functional.py, gemv_4bit (dequantize_blockwise of absmax); 0.50.0, backends/cuda/ops.py,
        _gemm_4bit_kernel_impl, takes them as they are.
        """
        return self.bitsandbytes < (0, 50)

    @property
    def prefers_cudnn_attention(self) -> bool:
        """Whether sdpa tries cuDNN's kernels first on compute capability 9 and 10.

        Source: torch 2.10, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_prefer_cudnn_attention (with cuDNN after 9.15, and
        unless TORCH_CUDNN_SDPA_DEPRIORITIZED is set).
        """
        return self.torch >= (2, 10)

    @property
    def shares_nested_code(self) -> bool:
        """Whether all 4-bit weights of a model have one table of nested codes, and not a copy each.

        Source: bitsandbytes 0.46.0, functional.py, quantize_blockwise (`code.to(A.device, copy=True)`).
        """
        return self.bitsandbytes < (0, 46)

    @property
    def loads_without_warmup(self) -> bool:
        """Whether a model is loaded into segments that the allocator asks for as tensors come, and not into one block made beforehand.

        Source: transformers 4.50.0, modeling_utils.py, caching_allocator_warmup.
        """
        return self.transformers < (4, 50)

    @property
    def sft_casts_trainable_to_bfloat16(self) -> bool:
        """Whether SFTTrainer casts every trainable parameter of a 4- or 8-bit model to bfloat16.

        Source: trl 0.26, trainer/sft_trainer.py, SFTTrainer.__init__.
        """
        return self.trl >= (0, 26)

    @property
    def sft_leaves_dora_magnitudes(self) -> bool:
        """Whether that cast leaves out DoRA magnitudes.

        Source: trl 1.15 (absent from 1.14), trainer/sft_trainer.py, SFTTrainer.__init__.
        """
        return self.trl >= (1, 15)

    @property
    def loss_keeps_half_logits(self) -> bool:
        """Whether the 16-bit logits stay alive beside their float32 copy while the loss is computed.

        Source: transformers 4.46, loss/loss_utils.py, ForCausalLMLoss takes them from the model; before, the model replaced them by the
        copy.
        """
        return self.transformers >= (4, 46)

    @property
    def loss_shifts_logits(self) -> bool:
        """Whether the loss makes a contiguous copy of the logits without the last position; later the labels are shifted instead.

        Source: transformers, loss/loss_utils.py, ForCausalLMLoss (4.48: `logits[..., :-1, :].contiguous()`).
        """
        return self.transformers < (4, 49)

    @property
    def caches_expanded_latents(self) -> bool:
        """Whether latent-attention models cache the keys and values of all heads and not the latent.

        Source: transformers, models/deepseek_v3/modeling_deepseek_v3.py: expanded in 4.x, latent in 5.x.
        """
        return self.transformers < (5,)

    @property
    def caches_have_windows(self) -> bool:
        """Whether the caches that `generate` makes keep no more than its window of a sliding layer.

        Source: transformers 4.56, cache_utils.py, DynamicCache(config=…) and StaticCache; before, hybrid caches were classes of their own.
        """
        return self.transformers >= (4, 56)

    @property
    def static_cache_spares_last_token(self) -> bool:
        """Whether a static cache is one token shorter than what is generated: the last token is never looked at.

        Source: transformers 4.49, generation/utils.py, generate (`max_cache_length = generation_config.max_length - 1`).
        """
        return self.transformers >= (4, 49)

    @property
    def sdpa_packs_queries(self) -> bool:
        """Whether a single masked query per sequence is looked at as several of one head, instead of copying keys and values for all heads.

        Source: transformers 5.23, integrations/sdpa_attention.py, pack_gqa.
        """
        return self.transformers >= (5, 23)

    @property
    def compiles_static_decoding(self) -> bool:
        """Whether `generate` runs torch.compile on its own when the cache is static, on CUDA, unless the model is quantized.

        Source: transformers 4.47, generation/utils.py, _sample; later _valid_auto_compile_criteria.
        """
        return self.transformers >= (4, 47)

    @property
    def decodes_experts_one_by_one(self) -> bool:
        """Whether `generate`, on CUDA, copies the weights of every chosen expert for every token while it decodes (`batched_mm`).

        Source: transformers 5.0, generation/utils.py, _optimize_model_for_decode.
        """
        return self.transformers >= (5,)

    def flash_repeats_key_values(self, model_type: str) -> bool:
        """Whether a family copied keys and values for all query heads before flash attention, which does not need it.

        Source: transformers 4.47, models/{mistral,mixtral,qwen2,phi3,starcoder2}/modeling_*.py, *FlashAttention2.forward; shared code
        since 4.48.
        """
        return self.transformers < (4, 48) and model_type in ("mistral", "mixtral", "qwen2", "qwen2_moe", "phi3", "starcoder2")

    @property
    def sdpa_groups_queries(self) -> bool:
        """Whether sdpa gets fewer key/value heads than query heads (`enable_gqa`) when there is no mask, instead of copies for all heads.

        Source: transformers 4.54, integrations/sdpa_attention.py, use_gqa_in_sdpa; needs torch 2.5.
        """
        return self.transformers >= (4, 54) and self.torch >= (2, 5)

    def reads_all_logits(self, model_type: str) -> bool:
        """Whether the family makes the logits of the whole prompt where the last token's would do.

        Source: transformers, models/*/modeling_*.py, forward of the head: `num_logits_to_keep` from 4.45 on, later `logits_to_keep`.
        """
        since = {"falcon": (4, 47), "granite": (4, 48), "gpt_neox": (4, 50), "gpt2": (4, 53), "gpt_bigcode": (5,)}
        return self.transformers < since.get(model_type, (4, 45))

    def upcasts_all_logits(self, model_type: str) -> bool:
        """Whether the family returns its logits in float32, also where there is no loss.

        Source: transformers 4.35–4.45, models/llama/modeling_llama.py, LlamaForCausalLM.forward (`logits = logits.float()`), and its like.
        """
        return self.transformers < (4, 46) and model_type not in ("falcon", "gpt2", "gpt_bigcode", "gpt_neox", "stablelm")

    def keeps_earlier_cache(self, model_type: str) -> bool:
        """Whether all keys and values of the tokens before stay until those with the new token are all there.

        Source: transformers, generation/utils.py: until 4.41 caches were tuples, which the caller holds (4.42 on its change: it "keeps
        copying the cache thus using much more memory"); models/gpt2/modeling_gpt2.py until 4.52, models/gpt_bigcode/modeling_gpt_bigcode.py
        until 4.53.
        """
        return self.transformers < {"gpt2": (4, 53), "gpt_bigcode": (4, 54)}.get(model_type, (4, 42))

    def loss_leaves_half_logits(self, model_type: str) -> bool:
        """Whether the family computed its loss on the logits as they come, without a float32 copy.

        Source: transformers, models/*/modeling_*.py, forward of the head: `CrossEntropyLoss()` until 4.48.2 (GPT-NeoX until 4.48.3), then
        loss/loss_utils.py, ForCausalLMLoss, as for all others.
        """
        if model_type == "gpt_neox":
            return self.transformers < (4, 49)
        return self.transformers < (4, 48, 3) and model_type in ("gpt2", "gpt_bigcode", "falcon", "opt", "bloom", "stablelm", "mpt")

    def hands_out_key_values_in_training(self, model_type: str) -> bool:
        """Whether the model returns every layer's keys and values with its logits, also in training and under checkpointing.

        Source: transformers until 4.53, models/gpt_bigcode/modeling_gpt_bigcode.py, GPTBigCodeModel.forward (`presents`).
        """
        return self.transformers < (4, 54) and model_type == "gpt_bigcode"

    @property
    def sft_trains_without_cache(self) -> bool:
        """Whether SFTTrainer asks for no keys and values, whatever the model's configs say.

        Source: trl 0.22 (absent from 0.20), trainer/sft_trainer.py, SFTTrainer.compute_loss (`use_cache`).
        """
        return self.trl >= (0, 22)

    def lacks_until(self, model_type: str) -> Version | None:
        """The release that brought a family, where this one does not have it yet."""
        first = _FIRST.get(model_type)
        return first if first is not None and self.transformers < first else None

    def layers_make_rotations(self, model_type: str) -> bool:
        """Whether every layer makes its own cos and sin, and not the model for all of them.

        Source: transformers, models/*/modeling_*.py, forward of the model (`position_embeddings = self.rotary_emb(…)`): read in 4.41 to
        4.48. Run in 4.45, 4.47 and 4.48: Llama, Mistral, Qwen2, Gemma 1 and 2, Phi-3, OLMo 1 and 2, Granite, Cohere; of others read alone.
        """
        since = {"llama": (4, 43), **dict.fromkeys(("gemma", "gemma2", "mistral", "mixtral", "olmo", "olmo2", "phi3"), (4, 48))}
        return self.transformers < since.get(model_type, (4, 45))

    @property
    def phi3_joins_rotated(self) -> bool:
        """Whether Phi-3 joins the part of each head that is rotated to the rest, also where there is none.

        Source: transformers 4.49, models/phi3/modeling_phi3.py, apply_rotary_pos_emb (4.48: heads are rotated whole).
        """
        return self.transformers >= (4, 49)

    @property
    def olmo_rotates_in_float32(self) -> bool:
        """Whether OLMo, 1 and 2, leaves cos and sin in float32.

        Source: transformers 4.52, models/{olmo,olmo2}/modeling_*.py, *RotaryEmbedding.forward (4.51: in the type of the hidden states).
        """
        return self.transformers >= (4, 52)

    @property
    def olmo2_norm_weighs_in_float32(self) -> bool:
        """Whether OLMo 2's norm multiplies by its weight before it goes back to the input's type.

        Source: transformers 4.52, models/olmo2/modeling_olmo2.py, Olmo2RMSNorm.forward (4.51: after).
        """
        return self.transformers >= (4, 52)

    @property
    def first_keys_are_joined(self) -> bool:
        """Whether a cache that holds nothing joins its first keys and values to nothing, which copies them, and does not refer to them.

        Source: transformers 4.56, cache_utils.py, DynamicLayer.update (4.55: the layer takes them as they are; 4.53: DynamicCache.update
        appends them).
        """
        return self.transformers >= (4, 56)

    def sdpa_copies_inputs(self, model_type: str, *, masked: bool) -> bool:
        """Whether sdpa gets queries, keys and values copied head after head.

        Source: transformers 4.48 to 4.55, integrations/sdpa_attention.py, sdpa_attention_forward, read and run in 4.51; 4.36 to 4.47 with a
        mask alone, read: models/llama/modeling_llama.py, LlamaSdpaAttention.forward; not for a torch of 2.2 or more in
        models/gpt2/modeling_gpt2.py and gpt_neox/modeling_gpt_neox.py (4.45).
        """
        if self.transformers >= (4, 48):
            return self.transformers < (4, 56)
        return masked and model_type not in ("gpt2", "gpt_neox")

    def keeps_cache_in_training(self, model_type: str, root_model_type: str, *, is_composite: bool, by_trl: bool) -> bool:
        """Whether a model without checkpointing stores keys and values while it is trained, and holds them until the loss is there.

        Before 5.0 the Trainer left the cache on, as configs have it, and a few decoders made none in training. Since then it switches it
        off in the config of the whole model. The text decoder inside reads its own, unless a model around it reads that of the whole and
        hands on what it says; TRL says it by argument, which goes before all configs.

        Args:
            model_type: of the decoder.
            root_model_type: of the whole model.

        Source: transformers, trainer.py, Trainer.__init__ (since 5.0), Trainer._inner_training_loop (4.51: off with checkpointing alone);
        utils/generic.py, merge_with_config_defaults (check_model_inputs in 5.0), where it decorates the forward of a model around the
        decoder: read in 5.0 and 5.23, run in 5.23; 4.51 and 4.57, read and run; models/gemma2/modeling_gemma2.py, Gemma2Model.forward
        (4.57: `not self.training`).
        """
        if by_trl and self.sft_trains_without_cache:
            return False
        if self.transformers < (5,):
            return model_type not in _WITHOUT_CACHE_IN_TRAINING
        if not is_composite:
            return False
        if self.transformers < (5, 1) and root_model_type in ("fast_vlm", "got_ocr2", "internvl", "llava", "vipllava"):
            return False
        return root_model_type not in _CACHE_SETTING_REACHES_DECODER
