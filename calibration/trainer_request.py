"""The request that a trainer stands for, read off its own objects: model, config, adapters, arguments.

Nothing is imported for it: objects of the libraries are asked by the names that they have had over the versions answered for.
"""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from calibration.case import JsonObject
from estimator.errors import RequestError

# Of the arguments, those that decide memory; what else users set has no bearing on it.
_ARGUMENTS = (
    "gradient_accumulation_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "bf16",
    "fp16",
    "gradient_checkpointing_kwargs",
    "use_liger_kernel",
    "liger_kernel_config",
    "label_smoothing_factor",
    "torch_compile",
    "loss_type",
    "packing",
    "packing_strategy",
    "padding_free",
    "pad_to_multiple_of",
    "activation_offloading",
)
# Of a saved config, what says nothing of the model itself.
_NOT_CONFIG = ("quantization_config", "transformers_version", "architectures")
_NOT_LORA = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "peft_type", "runtime_config")
_PACKED = ("Params4bit", "Int8Params")
# Rows whose lengths are looked at before the first step.
MAX_ROWS = 2000


def base_of(model: Any) -> Any:
    """The transformers model under adapters and wrappers."""
    inner = model.module if hasattr(model, "module") and not hasattr(model, "config") else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def config_of(model: Any) -> JsonObject:
    """Content of the model's config.json."""
    content: JsonObject = json.loads(base_of(model).config.to_json_string(use_diff=True))
    return {name: value for name, value in content.items() if name not in _NOT_CONFIG and not name.startswith("_")}


def request_of(model: Any, arguments: Any, *, batch_size: int, max_length: int, padded: bool = False) -> JsonObject:
    """The request of one run, with its config inside.

    Args:
        model: as the trainer has it.
        arguments: `TrainingArguments` or `SFTConfig`.
        batch_size: sequences in a micro-batch.
        max_length: length really trained [tokens].
        padded: whether batches carry padding.

    Raises:
        RequestError: if the trainer is none that is answered for.
    """
    base = base_of(model)
    own = {name: value for name in _ARGUMENTS if (value := _plain(getattr(arguments, name, None))) not in (None, "", False, {})}
    checkpointing = bool(arguments.gradient_checkpointing or getattr(base, "is_gradient_checkpointing", False))
    sizes: JsonObject = {
        "per_device_train_batch_size": batch_size,
        "max_length": max_length,
        "gradient_checkpointing": checkpointing,
    }
    quantization = _quantization(base)
    request: JsonObject = {
        "model": {"config": config_of(model)},
        "dtype": str(getattr(base.config, "dtype", None) or base.dtype).removeprefix("torch."),
        "attn_implementation": _plain(getattr(base.config, "_attn_implementation", None)),
        "quantization": quantization,
        "peft": _adapter(model),
        "prepare_model_for_kbit_training": _is_prepared(base) if quantization is not None else None,
        "trainer": _trainer(arguments),
        "training": {**own, **sizes},
        "padded": padded or None,
    }
    return {name: value for name, value in request.items() if value is not None}


def name_of(model: Any) -> str | None:
    """The Hub id under which the model was loaded; None for a folder on a disk."""
    name = getattr(base_of(model).config, "_name_or_path", None)
    return name if isinstance(name, str) and name and not Path(name).exists() else None


def longest_row(dataloader: Any) -> int | None:
    """The longest of the first rows that the trainer will read, where its dataset can be asked without reading it up [tokens]."""
    dataset = getattr(dataloader, "dataset", None)
    if dataset is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    try:
        lengths = [len(dataset[index]["input_ids"]) for index in islice(range(len(dataset)), MAX_ROWS)]
    except (KeyError, TypeError, IndexError, ValueError):
        return None
    return max(lengths, default=None)


def _trainer(arguments: Any) -> str:
    """Source: transformers, training_args.py; trl, trainer/sft_config.py."""
    kinds = [kind for kind in type(arguments).__mro__ if kind.__module__.split(".")[0] == "trl"]
    if not kinds:
        return "transformers"
    if any(kind.__name__ == "SFTConfig" for kind in kinds):
        return "trl"
    raise RequestError(
        f"trainer: arguments of {kinds[0].__name__} are not compared; accepted: TrainingArguments, SFTConfig", field="trainer"
    )


def _quantization(base: Any) -> JsonObject | None:
    found = getattr(base.config, "quantization_config", None)
    if found is None:
        return None
    fields = found if isinstance(found, Mapping) else found.to_dict()
    return {name: _plain(value) for name, value in fields.items() if not name.startswith("_") and name != "quant_method"}


def _adapter(model: Any) -> JsonObject | None:
    """The fields of the adapter's config that are not at their defaults."""
    found = getattr(model, "peft_config", None) if hasattr(model, "get_base_model") else None
    if not found:
        return None
    if len(found) > 1:
        raise RequestError(f"peft: {len(found)} adapters at once are not compared; accepted: one", field="peft")
    (config,) = found.values()
    if type(config).__name__ != "LoraConfig":
        raise RequestError(f"peft: {type(config).__name__} is not compared; accepted: LoraConfig", field="peft")
    defaults = type(config)().to_dict()
    own = {name: value for name, value in config.to_dict().items() if name not in _NOT_LORA and value != defaults.get(name)}
    if isinstance(targets := own.get("target_modules"), set):
        own["target_modules"] = _shortened(targets, base_of(model))
    return {"r": config.r, **{name: _plain(value) for name, value in own.items()}}


def _shortened(targets: set[str], base: Any) -> set[str]:
    """The last parts of names, where they mean the same modules: PEFT writes "all-linear" out, module by module."""
    ends = {name.rpartition(".")[2] for name in targets}
    return ends if {name for name, _ in base.named_modules() if name.rpartition(".")[2] in ends} == targets else targets


def _is_prepared(base: Any) -> bool:
    """Whether `prepare_model_for_kbit_training` made everything float32 that is not packed.

    Source: peft, utils/other.py, prepare_model_for_kbit_training.
    """
    rest = [p for name, p in base.named_parameters() if type(p).__name__ not in _PACKED and ".lora_" not in name]
    return bool(rest) and all(str(parameter.dtype) == "torch.float32" for parameter in rest)


def _plain(value: Any) -> JsonValue:
    """A value as JSON has it: enumerations by their values, types of tensors by their names, sets in order."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, set | frozenset):
        return [_plain(item) for item in sorted(value)]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(getattr(value, "value", value)).removeprefix("torch.")
