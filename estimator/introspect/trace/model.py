"""The model of a recipe, its tensors without content on a make-believe CPU, ready for a step."""

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from estimator.introspect.inventory import attention_tables
from estimator.introspect.prepared import TORCH_DTYPES, quantization_state, quantize, with_adapter
from estimator.introspect.trace.errors import RefusedError
from estimator.precision import kept_in_float32_names
from estimator.recipe import Recipe, Trainer
from estimator.units import ceil_div


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """A model whose tensors are fakes."""

    whole: Any
    """With its adapter."""
    base: Any
    """As transformers built it."""
    layers: Sequence[nn.Module]
    """Decoder layers, in order; empty where the model has no list of them."""
    stored: Mapping[str, Tensor]
    """Every tensor that lies on the device between steps, by name."""

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.whole.parameters() if p.requires_grad]


def traced_model(
    base: Any, recipe: Recipe, layers_prefix: str | None, kept_layers: Sequence[int] | None, mode: FakeTensorMode
) -> TracedModel:
    """Quantize, prepare and adapt a model as a script does, keep some of its layers, and give every tensor a fake.

    Args:
        base: on meta, of the recipe's type, as `build` made it; it is changed.
        layers_prefix: name of the list of decoder layers.
        kept_layers: positions of the layers to keep; all if None.
        mode: under which the fakes live.

    Raises:
        RefusedError: if the libraries refuse the recipe.
    """
    dtype = TORCH_DTYPES[recipe.dtype]
    _switch_cache_off(base, recipe)
    _keep_float32(base, recipe)
    if kept_layers is not None and layers_prefix is not None:
        _drop_layers(base, layers_prefix, kept_layers)
    _choose_attention(base, recipe)
    if recipe.quantization is not None:
        quantize(base, recipe.quantization, dtype)
    whole = base
    if recipe.adapter is not None:
        try:
            whole = with_adapter(base, recipe.adapter, is_prepared=recipe.prepare_for_kbit_training)
        except Exception as error:
            raise RefusedError(f"PEFT: {error}") from error
    _cast_as_trl(whole, recipe)
    if recipe.training is not None:
        whole.train()
        _checkpoint(base, recipe, layers_prefix, kept_layers)
    else:
        whole.eval()
    _materialize(whole, recipe, mode)
    layers = base.get_submodule(layers_prefix) if layers_prefix else ()
    return TracedModel(whole=whole, base=base, layers=list(layers), stored=dict(_stored(whole)))


def _checkpoint(base: Any, recipe: Recipe, layers_prefix: str | None, kept_layers: Sequence[int] | None) -> None:
    """Switches checkpointing on; of the layers that are left, those that would have it in the whole model."""
    training = recipe.training
    assert training is not None
    if not training.gradient_checkpointing:
        return
    every_n = training.checkpoint_every_n_layers
    try:
        base.activation_checkpointing_enable(
            {"use_reentrant": training.use_reentrant}, every_n_layers=every_n if kept_layers is None else 1
        )
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if kept_layers is not None and layers_prefix is not None:
        for index, layer in zip(kept_layers, base.get_submodule(layers_prefix), strict=True):
            layer.gradient_checkpointing = index % every_n == 0


def _switch_cache_off(model: Any, recipe: Recipe) -> None:
    """Of the whole model, as the Trainer does; TRL's argument goes before what the configs of models inside it say.

    Source: transformers, trainer.py, Trainer.__init__; trl, trainer/sft_trainer.py, SFTTrainer.compute_loss.
    """
    model.config.use_cache = False
    if recipe.trainer is Trainer.TRL and recipe.stack.sft_trains_without_cache:
        model.config.get_text_config().use_cache = False


def _keep_float32(model: Any, recipe: Recipe) -> None:
    """What loading leaves in float32 although a 16-bit type was asked for."""
    names = kept_in_float32_names(
        model._keep_in_fp32_modules or (),
        model._keep_in_fp32_modules_strict or (),
        recipe.dtype,
        is_quantized=recipe.quantization is not None,
        stack=recipe.stack,
    )
    for name, parameter in model.named_parameters():
        if names(name):
            parameter.data = parameter.data.float()


def _drop_layers(model: Any, prefix: str, kept: Sequence[int]) -> None:
    """Leaves some layers of the list, and of every list of the config that has one entry per layer; lists of positions get the new ones.

    So do the layers themselves: a cache made from the config finds the keys of each by its `layer_idx`.

    The number of layers in the config stays: tensors that hold something for every layer (Gemma 3n's embeddings) keep their shape.
    """
    parent_name, _, name = prefix.rpartition(".")
    parent = model.get_submodule(parent_name)
    layers = getattr(parent, name)
    number = len(layers)
    setattr(parent, name, nn.ModuleList([layers[i] for i in kept]))
    for new, old in enumerate(kept):
        for module in layers[old].modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = new
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        for field, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == number:
                setattr(config, field, type(value)([value[i] for i in kept]))
    for field, value in list(vars(parent).items()):
        if field.endswith("_layers") and isinstance(value, list) and all(isinstance(i, int) and 0 <= i < number for i in value):
            setattr(parent, field, [new for new, old in enumerate(kept) if old in value])


def _choose_attention(model: Any, recipe: Recipe) -> None:
    """Sets the implementation after the check that would ask for a package: the kernels are ours."""
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation_internal = recipe.attention.value
    for module in model.modules():
        for classes in attention_tables(sys.modules[type(module).__module__]):
            if type(module) not in classes.values():
                continue
            if recipe.attention.value not in classes:
                raise RefusedError(f"{type(module).__name__} has no {recipe.attention.value}; it has {', '.join(classes)}")
            module.__class__ = classes[recipe.attention.value]
            module._flash_attn_uses_top_left_mask = False


def _cast_as_trl(model: Any, recipe: Recipe) -> None:
    """Source: trl 1.16, trainer/sft_trainer.py, SFTTrainer.__init__: trainable parameters of quantized models become bfloat16."""
    quantized = recipe.quantization is not None and recipe.adapter is not None
    if recipe.trainer is not Trainer.TRL or not quantized or recipe.training is None or not recipe.stack.sft_casts_trainable_to_bfloat16:
        return
    for name, parameter in model.named_parameters():
        spared = recipe.stack.sft_leaves_dora_magnitudes and "lora_magnitude_vector" in name
        if parameter.requires_grad and not spared:
            parameter.data = parameter.data.to(torch.bfloat16)


# -- fakes ------------------------------------------------------------------------------------------------------------------------------


def _materialize(model: nn.Module, recipe: Recipe, mode: FakeTensorMode) -> None:
    """Gives every parameter, buffer and other tensor of the model a fake in its place; tied ones stay one."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            _pack_4bit(module, recipe, mode)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            _pack_8bit(module, mode)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and not isinstance(parameter, torch._subclasses.FakeTensor):
                module._parameters[name] = fake(parameter)  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, torch._subclasses.FakeTensor):
                module._buffers[name] = fake(buffer)
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and not isinstance(value, torch._subclasses.FakeTensor):
                object.__setattr__(module, name, fake(value))


def _pack_4bit(module: Any, recipe: Recipe, mode: FakeTensorMode) -> None:
    """The packed weight and its quantization state. Source: bitsandbytes 0.50, backends/cuda/ops.py, quantize_4bit."""
    quantization = recipe.quantization
    assert quantization is not None
    count = module.out_features * module.in_features
    storage = TORCH_DTYPES[quantization.storage_dtype]
    with mode:
        packed = torch.empty((ceil_div(count, 2 * storage.itemsize), 1), dtype=storage)
        module.quant_state = quantization_state(module, quantization, TORCH_DTYPES[recipe.dtype])
        weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.quant_state = module.quant_state
    weight.quant_type = quantization.kind.value
    weight.compress_statistics = quantization.double_quant
    weight.quant_storage = storage
    weight.bnb_quantized = True
    module._parameters["weight"] = weight


def _pack_8bit(module: Any, mode: FakeTensorMode) -> None:
    """Rows of int8 and one scale per row, where the first forward pass leaves them.

    Source: bitsandbytes 0.50, nn/modules.py, Linear8bitLt.init_8bit_state.
    """
    with mode:
        packed = torch.empty((module.out_features, module.in_features), dtype=torch.int8)
        weight: Any = nn.Parameter(packed, requires_grad=False)
        scales = torch.empty(module.out_features, dtype=torch.float32)
    weight.CB, weight.SCB = None, None
    module._parameters["weight"] = weight
    module.state = copy.copy(module.state)
    module.state.CB, module.state.SCB = weight.data, scales
    module.state.has_fp16_weights = False


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything on the device between steps; what a storage is seen under first names it."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        state = getattr(module.weight, "quant_state", None) if isinstance(module, bnb.nn.Linear4bit) else None
        if state is not None:
            parts = {"absmax": state.absmax, "quant_map": state.code}
            if state.nested:
                parts |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code, "offset": state.offset}
            for part, tensor in parts.items():
                yield f"{name}.weight.{part}", tensor
        elif isinstance(module, bnb.nn.Linear8bitLt):
            yield f"{name}.weight.SCB", module.state.SCB
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{name}.{attribute}", value
