"""Builds a model from the facts of a config, on the meta device: shapes without storage."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from estimator.introspect.errors import BuildError

# Tried in this order; the key is what the inventory's config names `auto_class`.
_AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": modeling_auto.AutoModelForCausalLM,
    "seq2seq_lm": modeling_auto.AutoModelForSeq2SeqLM,
    "image_text_to_text": modeling_auto.AutoModelForImageTextToText,
    "multimodal_lm": modeling_auto.AutoModelForMultimodalLM,
    "speech_seq2seq": modeling_auto.AutoModelForSpeechSeq2Seq,
    "masked_lm": modeling_auto.AutoModelForMaskedLM,
    "sequence_classification": modeling_auto.AutoModelForSequenceClassification,
    "token_classification": modeling_auto.AutoModelForTokenClassification,
    "model": modeling_auto.AutoModel,
}

# Never given to transformers: they name code, kernels or files to fetch, or say how a checkpoint is stored.
_DROPPED = {
    "auto_map",
    "custom_pipelines",
    "trust_remote_code",
    "attn_implementation",
    "experts_implementation",
    "kernel_config",
    "use_kernels",
    "quantization_config",
    "compression_config",
    "name_or_path",
    "transformers_version",
    "gradient_checkpointing",
    "torch_dtype",
    "dtype",
}
_FIELD_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def stripped(data: Any) -> Any:
    """The config without what could make a library fetch or run anything.

    `_attn_implementation` and its like can name a kernel to download, `auto_map` a class to import: neither is data about shapes.
    """
    if isinstance(data, Mapping):
        return {str(k): stripped(v) for k, v in data.items() if k not in _DROPPED and not str(k).startswith("_")}
    return [stripped(item) for item in data] if isinstance(data, list) else data


def read_config(data: Mapping[str, Any]) -> Any:
    """The config object that transformers makes of the facts.

    Raises:
        BuildError: if `model_type` is not known to the installed transformers, or its class refuses the values.
    """
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise BuildError("unknown_model_type", f"model_type: {model_type!r} is not known to transformers {transformers.__version__}")
    config_class = transformers.CONFIG_MAPPING[model_type]
    fields = {k: v for k, v in stripped(data).items() if _FIELD_NAME.fullmatch(k) and not callable(getattr(config_class, k, None))}
    try:
        return config_class.from_dict(fields)
    except MemoryError:
        raise
    except Exception as error:
        raise BuildError("config", f"{config_class.__name__} refuses the config: {_sentence(error)}") from error


def choose_class(config: Any) -> tuple[str, Any]:
    """The auto class for a config: one that is named in `architectures`, or yields a class that is, else the first that knows the config.

    Returns:
        its key in the table above, and the auto class.

    Raises:
        BuildError: if no auto class knows the config.
    """
    known = {name: auto for name, auto in _AUTO_CLASSES.items() if type(config) in auto._model_mapping}
    for name, auto in known.items():
        if {auto.__name__, *_class_names(auto, config)} & set(config.architectures or ()):
            return name, auto
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    encoder = "masked_lm" in known and not encoder_decoder and not getattr(config, "is_decoder", False)
    first = "seq2seq_lm" if encoder_decoder else "masked_lm" if encoder else "causal_lm"
    for name in (first, *known):
        if name in known:
            return name, known[name]
    raise BuildError("class", f"{type(config).__name__}: transformers {transformers.__version__} has no model class for it")


def _class_names(auto: Any, config: Any) -> list[str]:
    classes = auto._model_mapping[type(config)]
    return [c.__name__ for c in (classes if isinstance(classes, (list, tuple)) else [classes])]


def build(data: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> tuple[str, Any]:
    """A model on the meta device.

    Args:
        data: the content of a config.json; nothing it names is fetched or run.
        dtype: default type under which modules create their tensors.

    Returns:
        the key of the auto class, and the model, in evaluation state of construction (no weights, no storage).

    Raises:
        BuildError: if transformers cannot build it.
    """
    config = read_config(data)
    name, auto = choose_class(config)
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype)
    except MemoryError:
        raise
    except Exception as error:
        raise BuildError("build", f"{type(config).__name__}: the model cannot be built: {_sentence(error)}") from error
    if data.get("tie_word_embeddings") is False and getattr(config, "tie_word_embeddings", False):
        _untie_head(model)
    return name, model


def _untie_head(model: Any) -> None:
    """Gives the head a weight of its own, as loading does where the file says `tie_word_embeddings: false` and the class insists on tying.

    T5 1.1, Flan-T5 and mT5 checkpoints hold both matrices, with different values, and `from_pretrained` then leaves them apart.

    Source: transformers, configuration_t5.py, T5Config.__post_init__; modeling_utils.py, PreTrainedModel.tie_weights.
    """
    head = model.get_output_embeddings()
    if head is None:
        return
    head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    name = next(name for name, module in model.named_modules() if module is head)
    model.all_tied_weights_keys.pop(f"{name}.weight", None)


def _sentence(error: Exception) -> str:
    """One bounded line of a library's message."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:400]}"
