"""LLaMA-Factory's YAML. Source: LLaMA-Factory 0.9.5, as `app.trainer_files.llamafactory` reads it."""

from app.answer import Json
from app.trainer_files.written.deepspeed import deepspeed
from app.trainer_files.written.subject import PLACEHOLDER, Subject
from estimator.dtypes import DType
from estimator.recipe import Attention, Loss

_FORMAT = "llamafactory"
_ATTENTION = {Attention.EAGER: "disabled", Attention.SDPA: "sdpa", Attention.FLASH_ATTENTION_2: "fa2", Attention.FLASH_ATTENTION_3: "fa3"}


def llamafactory(subject: Subject) -> Json:
    """The training file.

    Raises:
        RequestError: for what LLaMA-Factory has no words for.
    """
    subject.refuse_adapter(_FORMAT)
    subject.refuse_training(_FORMAT, losses=(Loss.STOCK, Loss.LIGER, Loss.TRL_TILED, Loss.TRL_CHUNKED))
    training = subject.training
    bf16, fp16 = subject.precision
    config: Json = {"model_name_or_path": subject.model}
    if subject.revision is not None:
        config["model_revision"] = subject.revision
    config |= {"stage": "sft", "do_train": True, "finetuning_type": "lora" if subject.adapter is not None else "full"}
    config |= _adapter(subject) | _quantization(subject)
    if subject.recipe.attention not in _ATTENTION:
        subject.refuse(_FORMAT, attn_implementation=(subject.recipe.attention.value, Attention.SDPA.value))
    config |= {
        "flash_attn": _ATTENTION[subject.recipe.attention],
        "bf16": bf16,
        "fp16": fp16,
        "pure_bf16": not (bf16 or fp16) and subject.adapter is None and subject.recipe.dtype is DType.BFLOAT16,
        "cutoff_len": training.sequence_length - training.flattened,  # packed rows hold one token more
        "per_device_train_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "optim": training.optimizer,
        "disable_gradient_checkpointing": not training.gradient_checkpointing,
        "use_reentrant_gc": training.use_reentrant if training.gradient_checkpointing else True,
        "enable_liger_kernel": training.loss is Loss.LIGER,
        "neat_packing": training.flattened,
    }
    if training.decays:
        config["weight_decay"] = training.weight_decay
    if training.optimizer_arguments:
        config["optim_args"] = ",".join(f"{name}={value}" for name, value in training.optimizer_arguments)
    parallel = subject.recipe.parallel
    if parallel.strategy.zero_stage:
        config["deepspeed"] = deepspeed(subject)
    if parallel.ddp.bucket_cap_mb is not None:
        config["ddp_bucket_cap_mb"] = parallel.ddp.bucket_cap_mb
    return config | {
        "dataset": PLACEHOLDER,
        "template": "YOUR_TEMPLATE",
        "learning_rate": subject.learning_rate,
        "num_train_epochs": 1.0,
        "output_dir": "saves",
    }


def _adapter(subject: Subject) -> Json:
    adapter = subject.adapter
    if adapter is None:
        return {}
    subject.refuse(
        _FORMAT,
        peft__target_parameters=(adapter.target_parameters, ()),
        peft__rank_pattern=(adapter.rank_pattern, ()),
        peft__layers_to_transform=(adapter.layers_to_transform, None),
    )
    modules = subject.target_modules
    if isinstance(modules, str) and modules != "all-linear":
        subject.refuse(_FORMAT, peft__target_modules=(modules, "all-linear"))
    found: Json = {
        "lora_rank": adapter.r,
        "lora_alpha": subject.lora_alpha,
        "lora_dropout": adapter.dropout,
        "lora_target": "all" if isinstance(modules, str) else ",".join(modules),
    }
    if adapter.modules_to_save:
        found["additional_target"] = ",".join(adapter.modules_to_save)
    return found | {name: True for name, on in (("use_dora", adapter.use_dora), ("use_rslora", adapter.use_rslora)) if on}


def _quantization(subject: Subject) -> Json:
    quantization = subject.quantization
    if quantization is None:
        return {}
    subject.refuse(_FORMAT, quantization__llm_int8_skip_modules=(quantization.skip_modules, None))
    if not quantization.kind.is_4bit:
        return {"quantization_bit": 8, "quantization_method": "bnb"}
    half = DType.FLOAT16 if subject.precision[1] else DType.BFLOAT16
    subject.refuse(_FORMAT, quantization__bnb_4bit_compute_dtype=(quantization.compute_dtype.value, half.value))
    return {
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "quantization_type": quantization.kind.value,
        "double_quantization": quantization.double_quant,
    }
