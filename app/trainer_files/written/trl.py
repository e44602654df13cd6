"""TRL: the YAML of `trl sft --config`, and a script that runs by itself."""

from app.answer import Json
from app.trainer_files.written.accelerate import fsdp_options
from app.trainer_files.written.deepspeed import deepspeed
from app.trainer_files.written.subject import PLACEHOLDER, Subject
from estimator.parallelism.options import Strategy
from estimator.recipe import Loss, Trainer

_FORMAT = "trl"
_LOSSES = (Loss.STOCK, Loss.LIGER, Loss.TRL_TILED, Loss.TRL_CHUNKED)


def arguments(subject: Subject) -> Json:
    """Fields of TrainingArguments, or of SFTConfig where TRL trains.

    Raises:
        RequestError: for what they have no words for.
    """
    subject.refuse_training(_FORMAT, losses=_LOSSES)
    training, stack = subject.training, subject.recipe.stack
    asked = subject.request.training
    bf16, fp16 = subject.precision
    # Source: transformers 5.23, training_args.py, TrainingArguments (the older name still works, with a warning).
    checkpointing = "activation_checkpointing" if stack.transformers >= (5, 23) else "gradient_checkpointing"
    found: Json = {
        "output_dir": "outputs",
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "optim": training.optimizer,
        "learning_rate": subject.learning_rate,
        "num_train_epochs": 1,
        "bf16": bf16,
        "fp16": fp16,
        checkpointing: training.gradient_checkpointing,
        "use_liger_kernel": asked is not None and asked.use_liger_kernel,
    }
    if training.gradient_checkpointing:
        found[f"{checkpointing}_kwargs"] = {"use_reentrant": training.use_reentrant}
    if training.decays:
        found["weight_decay"] = training.weight_decay
    if training.optimizer_arguments:
        found["optim_args"] = ",".join(f"{name}={value}" for name, value in training.optimizer_arguments)
    if asked is not None and asked.label_smoothing_factor:
        found["label_smoothing_factor"] = asked.label_smoothing_factor
    if asked is not None and asked.liger_kernel_config is not None and asked.liger_kernel_config.fused_linear_cross_entropy is not None:
        found["liger_kernel_config"] = {"fused_linear_cross_entropy": asked.liger_kernel_config.fused_linear_cross_entropy}
    if subject.recipe.trainer is Trainer.TRL:
        found["max_length" if stack.trl >= (0, 16) else "max_seq_length"] = training.sequence_length
        found["packing"] = asked is not None and asked.packing
        if asked is not None and asked.packing_strategy is not None:
            found["packing_strategy"] = asked.packing_strategy
        if asked is not None and asked.padding_free:
            found["padding_free"] = True
        if stack.sft_knows_chunked_loss and not stack.sft_tiles_loss:
            found["loss_type"] = "chunked_nll" if training.loss is Loss.TRL_CHUNKED else "nll"
    return found | _spread(subject)


def _spread(subject: Subject) -> Json:
    parallel = subject.recipe.parallel
    if parallel.strategy.zero_stage:
        return {"deepspeed": deepspeed(subject)}
    if parallel.strategy is Strategy.FSDP:
        given = parallel.fsdp
        own = {name: value for name, value in fsdp_options(given).items() if name != "sharding_strategy"}  # which the Trainer does not read
        return {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": given.version, **own, "cpu_offload": given.offload_params}}
    ddp = {"ddp_bucket_cap_mb": parallel.ddp.bucket_cap_mb, "ddp_find_unused_parameters": parallel.ddp.find_unused_parameters}
    return {name: value for name, value in ddp.items() if value is not None}


def trl(subject: Subject) -> Json:
    """The configuration of TRL's own script.

    Raises:
        RequestError: for what it has no words for.
    """
    recipe, quantization = subject.recipe, subject.quantization
    subject.refuse(_FORMAT, trainer=(recipe.trainer.value, Trainer.TRL.value))
    subject.refuse_adapter(_FORMAT)
    if recipe.prepare_for_kbit_training and not recipe.stack.sft_prepares_for_kbit_training:
        subject.refuse(_FORMAT, prepare_model_for_kbit_training=(True, False))
    config: Json = {"model_name_or_path": subject.model}
    if subject.revision is not None:
        config["model_revision"] = subject.revision
    config |= {_dtype_name(subject): recipe.dtype.value, "attn_implementation": recipe.attention.value}
    if quantization is not None:
        subject.refuse(_FORMAT, quantization__llm_int8_skip_modules=(quantization.skip_modules, None))
        if quantization.kind.is_4bit:
            subject.refuse(_FORMAT, quantization__bnb_4bit_compute_dtype=(quantization.compute_dtype.value, recipe.dtype.value))
            config |= {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": quantization.kind.value,
                "use_bnb_nested_quant": quantization.double_quant,
                "bnb_4bit_quant_storage": quantization.storage_dtype.value,
            }
        else:
            config["load_in_8bit"] = True
    return config | _adapter(subject) | arguments(subject) | {"dataset_name": PLACEHOLDER}


def _dtype_name(subject: Subject) -> str:
    """Source: trl 0.24, trainer/model_config.py, ModelConfig (`torch_dtype` before)."""
    return "dtype" if subject.recipe.stack.trl >= (0, 24) else "torch_dtype"


def _adapter(subject: Subject) -> Json:
    adapter = subject.adapter
    if adapter is None:
        return {}
    subject.refuse(_FORMAT, peft__rank_pattern=(adapter.rank_pattern, ()), peft__layers_to_transform=(adapter.layers_to_transform, None))
    modules = subject.target_modules
    found: Json = {
        "use_peft": True,
        "lora_r": adapter.r,
        "lora_alpha": subject.lora_alpha,
        "lora_dropout": adapter.dropout,
        "lora_target_modules": [modules] if isinstance(modules, str) else modules,
        "use_dora": adapter.use_dora,
        "use_rslora": adapter.use_rslora,
    }
    optional = {"lora_target_parameters": list(adapter.target_parameters), "lora_modules_to_save": list(adapter.modules_to_save)}
    return found | {name: value for name, value in optional.items() if value}
