"""The same tiny model and mode as the estimator is told it: an inventory and a recipe."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch

from estimator.dtypes import DType
from estimator.introspect.inventory import inspect
from estimator.inventory import Inventory
from estimator.recipe import (
    Adapter,
    Attention,
    CacheKind,
    Inference,
    Loss,
    Objective,
    Quantization,
    QuantizationKind,
    Recipe,
    Trainer,
    Training,
)
from estimator.stack import Stack
from tests.oracle.models import Mode, family_of
from tests.oracle.run import mode_of

_DTYPES = {torch.float32: DType.FLOAT32, torch.bfloat16: DType.BFLOAT16, torch.float16: DType.FLOAT16}

# Source: peft 0.21, peft_model.py, PeftModelForSequenceClassification.__init__.
_ADDED = {"SEQ_CLS": ("classifier", "score")}


def inventory(family: str, layers: int, config: Mapping[str, object] | None = None) -> Inventory:
    """The inventory of a tiny model."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in (config or {}).items()}
    return _inventory(family, layers, tuple(sorted(fields.items())))


@lru_cache(maxsize=256)
def _inventory(family: str, layers: int, config: tuple[tuple[str, object], ...]) -> Inventory:
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in config}
    made = family_of(family).config(layers, **fields)
    made.architectures = None
    data = made.to_dict()
    return inspect(data, f"oracle {family} {layers} {config}")


def recipe(
    family: str,
    mode: str | Mode,
    B: int,
    S: int,
    *,
    gc: bool | None = None,
    every_n_layers: int = 1,
    accumulation: int = 1,
    optimizer: str = "adamw_torch_fused",
    weight_decay: float = 0.0,
    padded: bool = False,
    flattened: bool = False,
    attention: str | None = None,
    loss: Loss = Loss.STOCK,
    objective: Objective | None = None,
    written_out: bool = False,
) -> Recipe:
    """What a user would have asked for; arguments as in `run.step`."""
    trained = Training(
        micro_batch_size=B,
        sequence_length=S,
        gradient_accumulation_steps=accumulation,
        optimizer=optimizer,
        weight_decay=weight_decay,
        autocast_dtype=_DTYPES[mode_of(mode).autocast_dtype] if mode_of(mode).autocast else None,
        gradient_checkpointing=gc is not None,
        use_reentrant=bool(gc),
        checkpoint_every_n_layers=every_n_layers,
        padded=padded,
        flattened=flattened,
        loss=loss,
        objective=objective or Objective(),
    )
    asked = replace(loaded(family, mode, attention=attention), training=trained)
    return replace(asked, compute_capability=(7, 5)) if written_out else asked


def generation(
    family: str,
    mode: str | Mode,
    B: int,
    prompt: int,
    new: int,
    *,
    cache: str = "dynamic",
    padded: bool = False,
    attention: str | None = None,
) -> Recipe:
    """The same for text to be generated; arguments as in `generate.generate`."""
    asked = Inference(batch_size=B, prompt_length=prompt, max_new_tokens=new, cache=CacheKind(cache), padded=padded)
    return replace(loaded(family, mode, attention=attention), inference=asked)


def loaded(family: str, mode: str | Mode, *, attention: str | None = None) -> Recipe:
    """The model as it is loaded, before anything runs."""
    mode = mode_of(mode)
    adapter = None
    if mode.adapter is not None:
        targets = mode.adapter.targets
        adapter = Adapter(
            r=mode.adapter.r,
            target_modules=targets,
            target_parameters=mode.adapter.target_parameters,
            dropout=mode.adapter.dropout,
            use_dora=mode.adapter.dora,
            use_rslora=mode.adapter.rslora,
            lora_bias=mode.adapter.lora_bias,
            bias=mode.adapter.bias,
            modules_to_save=mode.adapter.modules_to_save + _ADDED.get(mode.adapter.task_type, ()),
            trainable_token_indices=mode.adapter.trained_tokens,
            autocast_adapter_dtype=mode.autocasts_adapter,
        )
    quantization = None
    if mode.quant is not None:
        quantization = Quantization(
            kind=QuantizationKind(mode.quant), double_quant=mode.double_quant, compute_dtype=_DTYPES[mode.compute_dtype]
        )
    return Recipe(
        dtype=_DTYPES[mode.load_dtype],
        attention=Attention(attention or family_of(family).attention),
        quantization=quantization,
        adapter=adapter,
        prepare_for_kbit_training=mode.prepared,
        trainer=Trainer.TRL if mode.is_cast_by_trl else Trainer.TRANSFORMERS,
        stack=Stack(),
    )
