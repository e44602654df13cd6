"""axolotl's YAML. Source: axolotl 0.19.0, as `app.trainer_files.axolotl` reads it."""

from app.answer import Json
from app.trainer_files.axolotl_fields import LORA_KERNELS
from app.trainer_files.written.accelerate import fsdp_options
from app.trainer_files.written.deepspeed import deepspeed
from app.trainer_files.written.subject import PLACEHOLDER, Subject
from estimator.dtypes import DType
from estimator.parallelism.options import Strategy
from estimator.recipe import Loss, QuantizationKind

_FORMAT = "axolotl"
_LIGER = "axolotl.integrations.liger.LigerPlugin"


def axolotl(subject: Subject) -> Json:
    """The training file.

    Raises:
        RequestError: for what axolotl has no words for.
    """
    subject.refuse_adapter(_FORMAT)
    subject.refuse_training(_FORMAT, losses=(Loss.STOCK, Loss.LIGER, Loss.TRL_TILED, Loss.TRL_CHUNKED))
    training = subject.training
    bf16, fp16 = subject.precision
    config: Json = {"base_model": subject.model}
    if subject.revision is not None:
        config["revision_of_model"] = subject.revision
    config |= {"bf16": bf16, "fp16": fp16, "attn_implementation": subject.recipe.attention.value}
    config |= _adapter(subject)
    config |= {
        "sequence_len": training.sequence_length,
        "sample_packing": training.flattened,
        "pad_to_sequence_len": training.flattened or training.padded,
        "micro_batch_size": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "optimizer": training.optimizer,
    }
    if training.decays:
        config["weight_decay"] = training.weight_decay
    if training.optimizer_arguments:
        config["optim_args"] = dict(training.optimizer_arguments)
    config["gradient_checkpointing"] = training.gradient_checkpointing
    if training.gradient_checkpointing:
        config["gradient_checkpointing_kwargs"] = {"use_reentrant": training.use_reentrant}
    if training.loss is Loss.LIGER:
        config |= {"plugins": [_LIGER], "liger_fused_linear_cross_entropy": True}
    return (
        config
        | _spread(subject)
        | {
            "datasets": [{"path": PLACEHOLDER, "type": "alpaca"}],
            "val_set_size": 0,
            "learning_rate": subject.learning_rate,
            "num_epochs": 1,
            "output_dir": "./outputs",
        }
    )


def _adapter(subject: Subject) -> Json:
    adapter, quantization = subject.adapter, subject.quantization
    if adapter is None:
        return {}
    is_4bit = quantization is not None and quantization.kind.is_4bit
    modules = subject.target_modules
    config: Json = {
        "adapter": "qlora" if is_4bit else "lora",
        "load_in_4bit": is_4bit,
        "load_in_8bit": quantization is not None and not is_4bit,
        "lora_r": adapter.r,
        "lora_alpha": subject.lora_alpha,
        "lora_dropout": adapter.dropout,
    }
    config |= {"lora_target_linear": True} if modules == "all-linear" else {"lora_target_modules": modules}
    # the estimate is for PEFT's own functions
    config |= dict.fromkeys(LORA_KERNELS, False)
    optional: Json = {
        "lora_target_parameters": list(adapter.target_parameters),
        "lora_modules_to_save": list(adapter.modules_to_save),
        "lora_rank_pattern": dict(adapter.rank_pattern),
        "peft_layers_to_transform": list(adapter.layers_to_transform or ()),
        "peft_layers_pattern": list(adapter.layers_pattern),
        "peft_use_dora": adapter.use_dora,
        "peft_use_rslora": adapter.use_rslora,
    }
    return config | {name: value for name, value in optional.items() if value} | _departures(subject)


def _departures(subject: Subject) -> Json:
    """What differs from the BitsAndBytesConfig that axolotl makes by itself."""
    quantization = subject.quantization
    if quantization is None or not quantization.kind.is_4bit:
        return {}
    half = DType.BFLOAT16 if subject.precision[0] else DType.FLOAT16 if subject.precision[1] else DType.FLOAT32
    found: Json = {}
    if quantization.kind is not QuantizationKind.NF4:
        found["bnb_4bit_quant_type"] = quantization.kind.value
    if not quantization.double_quant:
        found["bnb_4bit_use_double_quant"] = False
    if quantization.compute_dtype is not half:
        found["bnb_4bit_compute_dtype"] = quantization.compute_dtype.value
    if quantization.storage_dtype is not DType.BFLOAT16:
        found["bnb_4bit_quant_storage"] = quantization.storage_dtype.value
    if quantization.skip_modules is not None:
        found["llm_int8_skip_modules"] = list(quantization.skip_modules)
    return {"bnb_config_kwargs": found} if found else {}


def _spread(subject: Subject) -> Json:
    parallel = subject.recipe.parallel
    if parallel.strategy.zero_stage:
        return {"deepspeed": deepspeed(subject)}
    if parallel.strategy is Strategy.FSDP:
        given = parallel.fsdp
        options = {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            **fsdp_options(given),
            "offload_params": given.offload_params,
            "state_dict_type": "SHARDED_STATE_DICT",
        }
        return {"fsdp_version": given.version, "fsdp_config": options}
    ddp = {"ddp_bucket_cap_mb": parallel.ddp.bucket_cap_mb, "ddp_find_unused_parameters": parallel.ddp.find_unused_parameters}
    return {name: value for name, value in ddp.items() if value is not None}
