"""A YAML of `trl sft --config`, or the arguments of a script of one's own: TrainingArguments in JSON or YAML."""

import re
from collections.abc import Mapping
from typing import Any

from app import fields
from app.trainer_files import trl_fields
from app.trainer_files.spread import translate_spread
from app.trainer_files.translation import Keys
from estimator.errors import RequestError

_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# Source: transformers 5.23, training_args.py, TrainingArguments: fields that a YAML may hold as text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def translate_sft(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Put the arguments of TRL's script into the request.

    Source: trl 1.16, scripts/sft.py and scripts/utils.py (TrlParser); trainer/utils.py, get_quantization_config and get_peft_config.

    Raises:
        RequestError: for a value that is not accepted.
    """
    keys.found.put("trainer", "trl", keys.named("model_name_or_path"))
    _model(keys)
    dtype = keys.dtype("dtype", "torch_dtype")
    _quantization(keys, dtype)
    if keys.flag("use_peft"):
        _peft(keys)
    _environment(keys)
    translate_arguments(keys, others)
    keys.rest(inert=trl_fields.SCRIPT | trl_fields.MODEL | trl_fields.LAUNCH, unmodelled={}, trainer="trl sft", known=trl_fields.KNOWN)


def translate_script(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Put TrainingArguments into the request; what a script of one's own may hold beside them is reported.

    Raises:
        RequestError: for a value that is not accepted.
    """
    _model(keys)
    keys.dtype("dtype", "torch_dtype")
    translate_arguments(keys, others)
    keys.rest(inert=trl_fields.SCRIPT, unmodelled={}, trainer="TrainingArguments", known=trl_fields.KNOWN)


def _model(keys: Keys) -> None:
    keys.put("model", keys.text("model_name_or_path"), "model_name_or_path")
    revision = keys.text("model_revision")
    keys.put("revision", revision if revision != "main" else None, "model_revision")
    keys.put("attn_implementation", keys.text("attn_implementation"), "attn_implementation")


def _quantization(keys: Keys, dtype: str | None) -> None:
    four, eight = keys.flag("load_in_4bit"), keys.flag("load_in_8bit")
    if four and eight:
        raise RequestError(
            f"{keys.named('load_in_8bit')}: only one of load_in_4bit and load_in_8bit can be true", field=keys.named("load_in_8bit")
        )
    kind = keys.one_of("bnb_4bit_quant_type", ("nf4", "fp4"), "nf4")
    nested, storage = keys.flag("use_bnb_nested_quant"), keys.text("bnb_4bit_quant_storage")
    if eight:
        keys.put("quantization.load_in_8bit", True, "load_in_8bit")
    if not four:
        return
    if dtype == "auto":
        raise RequestError(
            f"{keys.named('dtype')}: 'auto' cannot be the compute type of 4-bit weights, and TRL takes one for both; "
            "accepted: bfloat16, float16, float32",
            field=keys.named("dtype"),
        )
    keys.put("quantization.load_in_4bit", True, "load_in_4bit")
    keys.put("quantization.bnb_4bit_quant_type", kind, "bnb_4bit_quant_type")
    keys.put("quantization.bnb_4bit_use_double_quant", nested, "use_bnb_nested_quant")
    # The type of the weights is that of the computation; ModelConfig's default is float32, as BitsAndBytesConfig's is.
    keys.put("quantization.bnb_4bit_compute_dtype", dtype or "float32", "dtype")
    keys.put("quantization.bnb_4bit_quant_storage", storage, "bnb_4bit_quant_storage")


def _peft(keys: Keys) -> None:
    keys.put("peft.r", keys.integer("lora_r", 16), "lora_r")
    keys.put("peft.lora_dropout", float(keys.number("lora_dropout", 0.05) or 0.0), "lora_dropout")
    modules = keys.take("lora_target_modules")
    if isinstance(modules, list) and len(modules) == 1:
        modules = modules[0]
    keys.put("peft.target_modules", modules, "lora_target_modules")
    keys.put("peft.target_parameters", keys.names("lora_target_parameters"), "lora_target_parameters")
    keys.put("peft.modules_to_save", keys.names("lora_modules_to_save"), "lora_modules_to_save")
    keys.put("peft.use_rslora", keys.flag("use_rslora"), "use_rslora")
    keys.put("peft.use_dora", keys.flag("use_dora"), "use_dora")
    task = keys.text("lora_task_type")
    keys.put("peft.task_type", task if task != "CAUSAL_LM" else None, "lora_task_type")
    keys.ignore("lora_alpha")


def _environment(keys: Keys) -> None:
    section = keys.section("env")
    for name in _ALLOCATOR:
        section.put("pytorch_cuda_alloc_conf", section.text(name), name)
    for name in section.values:
        if name not in _ALLOCATOR:
            section.ignore(name)


def translate_arguments(keys: Keys, others: Mapping[str, Keys]) -> None:
    """Put the fields of TrainingArguments and SFTConfig into the request as they stand: there they are read, sorted and refused.

    Raises:
        RequestError: for a spread over several processes that is not modelled.
    """
    translate_spread(keys, others)
    for key, value in keys.values.items():
        if key in fields.TRAINING and key not in keys.taken and value is not None:
            name = key.replace("activation_checkpointing", "gradient_checkpointing")  # spellings of one field
            keys.put(f"training.{name}", _number(keys.take(key)), key)


def _number(value: Any) -> Any:
    """Text that reads as a number in the notation that YAML takes for text, `1e-4`, as that number; all else as it stands."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value
