"""A model as a training script has it before its first step: loaded, quantized, prepared and adapted by the real libraries, on meta."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from estimator.dtypes import DType
from estimator.recipe import Adapter, Quantization, QuantizationKind
from estimator.units import ceil_div

TORCH_DTYPES: dict[DType, torch.dtype] = {dtype: getattr(torch, dtype.value) for dtype in DType}

_BLOCK = 64
_NESTED_BLOCK = 256


def quantize(model: Any, quantization: Quantization, dtype: torch.dtype) -> None:
    """What the bitsandbytes quantizers do to a model, being loaded as `dtype`, before its weights are.

    Source: transformers, quantizers/quantizer_bnb_4bit.py and quantizer_bnb_8bit.py, _process_model_before_weight_loading;
    quantizers/base.py, HfQuantizer.postprocess_model.
    """
    is_4bit = quantization.kind.is_4bit
    config = BitsAndBytesConfig(
        load_in_4bit=is_4bit,
        load_in_8bit=not is_4bit,
        bnb_4bit_quant_type="nf4" if quantization.kind is QuantizationKind.NF4 else "fp4",
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=quantization.compute_dtype.value,
        bnb_4bit_quant_storage=quantization.storage_dtype.value,
        llm_int8_threshold=quantization.threshold,
        llm_int8_skip_modules=list(quantization.skip_modules) if quantization.skip_modules is not None else None,
    )
    skipped = HfQuantizer.get_modules_to_not_convert(model, config.llm_int8_skip_modules, model._keep_in_fp32_modules)
    # Told to be quantized already, so that weights on meta have the types they will be stored in; biases take the default type.
    with _default_dtype(dtype):
        replace_with_bnb_linear(model, skipped, config, pre_quantized=True)
    model.tie_weights(recompute_mapping=False)
    for module in model.modules():
        # DoRA unpacks the weights when it begins, with what loading would have made beside them. Packed, they are one column: a single
        # row would be taken for one that is to be transposed (bitsandbytes, functional.py, dequantize_4bit).
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.data = module.weight.data.reshape(-1, 1)
            with torch.device("meta"):
                module.weight.quant_state = quantization_state(module, quantization, dtype)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            module.weight.SCB = torch.empty(module.out_features, device="meta")
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = is_4bit, not is_4bit
    model.is_quantized, model.quantization_method = True, config.quant_method
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True  # models that use a weight outside its module ask for it


def quantization_state(module: Any, quantization: Quantization, dtype: torch.dtype) -> QuantState:
    """What is kept beside the packed weight of a 4-bit layer, on the device that is the default.

    Args:
        dtype: of the weight before it was packed.

    Source: bitsandbytes 0.50, functional.py, quantize_4bit; backends/cuda/ops.py, quantize_4bit.
    """
    blocks = ceil_div(module.out_features * module.in_features, _BLOCK)
    nested = None
    if quantization.double_quant:
        nested = QuantState(
            absmax=torch.empty(ceil_div(blocks, _NESTED_BLOCK), dtype=torch.float32),
            blocksize=_NESTED_BLOCK,
            code=torch.empty(256, dtype=torch.float32),
            dtype=torch.float32,
        )
    return QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((module.out_features, module.in_features)),
        dtype=dtype,
        blocksize=_BLOCK,
        code=torch.empty(16, dtype=torch.float32),
        quant_type=quantization.kind.value,
        offset=torch.empty((), dtype=torch.float32) if nested else None,
        state2=nested,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
    """What a training script does to a loaded model: PEFT's preparation, where asked, and its adapter."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        if is_prepared:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        adapted = get_peft_model(model, lora_config(adapter), autocast_adapter_dtype=adapter.autocast_adapter_dtype)
    if not adapter.autocast_adapter_dtype:
        _cast_to_base_dtype(adapted)
    return adapted


def _cast_to_base_dtype(model: Any) -> None:
    """Gives adapters the type of the layer they stand on, which PEFT does everywhere but on meta.

    Source: peft 0.21, tuners/tuners_utils.py, BaseTunerLayer._move_adapter_to_device_of_base_layer.
    """
    for module in model.modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        _, dtype = module._get_base_layer_device_and_dtype(module.get_base_layer())
        if dtype is not None and dtype.is_floating_point:
            for name in (*module.adapter_layer_names, *module.other_param_names):
                held = getattr(module, name, None)
                for parameter in held.parameters() if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) else ():
                    parameter.data = parameter.data.to(dtype)
