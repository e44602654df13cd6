"""Whose file it is, told by its keys."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from app import fields
from app.trainer_files import llamafactory_fields, trl_fields
from estimator.errors import RequestError, UnknownNameError


class Format(StrEnum):
    """Files that are read."""

    REQUEST = "request"  # our own
    AXOLOTL = "axolotl"
    LLAMA_FACTORY = "llamafactory"
    TRL = "trl"  # `trl sft --config`
    TRANSFORMERS = "transformers"  # TrainingArguments
    ADAPTER_CONFIG = "adapter_config"
    DEEPSPEED = "deepspeed"
    ACCELERATE = "accelerate"
    FSDP = "fsdp"  # `fsdp_config` in a file of its own
    MODEL_CONFIG = "config"

    @property
    def trains(self) -> bool:
        """Whether it describes a training run; of those there is at most one."""
        return self in (Format.AXOLOTL, Format.LLAMA_FACTORY, Format.TRL, Format.TRANSFORMERS)


# Keys that only one kind of file has.
_DEEPSPEED = frozenset(
    ("zero_optimization", "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
)
_ACCELERATE = frozenset(("compute_environment", "distributed_type", "main_training_function", "num_machines", "machine_rank"))
_FSDP = frozenset(
    ("auto_wrap_policy", "min_num_params", "reshard_after_forward", "state_dict_type", "transformer_layer_cls_to_wrap", "xla")
)
_REQUEST = frozenset(("training", "inference", "hardware", "prepare_model_for_kbit_training"))


def format_of(name: str, values: Mapping[str, Any], given: object = None) -> Format:
    """The format of a file.

    Args:
        name: as messages name the file.
        values: what it holds.
        given: a format by name, which is believed.

    Raises:
        RequestError: if it is none that is read.
    """
    if given is not None:
        if not isinstance(given, str) or given not in set(Format):
            raise UnknownNameError.of(f"{name}: format", given, list(Format))
        return Format(given)
    keys = frozenset(values)
    if "peft_type" in keys:
        return Format.ADAPTER_CONFIG
    if "model" in keys or keys & _REQUEST:
        return Format.REQUEST
    if "base_model" in keys:
        return Format.AXOLOTL
    if keys & _DEEPSPEED:
        return Format.DEEPSPEED
    if keys & _ACCELERATE:
        return Format.ACCELERATE
    of_trl = (trl_fields.SCRIPT | trl_fields.MODEL | fields.SFT_CONFIG) - trl_fields.SHARED
    if len(keys & llamafactory_fields.ONLY) > len(keys & of_trl - llamafactory_fields.KNOWN):
        return Format.LLAMA_FACTORY
    if keys & of_trl:
        return Format.TRL
    if keys & fields.TRAINING_ARGUMENTS:
        return Format.TRANSFORMERS
    if {key.removeprefix("fsdp_") for key in keys} & _FSDP:
        return Format.FSDP
    if keys & {"model_type", "architectures"}:
        return Format.MODEL_CONFIG
    raise RequestError(
        f"{name}: not a file that is read; accepted: {', '.join(Format)}. A format can be given by name where files are given as fields",
        field=name,
    )
