"""The real libraries on the meta device: what transformers, bitsandbytes and PEFT make of a model, tensor by tensor."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.base import HfQuantizer

from estimator.dtypes import DType
from estimator.introspect.build import build
from estimator.introspect.inventory import inspect
from estimator.inventory import Inventory
from estimator.patterns import copies
from estimator.phases import Item
from estimator.recipe import Adapter, Quantization, QuantizationKind
from estimator.sources.catalogue import DIRECTORY, INDEX
from estimator.storage import StoredTensor

transformers.utils.logging.set_verbosity_error()


class Parameter(NamedTuple):
    """What is compared of one parameter. Packed 4-bit weights have no shape on meta, so elements are counted."""

    name: str
    num_elements: int
    dtype: str
    trainable: bool


def inventory_of(config: Mapping[str, Any]) -> Inventory:
    """The inventory of a model, from the content of a config.json."""
    return inspect(config, json.dumps(config, sort_keys=True, default=str))


def meta_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A model on the meta device, from the content of a config.json."""
    return build(config, dtype)[1]


def catalogue_files() -> tuple[str, ...]:
    """The files of all bundled models."""
    return tuple(sorted(path.name for path in DIRECTORY.glob("*.json") if path.name != INDEX))


def causal_model_types() -> tuple[str, ...]:
    """Every model type transformers knows a causal language model for."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def quantize(model: Any, quantization: Quantization, dtype: torch.dtype) -> None:
    """What the bitsandbytes quantizers do to a model, being loaded as `dtype`, before its weights are."""
    is_4bit = quantization.kind.is_4bit
    config = BitsAndBytesConfig(
        load_in_4bit=is_4bit,
        load_in_8bit=not is_4bit,
        bnb_4bit_quant_type="nf4" if quantization.kind is QuantizationKind.NF4 else "fp4",
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=quantization.compute_dtype.value,
        bnb_4bit_quant_storage=quantization.storage_dtype.value,
        llm_int8_skip_modules=list(quantization.skip_modules) if quantization.skip_modules is not None else None,
    )
    skipped = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
    # Told to be quantized already, so that weights on meta have the types they will be stored in.
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        replace_with_bnb_linear(model, skipped, config, pre_quantized=True)
    finally:
        torch.set_default_dtype(default)
    model.tie_weights(recompute_mapping=False)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            # DoRA reads the scales, which loading would have made.
            module.weight.SCB = torch.empty(module.out_features, device="meta")
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = is_4bit, not is_4bit


def lora_config(adapter: Adapter) -> LoraConfig:
    """The user's object for our adapter."""
    listed = adapter.target_modules if isinstance(adapter.target_modules, str | None) else list(adapter.target_modules)
    return LoraConfig(
        r=adapter.r,
        target_modules=listed,
        exclude_modules=list(adapter.exclude_modules) if isinstance(adapter.exclude_modules, tuple) else adapter.exclude_modules,
        target_parameters=list(adapter.target_parameters) or None,
        lora_dropout=adapter.dropout,
        use_dora=adapter.use_dora,
        use_rslora=adapter.use_rslora,
        bias=adapter.bias,
        lora_bias=adapter.lora_bias,
        modules_to_save=list(adapter.modules_to_save) or None,
        rank_pattern=dict(adapter.rank_pattern),
        layers_to_transform=list(adapter.layers_to_transform) if adapter.layers_to_transform is not None else None,
        layers_pattern=list(adapter.layers_pattern) or None,
        trainable_token_indices={name: list(range(count)) for name, count in adapter.trainable_token_indices} or None,
    )


def with_adapter(model: Any, adapter: Adapter, *, is_prepared: bool) -> Any:
    """What a training script does to a loaded model."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        if is_prepared:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return get_peft_model(model, lora_config(adapter), autocast_adapter_dtype=adapter.autocast_adapter_dtype)


def real_parameters(model: Any) -> Counter[Parameter]:
    """Parameters of a model under the names the estimator gives them; a tied one once."""
    return Counter(
        Parameter(
            name=plain_name(name),
            num_elements=parameter.numel(),
            dtype=str(parameter.dtype).removeprefix("torch."),
            trainable=parameter.requires_grad,
        )
        for name, parameter in model.named_parameters()
    )


def our_parameters(tensors: Iterable[StoredTensor]) -> Counter[Parameter]:
    """The same of the estimator's answer."""
    return Counter(
        Parameter(name=plain_name(name), num_elements=t.num_elements, dtype=t.dtype.value, trainable=t.trainable)
        for t in tensors
        if t.item in (Item.WEIGHTS, Item.ADAPTER_WEIGHTS)
        for _, name in copies(t.pattern, t.indices)
    )


def plain_name(name: str) -> str:
    """A name without what wrapping adds; an adapter on a parameter keeps the module's name only, as in PEFT."""
    name = name.removeprefix("base_model.model.")
    for part in (".base_layer", ".original_module", ".token_adapter"):
        name = name.replace(part, "")
    name = re.sub(r"\.default(?=\.|$)", "", name)
    if name.endswith(".trainable_tokens_delta"):
        # Listed under whichever of tied modules comes first.
        return "trainable_tokens_delta"
    if ".modules_to_save" in name:
        # PEFT copies the module that was named, with all it holds.
        name = f"{name.replace('.modules_to_save', '')} (copy)"
    return re.sub(r"(\.experts\.\w+|\.gate\.weight)(?=\.lora_[AB]\.)", lambda m: "." + m[0].split(".")[1], name)


TORCH_DTYPES = {dtype: getattr(torch, dtype.value) for dtype in DType}
