"""What users paste, brought under the names of the request: aliases, hoisted fields, fields without a bearing on memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app import fields
from app.request import InferenceFields, PeftFields, QuantizationFields, TrainingFields
from app.trainer_files.spread import with_hardware
from app.unmodelled import EVALUATION, GENERATION, LORA, QUANTIZATION, TRAINING, Unmodelled, changes_memory, evaluates
from estimator.errors import RequestError, UnknownNameError

_TOP_ALIASES = {"torch_dtype": "dtype", "quantization_config": "quantization", "peft_config": "peft"}
_QUANTIZATION_ALIASES = {"_load_in_4bit": "load_in_4bit", "_load_in_8bit": "load_in_8bit"}
_TRAINING_ALIASES = {
    "max_seq_length": "max_length",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "evaluation_strategy": "eval_strategy",
    "use_liger": "use_liger_kernel",
}
# Keys of SFTConfig(model_init_kwargs=…) that are fields of the request itself.
_HOISTED_INIT_KWARGS = ("dtype", "torch_dtype", "attn_implementation", "revision", "quantization_config")
# Fields of GenerationConfig that make generation another program than the one that is modelled: the values under which they do not, and
# what they ask for.
_OTHER_GENERATION: Mapping[str, tuple[tuple[object, ...], str]] = {
    "assistant_early_exit": ((), "assisted decoding"),
    "assistant_model": ((), "assisted decoding"),
    "cache_config": (({},), "a cache of another kind"),
    "constraints": ((), "constrained beam search"),
    "dola_layers": ((), "DoLa decoding"),
    "force_words_ids": ((), "constrained beam search"),
    "guidance_scale": ((1, 1.0), "a second pass without the prompt"),
    "max_cache_len": ((), "a static cache longer than the text"),
    "max_length": ((20,), "a length with the prompt in it; give max_new_tokens"),
    "num_beam_groups": ((1,), "beam search"),
    "num_beams": ((1,), "beam search"),
    "num_return_sequences": ((1,), "several texts for each prompt; count them in batch_size"),
    "output_attentions": ((False,), "attention weights kept to the end"),
    "output_hidden_states": ((False,), "hidden states kept to the end"),
    "output_logits": ((False,), "logits kept to the end"),
    "output_scores": ((False,), "scores kept to the end"),
    "penalty_alpha": ((0, 0.0), "contrastive search"),
    "prefill_chunk_size": ((), "the prompt read piece by piece"),
    "prompt_lookup_num_tokens": ((), "assisted decoding"),
    "speculation_type": ((), "assisted decoding"),
    "use_cache": ((True,), "generation without a cache"),
    "use_mtp": ((False,), "assisted decoding"),
}
_INERT_INIT_KWARGS = frozenset(("device_map", "trust_remote_code", "use_cache", "low_cpu_mem_usage", "cache_dir", "token", "use_kernels"))


@dataclass(slots=True)
class Pasted:
    """A payload under canonical names, and what was set aside on the way."""

    payload: dict[str, Any]
    ignored: list[str] = field(default_factory=list)
    """Known fields without a bearing on memory."""
    unmodelled: list[str] = field(default_factory=list)
    """Fields that have a bearing on memory which no formula covers."""
    evaluation: list[str] = field(default_factory=list)
    """Fields of an evaluation during training; empty without one."""


def canonical(payload: Mapping[str, Any]) -> Pasted:
    """The payload with aliases resolved, nulls dropped, and inert fields listed instead of kept.

    Raises:
        RequestError: if two spellings of one field disagree, or an object is of a kind that is not modelled.
    """
    top = _renamed({k: v for k, v in payload.items() if v is not None}, _TOP_ALIASES, "")
    _hoist_init_kwargs(top)
    _hoist_quantization(top)
    top = with_hardware(top)
    pasted = Pasted(payload=top)
    if isinstance(top.get("quantization"), dict):
        top["quantization"] = _quantization(top["quantization"], pasted)
    if isinstance(top.get("peft"), dict):
        top["peft"] = _peft(top["peft"], pasted)
    if isinstance(top.get("training"), dict):
        top["training"] = _training(top["training"], pasted)
    if isinstance(top.get("inference"), dict):
        top["inference"] = _inference(top["inference"], pasted)
    for name in ("hardware", "stack", "task"):
        if isinstance(top.get(name), dict):
            top[name] = {k: v for k, v in top[name].items() if v is not None}
    pasted.ignored.sort()
    return pasted


def spelling(payload: Mapping[str, Any], path: str) -> str:
    """The path by which a payload sets a field of the request: its own spelling if it has one, else the field's name."""
    section, _, name = path.rpartition(".")
    if not section:
        kwargs = payload["training"].get("model_init_kwargs") if isinstance(payload.get("training"), Mapping) else None
        names = [name, *(alias for alias, meant in _TOP_ALIASES.items() if meant == name)]
        given = [alias for alias in names if payload.get(alias) is not None]
        hoisted = [alias for alias in names if isinstance(kwargs, Mapping) and kwargs.get(alias) is not None]
        return given[0] if given else f"training.model_init_kwargs.{hoisted[0]}" if hoisted else name
    first, _, rest = path.partition(".")
    if rest == name:
        if first == "quantization" and payload.get(name) is not None and name in fields.BITS_AND_BYTES_CONFIG:
            return name
        aliases = {"training": _TRAINING_ALIASES, "quantization": _QUANTIZATION_ALIASES}.get(first, {})
        own = spelling(payload, first)
        values = _section(payload, own)
        names = [alias for alias, meant in aliases.items() if meant == name and values.get(alias) is not None]
        return f"{own}.{names[0] if names and values.get(name) is None else name}"
    return path


def _section(payload: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    found: Any = payload
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _renamed(values: dict[str, Any], aliases: Mapping[str, str], prefix: str) -> dict[str, Any]:
    renamed = dict(values)
    for alias, name in aliases.items():
        if alias not in renamed:
            continue
        value = renamed.pop(alias)
        if name in renamed and renamed[name] != value and value not in (None, False):
            if renamed[name] is not False:
                raise RequestError(
                    f"{prefix}{alias}: contradicts {prefix}{name}, another spelling of the same field", field=f"{prefix}{alias}"
                )
            renamed[name] = value
        renamed.setdefault(name, value)
    return renamed


def _hoist_init_kwargs(top: dict[str, Any]) -> None:
    training = top.get("training")
    if not isinstance(training, dict) or not isinstance(training.get("model_init_kwargs"), dict):
        return
    kwargs = {k: v for k, v in training["model_init_kwargs"].items() if v is not None}
    for key in _HOISTED_INIT_KWARGS:
        if key in kwargs:
            _set_once(top, _TOP_ALIASES.get(key, key), kwargs.pop(key), f"training.model_init_kwargs.{key}")
    unknown = kwargs.keys() - _INERT_INIT_KWARGS
    if unknown:
        name = min(unknown)
        raise UnknownNameError.of("training.model_init_kwargs", name, [*_HOISTED_INIT_KWARGS, *_INERT_INIT_KWARGS])
    top["training"] = {k: v for k, v in training.items() if k != "model_init_kwargs"}


def _hoist_quantization(top: dict[str, Any]) -> None:
    """`load_in_4bit` and its like may stand beside `model`, as `from_pretrained` of transformers 4 took them."""
    beside = {k: top.pop(k) for k in list(top) if k in fields.BITS_AND_BYTES_CONFIG}
    if not beside:
        return
    quantization = top.setdefault("quantization", {})
    if not isinstance(quantization, dict):
        raise RequestError("quantization: expected an object with the fields of BitsAndBytesConfig", field="quantization")
    top["quantization"] = quantization = dict(quantization)
    for key, value in beside.items():
        _set_once(quantization, key, value, key)


def _set_once(target: dict[str, Any], name: str, value: object, origin: str) -> None:
    if target.setdefault(name, value) != value:
        raise RequestError(f"{origin}: contradicts {name}, which is given as well", field=origin)


def _quantization(values: dict[str, Any], pasted: Pasted) -> dict[str, Any]:
    method = values.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise UnknownNameError.of("quantization.quant_method", method, ["bitsandbytes"])
    values = _renamed({k: v for k, v in values.items() if v is not None}, _QUANTIZATION_ALIASES, "quantization.")
    values.pop("quant_method", None)
    if values.get("llm_int8_has_fp16_weight"):
        raise RequestError(
            "quantization.llm_int8_has_fp16_weight: True is not modelled (weights stay float16); accepted: false",
            field="quantization.llm_int8_has_fp16_weight",
        )
    return _split(
        values,
        "quantization",
        frozenset(QuantizationFields.model_fields),
        fields.BITS_AND_BYTES_CONFIG,
        QUANTIZATION,
        pasted,
    )


def _peft(values: dict[str, Any], pasted: Pasted) -> dict[str, Any]:
    peft_type = values.get("peft_type") or "LORA"
    if str(peft_type).rpartition(".")[2].upper() != "LORA":
        raise UnknownNameError.of("peft.peft_type", peft_type, ["LORA"])
    values = {k: v for k, v in values.items() if v is not None}
    if str(values.get("task_type", "")).rpartition(".")[2] == "SEQ_CLS":
        # Source: peft 0.21, peft_model.py, PeftModelForSequenceClassification.__init__.
        saved = values.get("modules_to_save") or ()
        values["modules_to_save"] = [*saved, *(name for name in ("classifier", "score") if name not in saved)]
    return _split(values, "peft", frozenset(PeftFields.model_fields), fields.LORA_CONFIG, LORA, pasted)


def _training(values: dict[str, Any], pasted: Pasted) -> dict[str, Any]:
    values = _renamed({k: v for k, v in values.items() if v is not None}, _TRAINING_ALIASES, "training.")
    if values.pop("adafactor", False):
        _set_once(values, "optim", "adafactor", "training.adafactor")
    for key in ("gradient_checkpointing_kwargs", "liger_kernel_config"):
        if isinstance(values.get(key), dict):
            values[key] = {k: v for k, v in values[key].items() if v is not None}
    if evaluates(values):
        pasted.evaluation = sorted(f"training.{name}" for name in values if name in EVALUATION)
        values = {k: v for k, v in values.items() if k not in EVALUATION - set(TrainingFields.model_fields)}
    elif values.pop("per_device_eval_batch_size", None) is not None:
        pasted.ignored.append("training.per_device_eval_batch_size")
    for name in ("offload", "selective"):
        if isinstance(kwargs := values.get("gradient_checkpointing_kwargs"), dict) and kwargs.get(name) is True:
            pasted.unmodelled.append(f"training.gradient_checkpointing_kwargs.{name}")
    return _split(values, "training", frozenset(TrainingFields.model_fields), fields.TRAINING, TRAINING, pasted)


def _inference(values: dict[str, Any], pasted: Pasted) -> dict[str, Any]:
    kept = {k: v for k, v in values.items() if v is not None}
    for name, (neutral, meaning) in _OTHER_GENERATION.items():
        if name not in kept:
            continue
        if kept[name] not in neutral:
            accepted = f"accepted: {neutral[0]!r} or null" if neutral else "accepted: null"
            raise RequestError(f"inference.{name}: {meaning} is not modelled; {accepted}", field=f"inference.{name}")
        del kept[name]
        pasted.ignored.append(f"inference.{name}")
    read = frozenset(InferenceFields.model_fields)
    return _split(kept, "inference", read, fields.GENERATION_CONFIG, GENERATION, pasted)


def _split(
    values: dict[str, Any], section: str, read: frozenset[str], known: frozenset[str], unmodelled: Mapping[str, Unmodelled], pasted: Pasted
) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if key in read or key not in known:
            kept[key] = value  # an unknown name is left for the model of the section to refuse
        elif changes_memory(unmodelled.get(key), value):
            pasted.unmodelled.append(f"{section}.{key}")
        else:
            pasted.ignored.append(f"{section}.{key}")
    return kept
