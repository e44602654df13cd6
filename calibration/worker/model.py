"""The case's model with random weights, put on the device one tensor at a time, quantized and adapted by the real libraries."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from calibration.case import Case


def build(case: Case, device: torch.device) -> Any:
    """The model as the case's script would have it after loading, before the trainer sees it.

    Its weights are random, unless the case names a checkpoint. The 16-bit base then never exists whole: each weight is made on the device,
    quantized there, and freed before the next one.
    """
    model = _materialized(case, device) if case.checkpoint is None else _loaded(case, case.checkpoint, device)
    if case.request.get("prepare_model_for_kbit_training"):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=_checkpoints(case))
    return model


def _checkpoints(case: Case) -> bool:
    return case.is_training and bool(case.training.get("gradient_checkpointing"))


def adapted(case: Case, model: Any) -> Any:
    """The model with the case's LoRA adapters, or as it is when there are none."""
    config = lora_config(case)
    return model if config is None else get_peft_model(model, config)


def lora_config(case: Case) -> Any:
    """`LoraConfig` of the case, None without `peft`."""
    fields = case.request.get("peft")
    if fields is None:
        return None
    assert isinstance(fields, dict)
    return LoraConfig(**{"task_type": "CAUSAL_LM", **fields})


def _loaded(case: Case, checkpoint: str, device: torch.device) -> Any:
    """The model as `from_pretrained` loads it from the Hub; no code of the checkpoint's is run."""
    name, _, revision = checkpoint.partition("@")
    arguments: dict[str, Any] = {"dtype": case.request.get("dtype") or "auto", "use_safetensors": True}
    if (attention := case.request.get("attn_implementation")) is not None:
        arguments["attn_implementation"] = attention
    if (quantization := _quantization(case)) is not None:
        arguments["quantization_config"] = quantization
    # a card by its number, as scripts name it
    place = (device.index or 0) if device.type == "cuda" else device.type
    return AutoModelForCausalLM.from_pretrained(
        name, revision=revision or "main", config=_config(case), device_map={"": place}, **arguments
    )


def _config(case: Case) -> Any:
    return CONFIG_MAPPING[str(case.config["model_type"])].from_dict(dict(case.config))


def _materialized(case: Case, device: torch.device) -> Any:
    config = _config(case)
    dtype = _dtype(case.request.get("dtype"), config)
    arguments: dict[str, Any] = {"dtype": dtype}
    if (attention := case.request.get("attn_implementation")) is not None:
        arguments["attn_implementation"] = attention
    # buffers are computed for real (rotary frequencies), parameters stay without storage
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **arguments)
    model.tie_weights()
    quantizer = _quantizer(case)
    if quantizer is not None:
        with _default_dtype(dtype):
            quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": device})
    _fill(model, device, dtype, quantizer)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    return model.eval()


def _dtype(name: object, config: Any) -> torch.dtype:
    """What `from_pretrained(dtype=name)` loads: absent and "auto" mean the config's own type, float32 if it has none."""
    if name in (None, "auto"):
        own = config.dtype
        return own if isinstance(own, torch.dtype) else getattr(torch, str(own)) if own else torch.float32
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: {name!r} is no torch dtype")
    return dtype


def _quantization(case: Case) -> Any:
    """`BitsAndBytesConfig` of the case, None without `quantization`."""
    fields = case.request.get("quantization")
    if fields is None:
        return None
    assert isinstance(fields, dict)
    return BitsAndBytesConfig(**fields)


def _quantizer(case: Case) -> Any:
    config = _quantization(case)
    return None if config is None else AutoHfQuantizer.from_config(config, pre_quantized=False)


def _fill(model: Any, device: torch.device, dtype: torch.dtype, quantizer: Any) -> None:
    """Gives every parameter its storage on the device and moves the buffers there."""
    upcast = [re.compile(rf"(^|\.){re.escape(name)}(\.|$)") for name in model._get_dtype_plan(dtype)]
    done: dict[int, torch.nn.Parameter] = {}  # tied parameters are one object and stay so
    for module_name, module in list(model.named_modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in done:
                full_name = f"{module_name}.{name}" if module_name else name
                kept = any(pattern.search(full_name) for pattern in upcast)
                done[id(parameter)] = _stored(model, module, full_name, parameter, torch.float32 if kept else None, device, quantizer)
            module._parameters[name] = done[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _stored(
    model: Any,
    module: torch.nn.Module,
    name: str,
    parameter: torch.nn.Parameter,
    dtype: torch.dtype | None,
    device: torch.device,
    quantizer: Any,
) -> torch.nn.Parameter:
    """One parameter with random content, quantized if the quantizer would quantize it."""
    quantized = quantizer is not None and quantizer.param_needs_quantization(model, name)
    shape = tuple(parameter.shape)
    if quantized and issubclass(getattr(module, "source_cls", torch.nn.Linear), Conv1D):
        shape = shape[::-1]  # as the checkpoint holds it; the quantizer turns it round
    value = torch.empty(shape, dtype=dtype or parameter.dtype, device=device)
    if not value.is_floating_point():
        value.zero_()
    elif value.dim() < 2:
        value.fill_(1.0 if name.endswith("weight") else 0.0)
    else:
        value.normal_(0.0, 0.02)
    if quantized:
        stored: torch.nn.Parameter = quantizer.get_quantize_ops().convert({name: value}, model=model, full_layer_name=name)[name]
        return stored
    return torch.nn.Parameter(value, requires_grad=parameter.requires_grad)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What modules made inside are typed: biases of quantized modules take the load type from here."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
