"""The real libraries on the meta device: what transformers, bitsandbytes and PEFT make of a model, tensor by tensor."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from estimator.introspect.build import build
from estimator.introspect.inventory import inspect
from estimator.inventory import Inventory
from estimator.patterns import copies
from estimator.phases import Item
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
