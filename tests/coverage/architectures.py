"""Every causal language model of the installed transformers, at the defaults of its config class."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from estimator.introspect.errors import BuildError
from estimator.introspect.inventory import inspect
from estimator.inventory import Inventory

LONGEST = 2048

# What a default leaves open and the model needs; values of the checkpoint named.
COMPLETED: Mapping[str, Mapping[str, Any]] = {
    "xmod": {"default_language": "en_XX"},  # facebook/xmod-base
    "deepseek_v2": {"num_experts_per_tok": 6, "n_group": 1, "topk_group": 1},  # deepseek-ai/DeepSeek-V2-Lite
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model type with a config that builds."""

    name: str
    config: Mapping[str, Any]
    inventory: Inventory

    @property
    def length(self) -> int:
        """A power of two that leaves room in the model's positions, 2,048 at most [tokens]."""
        places = [self.inventory.config.get(name) for name in ("max_position_embeddings", "n_positions", "max_target_positions")]
        most = min((place for place in places if isinstance(place, int) and place > 1), default=LONGEST + 1)
        return min(LONGEST, 1 << ((most - 1).bit_length() - 1))


def names() -> tuple[str, ...]:
    """Model types, as transformers lists them."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def default_config(name: str) -> dict[str, Any]:
    """The content of a config.json that says nothing but the model type and class.

    Raises:
        Exception: whatever the config class raises.
    """
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    config = transformers.CONFIG_MAPPING[name](**COMPLETED.get(name, {}))
    data: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return data | {"model_type": name, "architectures": [classes if isinstance(classes, str) else classes[0]]}


def architecture(name: str) -> Architecture:
    """A model type with its inventory.

    Raises:
        BuildError: if transformers cannot build it at its defaults.
    """
    try:
        data = default_config(name)
    except Exception as error:  # the border to a library's own code
        raise BuildError("config", f"{type(error).__name__}: {error}") from error
    return Architecture(name=name, config=data, inventory=inspect(data, name))


def built(wanted: tuple[str, ...]) -> Iterator[tuple[str, Architecture | BuildError]]:
    """Architectures one by one, or why they cannot be built."""
    for name in wanted:
        try:
            yield name, architecture(name)
        except BuildError as error:
            yield name, error
