"""A model as its files store it: what is known where no class of transformers is, or where the weights are stored quantized."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from estimator.dtypes import DType, parse_dtype
from estimator.errors import UnknownNameError
from estimator.inventory import Inventory
from estimator.recipe import Attention
from estimator.sources.cache import content_hash, library_versions
from estimator.sources.safetensors import Files

_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
_METHOD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is stored, beside how."""

    method: str | None
    """`quant_method` of the config: bitsandbytes, gptq, awq, fp8, compressed-tensors …; None for plain weights."""
    files: Files
    inventory: Inventory
    """Its tensors as rows; only what they take when loaded can be told from them."""


def method_of(config: Mapping[str, Any]) -> str | None:
    """How a checkpoint is quantized, by its config's own word; None for plain weights.

    Source: transformers, quantizers/auto.py, AutoHfQuantizer.supports_quant_method: without a `quant_method`, `load_in_4bit` and
    `load_in_8bit` mean bitsandbytes; `compression_config` is the name that compressed-tensors once used.
    """
    own = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(own, Mapping):
        return None
    method = own.get("quant_method")
    if isinstance(method, str) and _METHOD.fullmatch(method):
        return method.lower()
    if own.get("load_in_4bit") or own.get("load_in_8bit"):
        return "bitsandbytes"
    return "unknown"


def checkpoint_of(config: Mapping[str, Any], files: Files) -> Checkpoint:
    """The checkpoint of a config and its files.

    Weights that are stored quantized are loaded as they are stored; others in the type that is asked for.
    """
    method = method_of(config)
    rows = files.rows if method is None else tuple(replace(row, dtype_is_fixed=True) for row in files.rows)
    # Files differ where configs may not: a commit can change the weights alone.
    key = hashlib.sha256(repr((content_hash(config), files.num_tensors, files.stored_bytes, rows)).encode()).hexdigest()
    names = config.get("architectures")
    named = names[0] if isinstance(names, list) and names and isinstance(names[0], str) and _CLASS.fullmatch(names[0]) else None
    inventory = Inventory(
        content_hash=key,
        model_type=str(config["model_type"]),
        model_class=named or str(config["model_type"]),
        transformers_version=dict(library_versions())["transformers"],
        rows=rows,
        input_embedding=None,
        output_embedding=None,
        last_parameter_module=rows[-1].module_pattern if rows else "",
        layers_prefix=None,
        num_layers=0,
        supported_attention=tuple(Attention),
        config=MappingProxyType({name: value for name, value in config.items() if isinstance(value, str | int | float)}),
        checkpoint_dtype=_dtype(config) or files.first_dtype,
        is_stored=True,
    )
    return Checkpoint(method=method, files=files, inventory=inventory)


def _dtype(config: Mapping[str, Any]) -> DType | None:
    name = config.get("dtype") or config.get("torch_dtype")
    if not isinstance(name, str) or name == "auto":
        return None
    try:
        return parse_dtype(name)
    except UnknownNameError:
        return None
