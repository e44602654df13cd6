"""A YAML of axolotl, as its loader and trainer read it.

Source: axolotl 0.19.0; files and functions are named where a fact is used.
"""

from collections.abc import Mapping

from app import fields
from app.trainer_files.axolotl_fields import (
    ADAPTER,
    ATTENTION_FLAGS,
    INERT,
    INERT_OF_PLUGINS,
    INERT_PLUGINS,
    LORA_KERNELS,
    PLUGINS,
    UNMODELLED,
)
from app.trainer_files.deepspeed import read_named
from app.trainer_files.fsdp import translate_fsdp
from app.trainer_files.translation import Keys
from app.unmodelled import evaluates
from estimator.errors import RequestError
from estimator.recipe import Attention

_TRAINER = "axolotl"
_EMBEDDINGS = frozenset(("embed_tokens", "lm_head", "embed_in", "embed_out", "word_embeddings", "embeddings", "wte"))
_FLASH_KERNELS = {
    "kernels-community/flash-attn2": Attention.FLASH_ATTENTION_2.value,
    "kernels-community/flash-attn3": Attention.FLASH_ATTENTION_3.value,
}
# Source: utils/schemas/enums.py, ATTN_IMPLS_SUPPORTING_PACKING and ATTN_IMPLS_WITHOUT_DTYPE_CAST.
_PACKS = frozenset((Attention.FLASH_ATTENTION_2, Attention.FLASH_ATTENTION_3, Attention.FLEX_ATTENTION))
# Source: core/builders/causal.py, HFCausalTrainerBuilder.build (pad_to_multiple_of).
_PAD_TO = 64
_DEFAULT_LENGTH = 512
_OTHER_RUNS = {
    "rl": "preference and reinforcement learning through axolotl",
    "reward_model": "reward models through axolotl",
    "process_reward_model": "process reward models",
    "gptq": "GPTQ",
    "model_quantization_config": "quantization other than bitsandbytes'",
}


def translate(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Put a training file into the request.

    Args:
        keys: of the file.
        others: further files by the names under which this one may point to them.

    Raises:
        RequestError: for a run that is not modelled, or a value that axolotl would refuse.
    """
    for key, what in _OTHER_RUNS.items():
        keys.refuse(key, what)
    plugins = " ".join(keys.names("plugins") or ()).lower()
    keys.put("model", keys.text("base_model"), "base_model")
    for key in ("revision_of_model", "model_revision"):
        keys.put("revision", keys.text(key), key)
    _check_class(keys)
    keys.found.put("trainer", "transformers", keys.named("base_model"))
    dtype = _dtypes(keys)
    attention = _attention(keys)
    adapter = keys.one_of("adapter", ("lora", "qlora"))
    _spread(keys, others)
    _quantization(keys, adapter, dtype)
    if adapter is not None:
        _adapter(keys, adapter)
    else:
        for key in keys.values:
            if key in ADAPTER or (key in UNMODELLED and key.startswith(("lora_", "peft_"))):
                keys.ignore(key)
    _batches(keys, attention)
    _optimizer(keys)
    _checkpointing(keys)
    _loss(keys, plugins)
    _evaluation(keys)
    if adapter is None:
        _full(keys, attention, dtype, cuts="cut_cross_entropy" in plugins)
    _ddp(keys)
    _plugins(keys, plugins)
    keys.rest(inert=INERT | INERT_OF_PLUGINS, unmodelled=_unmodelled(keys), trainer=_TRAINER, known=ADAPTER)


def _check_class(keys: Keys) -> None:
    for key in ("type_of_model", "model_type"):
        name = keys.text(key)
        if name is not None and not name.endswith("ForCausalLM"):
            raise keys.error(key, name, "AutoModelForCausalLM, or a class whose name ends so")


def _dtypes(keys: Keys) -> str:
    """The type of the weights, and autocast.

    `auto` means yes: torch counts emulation, so that every CUDA card has bfloat16.

    Source: utils/config/__init__.py, resolve_dtype; core/builders/base.py, _configure_precision_settings; transformers,
    utils/import_utils.py, is_torch_bf16_gpu_available; torch, cuda/__init__.py, is_bf16_supported.
    """
    bf16 = keys.take("bf16", "auto")
    if bf16 not in (True, False, "auto", "full"):
        raise keys.error("bf16", bf16, "true, false, auto or full")
    fp16, bfloat16, float16 = keys.flag("fp16"), keys.flag("bfloat16"), keys.flag("float16")
    if bf16 == "auto":
        bf16 = not fp16
    eight = keys.flag("load_in_8bit")
    dtype = "bfloat16" if bf16 or bfloat16 else "float16" if eight or fp16 or float16 else "float32"
    keys.put("dtype", dtype, "bf16")
    keys.put("training.bf16", bf16 != "full" and bool(bf16 or bfloat16), "bf16")
    keys.put("training.fp16", fp16 and not bf16, "fp16")
    return dtype


def _attention(keys: Keys) -> str | None:
    """Source: utils/schemas/config.py, normalize_attn_implementation."""
    flags = [key for key in ATTENTION_FLAGS if keys.flag(key)]
    asked = keys.text("attn_implementation")
    if asked is not None and flags:
        raise RequestError(
            f"{keys.named(flags[0])}: contradicts attn_implementation, as axolotl says too; accepted: one of them",
            field=keys.named(flags[0]),
        )
    key = "attn_implementation" if asked is not None or not flags else flags[0]
    name = asked or (ATTENTION_FLAGS[flags[0]] if flags else None)
    if name is None:
        return None
    name = _FLASH_KERNELS.get(name.split(":")[0].split("@")[0].strip(), name)
    if name not in set(Attention):
        raise keys.error(key, name, f"one that is modelled: {', '.join(Attention)}")
    keys.put("attn_implementation", name, key)
    return name


def _quantization(keys: Keys, adapter: str | None, dtype: str) -> None:
    """Source: loaders/model.py, ModelLoader._set_quantization_config and _prepare_model_for_quantization; utils/schemas/peft.py."""
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    given = keys.section("bnb_config_kwargs")
    if (four or eight) and adapter is None:
        key = "load_in_4bit" if four else "load_in_8bit"
        raise RequestError(f"{keys.named(key)}: true needs an adapter; accepted: false, or adapter: lora or qlora", field=keys.named(key))
    if adapter == "qlora" and (eight or not four):
        raise RequestError(
            f"{keys.named('adapter')}: qlora needs load_in_4bit: true and no load_in_8bit, as axolotl says too", field=keys.named("adapter")
        )
    if adapter == "lora" and four:
        raise RequestError(
            f"{keys.named('load_in_4bit')}: axolotl quantizes to 4 bits for adapter: qlora alone; accepted: false, or adapter: qlora",
            field=keys.named("load_in_4bit"),
        )
    if not four and not eight:
        return
    settings: dict[str, object] = {"load_in_8bit": True}
    if four:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
            # float32 for jamba, qwen2_moe and nemotron_h: the same bytes
            "bnb_4bit_quant_storage": "bfloat16",
            **given.values,
        }
    for name, value in settings.items():
        keys.put(f"quantization.{name}", value, "load_in_4bit" if four else "load_in_8bit")
    # It is called, and embeddings, head and norms are turned back into the load type afterwards.
    # Source: loaders/model.py, ModelLoader._configure_embedding_dtypes and _convert_embedding_modules_dtype.
    keys.put("prepare_model_for_kbit_training", False, "adapter")
    if not _is_sharded(keys):
        keys.found.assumed.append(
            f"{keys.named('adapter')}: prepared for k-bit training, after which embeddings, head and norms are turned back into {dtype}. "
            f"What else stays unquantized (biases, fused experts) is float32 then and is counted as {dtype}."
        )


def _is_sharded(keys: Keys) -> bool:
    return keys.found.value("hardware.strategy") in ("fsdp", "zero3")


def _adapter(keys: Keys, adapter: str) -> None:
    """Source: loaders/adapter.py, _build_peft_lora_config and find_all_linear_names."""
    rank = keys.integer("lora_r")
    if rank is None:
        raise RequestError(f"{keys.named('lora_r')}: is required with an adapter", field=keys.named("lora_r"))
    keys.put("peft.r", rank, "lora_r")
    keys.put("peft.lora_dropout", float(keys.number("lora_dropout", 0.0) or 0.0), "lora_dropout")
    modules = keys.take("lora_target_modules")
    if not isinstance(modules, str):  # a pattern
        modules = keys.names("lora_target_modules")
    parameters = keys.names("lora_target_parameters")
    if keys.flag("lora_target_linear"):
        outside = sorted(_EMBEDDINGS.intersection([modules] if isinstance(modules, str) else modules or ()))
        if outside:
            raise RequestError(
                f"{keys.named('lora_target_modules')}: {outside[0]!r} beside lora_target_linear is not modelled; accepted: names of linear "
                "layers, or lora_target_linear: false",
                field=keys.named("lora_target_modules"),
            )
        keys.put("peft.target_modules", "all-linear", "lora_target_linear")
    elif modules:
        keys.put("peft.target_modules", modules, "lora_target_modules")
    elif not parameters:
        raise RequestError(
            f"{keys.named('lora_target_modules')}: is required, or lora_target_linear: true", field=keys.named("lora_target_modules")
        )
    keys.put("peft.target_parameters", parameters, "lora_target_parameters")
    for key, name in (
        ("lora_modules_to_save", "modules_to_save"),
        ("lora_rank_pattern", "rank_pattern"),
        ("peft_layers_to_transform", "layers_to_transform"),
        ("peft_layers_pattern", "layers_pattern"),
        ("peft_use_dora", "use_dora"),
        ("peft_use_rslora", "use_rslora"),
        ("peft_trainable_token_indices", "trainable_token_indices"),
    ):
        keys.put(f"peft.{name}", keys.take(key), key)
    if keys.take("lora_model_dir"):
        keys.not_modelled("lora_model_dir", "the adapter there brings a rank and targets of its own; those of this file are counted")
    if not keys.flag("peft_autocast_adapter_dtype", default=True):
        keys.not_modelled("peft_autocast_adapter_dtype", "adapters keep the type of the weights; they are counted in float32")
    if keys.section("peft").take("loftq_config"):
        keys.not_modelled("peft", "LoftQ decomposes the weights when the adapter is made")
    _kernels(keys, adapter)


def _kernels(keys: Keys, adapter: str) -> None:
    """Source: utils/schemas/config.py, check_auto_enable_lora_kernels."""
    given = [key for key in LORA_KERNELS if key in keys]
    by_default = not given and not (adapter == "lora" and keys.flag("load_in_8bit")) and not keys.flag("trust_remote_code")
    on = LORA_KERNELS if by_default else [key for key in given if keys.flag(key)]
    for key in LORA_KERNELS:
        keys.taken.add(key)
    if on:
        how = "axolotl turns them on unless they are set to false; " if by_default else ""
        keys.not_modelled(", ".join(on), f"{how}fused functions of adapter and layer keep fewer tensors than PEFT's")


def _batches(keys: Keys, attention: str | None) -> None:
    """Source: core/builders/causal.py, HFCausalTrainerBuilder.build; core/trainers/base.py, _create_multipack_sampler."""
    batch = keys.integer("micro_batch_size", 1)
    keys.put("training.per_device_train_batch_size", batch, "micro_batch_size")
    keys.put("training.gradient_accumulation_steps", keys.integer("gradient_accumulation_steps", 1), "gradient_accumulation_steps")
    if keys.take("batch_size") and "gradient_accumulation_steps" not in keys:
        keys.found.assumed.append(
            f"{keys.named('batch_size')}: passed over by axolotl 0.19, whose gradient_accumulation_steps is 1 unless it is given."
        )
    keys.ignore("batch_size")
    length = keys.integer("sequence_len", _DEFAULT_LENGTH)
    keys.put("training.max_length", length, "sequence_len")
    packs, multiple = keys.flag("sample_packing"), keys.integer("pad_to_multiple_of") or _PAD_TO
    pads = keys.take("pad_to_sequence_len", True if packs else None)
    if pads not in (True, False, None):
        raise keys.error("pad_to_sequence_len", pads, "true, false or null")
    if pads is not False:
        keys.put("training.pad_to_multiple_of", multiple, "pad_to_multiple_of")
    in_rows = "multipack_real_batches" in keys and keys.flag("multipack_real_batches")
    keys.taken.add("multipack_real_batches")
    if packs and attention in _PACKS and not in_rows:
        keys.put("training.padding_free", True, "sample_packing")
        return
    # A sample a little shorter than the longest is filled up like any other.
    keys.put("padded", packs or pads is not False or (batch or 1) > 1, "sample_packing" if packs else "pad_to_sequence_len")
    if packs and attention == Attention.SDPA and "sdpa_varlen" not in keys:
        keys.not_modelled("sdpa_varlen", UNMODELLED["sdpa_varlen"] + "; axolotl turns it on where torch has it")


def _optimizer(keys: Keys) -> None:
    """Source: utils/schemas/training.py, HyperparametersConfig; core/builders/base.py, _configure_optimizer."""
    keys.put("training.optim", keys.one_of("optimizer", sorted(fields.OPTIMIZERS), "adamw_torch_fused"), "optimizer")
    keys.put("training.optim_args", keys.take("optim_args"), "optim_args")
    keys.put("training.weight_decay", keys.number("weight_decay"), "weight_decay")


def _checkpointing(keys: Keys) -> None:
    """Source: utils/config/__init__.py, normalize_config; utils/schemas/validation.py, check_gradient_checkpointing_w_offload;
    core/builders/base.py, _configure_gradient_checkpointing.
    """
    asked = keys.take("gradient_checkpointing", False)
    if asked not in (True, False, "offload", "offload_disk"):
        raise keys.error("gradient_checkpointing", asked, "true, false, offload or offload_disk")
    if not asked and keys.found.value("training.gradient_checkpointing"):
        return  # FSDP checkpoints by itself
    keys.put("training.gradient_checkpointing", bool(asked), "gradient_checkpointing")
    kwargs = dict(keys.section("gradient_checkpointing_kwargs").values)
    if asked and "gradient_checkpointing_kwargs" not in keys:
        kwargs = {"use_reentrant": "unfrozen_parameters" not in keys}
    for name, value in kwargs.items():
        if asked:
            keys.put(f"training.gradient_checkpointing_kwargs.{name}", value, "gradient_checkpointing_kwargs")
    offloads = keys.take("activation_offloading", False) or asked in ("offload", "offload_disk")
    if offloads:
        key = "activation_offloading" if "activation_offloading" in keys else "gradient_checkpointing"
        keys.not_modelled(key, "activations wait on the host; they are counted as checkpoints on the card")


def _loss(keys: Keys, plugins: str) -> None:
    """Source: integrations/liger/args.py and integrations/cut_cross_entropy/args.py."""
    fused = keys.flag("liger_fused_linear_cross_entropy")
    if "liger" in plugins and fused:
        keys.put("training.use_liger_kernel", True, "liger_fused_linear_cross_entropy")
    elif fused:
        _without_plugin(keys, "liger_fused_linear_cross_entropy")
    else:
        keys.ignore("liger_fused_linear_cross_entropy")
    cuts = keys.flag("cut_cross_entropy", default="cut_cross_entropy" in plugins)
    if cuts and "cut_cross_entropy" in plugins:
        keys.not_modelled("cut_cross_entropy", "the loss is taken without logits; they are counted in full, as an upper bound")
    elif cuts:
        _without_plugin(keys, "cut_cross_entropy")
    else:
        keys.ignore("cut_cross_entropy")


def _without_plugin(keys: Keys, key: str) -> None:
    keys.ignore(key)
    keys.found.assumed.append(f"{keys.named(key)}: without effect, since `plugins` does not list its plugin.")


def _evaluation(keys: Keys) -> None:
    """Source: core/builders/base.py, _configure_save_and_eval_strategy; utils/config/__init__.py, normalize_config."""
    has_data = bool(keys.take("test_datasets")) or bool(keys.number("val_set_size", 0.0))
    by_steps = keys.take("eval_steps") or keys.take("evals_per_epoch")
    named = keys.text("eval_strategy") or keys.text("evaluation_strategy")
    batch = keys.integer("eval_batch_size")
    strategy = "no" if not has_data else "steps" if by_steps else named or "no"
    for key in (
        "eval_steps",
        "evals_per_epoch",
        "eval_strategy",
        "evaluation_strategy",
        "eval_batch_size",
        "test_datasets",
        "val_set_size",
    ):
        keys.ignore(key)
    if evaluates({"eval_strategy": strategy}):
        keys.put("training.eval_strategy", strategy, "eval_strategy")
        size = batch if batch is not None else keys.integer("micro_batch_size", 1)
        keys.put("training.per_device_eval_batch_size", size, "eval_batch_size")


def _full(keys: Keys, attention: str | None, dtype: str, *, cuts: bool) -> None:
    """Without an adapter and without a flash attention some modules are float32.

    Source: loaders/model.py, ModelLoader._configure_embedding_dtypes (should_convert); utils/schemas/config.py, attn_needs_dtype_cast.
    """
    converts = attention not in (None, Attention.SDPA, Attention.EAGER)
    if dtype != "float32" and not converts and not cuts and keys.found.value("hardware.strategy") != "fsdp":
        keys.not_modelled(
            "attn_implementation",
            f"without a flash attention or an adapter axolotl keeps embeddings, head and norms in float32; they are counted as {dtype}",
        )


def _spread(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Source: utils/schemas/validation.py, check_fsdp_version_in_fsdp_config and check_fsdp_config_kwargs_prefix."""
    read_named(keys, "deepspeed", others)
    listed, version = keys.names("fsdp"), keys.take("fsdp_version")
    config = keys.section("fsdp_config")
    if listed or config.values:
        translate_fsdp(config, version=version, default_version=1)


def _ddp(keys: Keys) -> None:
    keys.put("hardware.ddp.bucket_cap_mb", keys.integer("ddp_bucket_cap_mb"), "ddp_bucket_cap_mb")
    keys.put("hardware.ddp.find_unused_parameters", keys.take("ddp_find_unused_parameters"), "ddp_find_unused_parameters")


def _plugins(keys: Keys, plugins: str) -> None:
    known = (*PLUGINS, *INERT_PLUGINS)
    for entry in keys.names("plugins") or ():
        if not any(name in entry.lower() for name in known):
            keys.not_modelled("plugins", f"{entry} may change what is kept")
    for plugin, table in PLUGINS.items():
        for key in table:
            if plugin not in plugins and keys.take(key):
                _without_plugin(keys, key)


def _unmodelled(keys: Keys) -> dict[str, str]:
    """The table, but for values that stand for what is done anyway."""
    table = dict(UNMODELLED)
    for effects in PLUGINS.values():
        table |= effects
    for key in ("context_parallel_size", "tensor_parallel_size", "sequence_parallel_degree", "dp_shard_size", "dp_replicate_size"):
        if keys.values.get(key) in (1, "1"):
            keys.ignore(key)
    if keys.values.get("device_map") == "auto":
        keys.ignore("device_map")
    if keys.values.get("base_model_config") == keys.values.get("base_model"):
        keys.ignore("base_model_config")
    if keys.values.get("peft_init_lora_weights") in (True, "gaussian", "orthogonal"):
        keys.ignore("peft_init_lora_weights")
    return table
