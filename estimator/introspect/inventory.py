"""The inventory of a model, asked of the framework."""

import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from estimator.dtypes import DType, parse_dtype
from estimator.errors import UnknownNameError
from estimator.introspect import facts
from estimator.introspect.build import build
from estimator.introspect.errors import BuildError
from estimator.inventory import Inventory, ModuleKind, TensorRole
from estimator.inventory_codec import encode
from estimator.rows import Tensor, group


def inventory_task(payload: Mapping[str, Any]) -> dict[str, object]:
    """The worker's task `inventory`: `{"config": …, "content_hash": …}` → an encoded inventory."""
    return encode(inspect(payload["config"], payload["content_hash"]))


def inspect(data: Mapping[str, Any], content_hash: str) -> Inventory:
    """Every tensor transformers would create for a config.

    Built twice on the meta device, under float32 and under bfloat16: a tensor that is the same under both has its type fixed by its module.

    Raises:
        BuildError: if transformers cannot build the model, or its `dtype` is none of torch's.
    """
    auto_class, model = build(data)
    _, half = build(data, torch.bfloat16)
    text_config = _text_config(model)
    config = facts.resolved(model.config, text_config)
    config["auto_class"] = auto_class
    if isinstance(data.get("quantization_config"), Mapping):
        config["quantization_config"] = facts.scalars(data["quantization_config"])
    layers_prefix, num_layers = _layers(model, text_config)
    parameter_names = [name for name, _ in model.named_parameters()]
    declared_ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return Inventory(
        content_hash=content_hash,
        model_type=text_config.model_type or model.config.model_type,
        model_class=type(model).__name__,
        transformers_version=transformers.__version__,
        rows=group([*_parameters(model, half), *_buffers(model, half)]),
        input_embedding=_name_of(model, "get_input_embeddings"),
        output_embedding=_name_of(model, "get_output_embeddings"),
        last_parameter_module=parameter_names[-1].rpartition(".")[0],
        layers_prefix=layers_prefix,
        num_layers=num_layers,
        keep_in_fp32_modules=tuple(sorted(model._keep_in_fp32_modules or ())),
        keep_in_fp32_modules_strict=tuple(sorted(model._keep_in_fp32_modules_strict or ())),
        tied_names=tuple(sorted({*declared_ties, *declared_ties.values()})),
        supported_attention=_supported_attention(model),
        default_attention=text_config._attn_implementation or model.config._attn_implementation or "eager",
        config=MappingProxyType(config),
        checkpoint_dtype=_checkpoint_dtype(data),
    )


def _text_config(model: Any) -> Any:
    try:
        # Without `decoder=True`: for flat encoder-decoder configs that returns a copy with fields renamed.
        found = model.config.get_text_config()
    except ValueError:  # several text parts, none of them "the" decoder
        return model.config
    return found if hasattr(found, "model_type") else model.config


def _parameters(model: Any, half: Any) -> Iterator[Tensor]:
    seen: dict[int, str] = {}
    others = dict(half.named_parameters(remove_duplicate=False))
    for module_name, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{module_name}.{leaf}".removeprefix(".")
                yield _tensor(name, module, parameter, others[name], TensorRole.PARAMETER, seen)


def _buffers(model: Any, half: Any) -> Iterator[Tensor]:
    seen: dict[int, str] = {}
    others = dict(half.named_buffers(remove_duplicate=False))
    for module_name, module in model.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                name = f"{module_name}.{leaf}".removeprefix(".")
                transient = leaf in module._non_persistent_buffers_set
                role = TensorRole.NONPERSISTENT_BUFFER if transient else TensorRole.BUFFER
                yield _tensor(name, module, buffer, others[name], role, seen)


def _tensor(name: str, module: Any, tensor: Any, other: Any, role: TensorRole, seen: dict[int, str]) -> Tensor:
    first = seen.setdefault(id(tensor), name)
    return Tensor(
        name=name,
        shape=tuple(tensor.shape),
        dtype=parse_dtype(str(tensor.dtype), name),
        role=role,
        module_kind=_kind(module),
        module_class=type(module).__name__,
        tied_to=None if first == name else first,
        dtype_is_fixed=tensor.is_floating_point() and tensor.dtype == other.dtype,
        is_frozen=role is TensorRole.PARAMETER and not tensor.requires_grad,
    )


def _kind(module: Any) -> ModuleKind:
    if type(module) is nn.Linear:
        return ModuleKind.LINEAR
    if isinstance(module, Conv1D):
        return ModuleKind.CONV1D
    return ModuleKind.EMBEDDING if isinstance(module, nn.Embedding) else ModuleKind.OTHER


def _name_of(model: Any, getter: str) -> str | None:
    """Name of the module that an accessor of the model returns; None where the class has none."""
    try:
        wanted = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    return next((name for name, module in model.named_modules() if wanted is not None and module is wanted), None)


def _layers(model: Any, text_config: Any) -> tuple[str | None, int]:
    """Name and length of the list of decoder layers.

    Within the decoder: of the outermost lists those as long as the config says, of these the one that holds most parameters.
    """
    num_layers = int(getattr(text_config, "num_hidden_layers", 0) or 0)
    decoder = _decoder(model)
    lists = _outermost_lists(decoder)
    if not lists:
        decoder, lists = model, _outermost_lists(model)
    if not lists:
        return None, num_layers
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    candidates = {name: module for name, module in lists.items() if len(module) == num_layers} or lists
    name = max(candidates, key=lambda name: sum(parameter.numel() for parameter in candidates[name].parameters()))
    return f"{prefix}.{name}".removeprefix("."), len(candidates[name])


def _outermost_lists(module: Any) -> dict[str, nn.ModuleList]:
    lists: dict[str, nn.ModuleList] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = child
    return lists


def _decoder(model: Any) -> Any:
    try:
        found = model.get_decoder()
    except (AttributeError, NotImplementedError):
        return model
    return found if isinstance(found, nn.Module) else model


def _supported_attention(model: Any) -> tuple[str, ...]:
    """`attn_implementation` values that the class accepts, whatever is installed here.

    Source: transformers, modeling_utils.py, PreTrainedModel._check_and_adjust_attn_implementation and the `_…_can_dispatch` methods;
    gpt-oss and others replace flash_attention_2 and 3 by a kernel of their own that keeps the same tensors.
    """
    names = ["eager"]
    if model._supports_sdpa:
        names.append("sdpa")
    if model._supports_flash_attn:
        names += ["flash_attention_2", "flash_attention_3"]
    if model._supports_flex_attn:
        names.append("flex_attention")
    tables = [t for m in model.modules() for t in attention_tables(sys.modules[type(m).__module__]) if type(m) in t.values()]
    return tuple(name for name in names if all(name in table for table in tables))


def attention_tables(file: ModuleType) -> list[dict[str, type]]:
    """By implementation, the classes of which a model takes one when it is made, in files older than attention functions.

    Source: transformers, falcon/modeling_falcon.py, FALCON_ATTENTION_CLASSES; gptj, gpt_neo and git have theirs.
    """
    return [v for k, v in vars(file).items() if k.endswith("_ATTENTION_CLASSES") and isinstance(v, dict)]


def _checkpoint_dtype(data: Mapping[str, Any]) -> DType | None:
    parts = [data, *(data[part] for part in ("text_config", "llm_config") if isinstance(data.get(part), Mapping))]
    for part in parts:
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str) and name != "auto":
            try:
                return parse_dtype(name)
            except UnknownNameError as error:
                raise BuildError("config", error.message) from None
    return None
