"""A request against a model: every default resolved as the libraries of the asked versions would."""

from collections.abc import Mapping

from app.card import Card
from app.parallel import resolve_parallel
from app.reading import read_quantization
from app.regex import check_pattern, check_patterns
from app.request import HardwareFields, PeftFields, QuantizationFields, Request
from app.training import check_length, resolve_training
from app.versions import stack_of
from estimator.dtypes import DType, parse_dtype
from estimator.errors import RequestError, UnknownNameError
from estimator.gpus import Vendor
from estimator.inventory import Inventory
from estimator.recipe import Adapter, Attention, CacheKind, Inference, Quantization, QuantizationKind, Recipe, Trainer
from estimator.stack import Stack

# What is assumed about a card that is not named: an A100, the oldest with native bfloat16.
DEFAULT_COMPUTE_CAPABILITY = (8, 0)
DEFAULT_NUM_MULTIPROCESSORS = 108

_SWITCHES = {"load_in_4bit", "load_in_8bit"}
_COMPUTE_DTYPES = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
_LOAD_DTYPES = (*_COMPUTE_DTYPES, DType.FLOAT64)
_STORAGE_DTYPES = (DType.UINT8, DType.INT8, *_LOAD_DTYPES)


def resolve_recipe(request: Request, inventory: Inventory, card: Card | None) -> Recipe:
    """The recipe that the request means for this model.

    Args:
        request: as the user gave it.
        inventory: of the model it names.
        card: that it runs on; None when it is not known.

    Raises:
        RequestError: if the request contradicts itself, the model or the libraries.
    """
    stack = stack_of(request.stack)
    trainer = Trainer(request.trainer)
    if request.training is not None and request.inference is not None:
        raise RequestError("training: give either training or inference, not both", field="training")
    _check_hardware(request.hardware)
    _check_stored(request, inventory)
    quantization = resolve_quantization(request.quantization, inventory)
    adapter = resolve_adapter(request.peft, inventory)
    if request.training is not None and quantization is not None and adapter is None:
        raise RequestError(
            "peft: a purely quantized model cannot be fine-tuned (transformers refuses it); give the fields of a LoraConfig", field="peft"
        )
    prepare = request.prepare_model_for_kbit_training
    if prepare is None:
        prepare = trainer is Trainer.TRL and stack.sft_prepares_for_kbit_training and None not in (quantization, adapter, request.training)
    return Recipe(
        dtype=resolve_dtype(request, inventory, stack, quantized=quantization is not None),
        attention=resolve_attention(request.attn_implementation, inventory),
        quantization=quantization,
        adapter=adapter,
        prepare_for_kbit_training=prepare,
        trainer=trainer,
        training=resolve_training(request, inventory, stack, prepared=prepare) if request.training is not None else None,
        inference=_inference(request, inventory) if request.inference is not None else None,
        compute_capability=(card.compute_capability if card is not None else None) or DEFAULT_COMPUTE_CAPABILITY,
        vendor=card.vendor if card is not None else Vendor.NVIDIA,
        num_multiprocessors=(card.num_multiprocessors if card is not None else None) or DEFAULT_NUM_MULTIPROCESSORS,
        parallel=resolve_parallel(request, inventory),
        stack=stack,
    )


def _check_stored(request: Request, inventory: Inventory) -> None:
    """Which modules are linear, a checkpoint's files do not tell: neither what would be quantized nor what would be adapted is known."""
    for field, asked in (("quantization", request.quantization), ("peft", request.peft)):
        if inventory.is_stored and asked is not None and not (field == "quantization" and _is_switched_off(request.quantization)):
            raise RequestError(
                f"{field}: of {inventory.model_class} only the tensors of its files are known, and not its modules; accepted: null",
                field=field,
            )


def resolve_dtype(request: Request, inventory: Inventory, stack: Stack, *, quantized: bool) -> DType:
    """What the weights are loaded as.

    Source: see `Stack.loads_checkpoint_dtype_by_default`, `loads_quantized_float16_by_default`, `sft_loads_ids_in_float32`.
    """
    checkpoint = inventory.checkpoint_dtype or DType.FLOAT32
    if request.dtype == "auto":
        return checkpoint
    if request.dtype is not None:
        return _one_of("dtype", request.dtype, _LOAD_DTYPES, "auto")
    if request.training is not None and request.trainer == "trl" and stack.sft_loads_ids_in_float32:
        return DType.FLOAT32
    if stack.loads_checkpoint_dtype_by_default:
        return checkpoint
    return DType.FLOAT16 if quantized and stack.loads_quantized_float16_by_default else DType.FLOAT32


def resolve_attention(asked: str | None, inventory: Inventory) -> Attention:
    """The attention implementation, or a refusal of what the class would refuse."""
    name = asked if asked is not None else inventory.default_attention
    supported = [a for a in inventory.supported_attention if a in set(Attention)]
    if name not in set(Attention) or (asked is not None and name not in inventory.supported_attention):
        raise UnknownNameError.of("attn_implementation", name, supported)
    return Attention(name)


def resolve_quantization(asked: QuantizationFields | None, inventory: Inventory) -> Quantization | None:
    """The quantization asked for, or the checkpoint's own; both at once only if they agree."""
    own = inventory.config.get("quantization_config")
    method = own.get("quant_method") if isinstance(own, Mapping) else None
    given = _quantization(asked) if asked is not None and not _is_switched_off(asked) else None
    if not isinstance(own, Mapping):
        return given
    if method != "bitsandbytes":
        if given is not None:
            raise RequestError(
                f"quantization: the checkpoint is quantized with {method} and cannot be loaded with bitsandbytes on top; accepted: null",
                field="quantization",
            )
        return None
    stored = _quantization(read_quantization(own))
    if given is not None and given != stored:
        raise RequestError(
            "quantization: differs from the checkpoint's own quantization_config; accepted: null, or the same", field="quantization"
        )
    return stored


def _is_switched_off(asked: QuantizationFields | None) -> bool:
    """Whether switches, and nothing else, are given, and none is on: what a script writes that can do without."""
    if asked is None or not asked.model_fields_set:
        return False
    return asked.model_fields_set <= _SWITCHES and not (asked.load_in_4bit or asked.load_in_8bit)


def _quantization(asked: QuantizationFields) -> Quantization:
    if asked.load_in_4bit and asked.load_in_8bit:
        raise RequestError(
            "quantization.load_in_8bit: only one of load_in_4bit and load_in_8bit can be true", field="quantization.load_in_8bit"
        )
    if not asked.load_in_4bit and not asked.load_in_8bit:
        # Source: transformers, quantizers/auto.py, AutoHfQuantizer.from_config: what is not 8 bits is taken for 4.
        raise RequestError(
            "quantization: neither load_in_4bit nor load_in_8bit is true, which transformers takes for 4 bits; accepted: one of them true, "
            "or quantization null",
            field="quantization",
        )
    skip = asked.llm_int8_skip_modules
    return Quantization(
        kind=QuantizationKind(asked.bnb_4bit_quant_type) if asked.load_in_4bit else QuantizationKind.INT8,
        double_quant=asked.load_in_4bit and asked.bnb_4bit_use_double_quant,
        compute_dtype=_one_of("quantization.bnb_4bit_compute_dtype", asked.bnb_4bit_compute_dtype, _COMPUTE_DTYPES),
        storage_dtype=_one_of("quantization.bnb_4bit_quant_storage", asked.bnb_4bit_quant_storage, _STORAGE_DTYPES),
        skip_modules=None if skip is None else check_patterns("quantization.llm_int8_skip_modules", skip),
        threshold=asked.llm_int8_threshold,
    )


def _one_of(field: str, name: str, accepted: tuple[DType, ...], *others: str) -> DType:
    try:
        dtype = parse_dtype(name, field)
    except UnknownNameError:
        dtype = None
    if dtype not in accepted:
        raise UnknownNameError.of(field, name, [*others, *accepted])
    return dtype


def resolve_adapter(asked: PeftFields | None, inventory: Inventory) -> Adapter | None:
    """The LoRA adapter, its patterns checked."""
    if asked is None:
        return None
    layers = asked.layers_to_transform
    pattern = asked.layers_pattern
    return Adapter(
        r=asked.r,
        target_modules=_modules("peft.target_modules", asked.target_modules),
        exclude_modules=_modules("peft.exclude_modules", asked.exclude_modules),
        target_parameters=tuple(asked.target_parameters or ()),
        dropout=asked.lora_dropout,
        use_dora=asked.use_dora,
        use_rslora=asked.use_rslora,
        bias=asked.bias,
        lora_bias=asked.lora_bias,
        modules_to_save=tuple(asked.modules_to_save or ()),
        rank_pattern=tuple((check_pattern("peft.rank_pattern", k), v) for k, v in (asked.rank_pattern or {}).items()),
        layers_to_transform=(layers,) if isinstance(layers, int) else None if layers is None else tuple(layers),
        layers_pattern=check_patterns("peft.layers_pattern", [pattern] if isinstance(pattern, str) else pattern or ()),
        trainable_token_indices=_token_indices(asked, inventory),
    )


def _modules(field: str, asked: list[str] | str | None) -> tuple[str, ...] | str | None:
    if asked is None or asked == "all-linear":
        return asked if isinstance(asked, str) else None
    return check_pattern(field, asked) if isinstance(asked, str) else tuple(asked)


def _token_indices(asked: PeftFields, inventory: Inventory) -> tuple[tuple[str, int], ...]:
    indices = asked.trainable_token_indices
    if not indices:
        return ()
    if isinstance(indices, dict):
        return tuple((name, len(set(tokens))) for name, tokens in indices.items())
    if inventory.input_embedding is None:
        raise RequestError("peft.trainable_token_indices: the model has no input embedding", field="peft.trainable_token_indices")
    return ((inventory.input_embedding.rpartition(".")[2], len(set(indices))),)


def _inference(request: Request, inventory: Inventory) -> Inference:
    asked = request.inference
    assert asked is not None
    check_length("inference.prompt_length + inference.max_new_tokens", asked.prompt_length + asked.max_new_tokens, inventory)
    return Inference(
        batch_size=asked.batch_size,
        prompt_length=asked.prompt_length,
        max_new_tokens=asked.max_new_tokens,
        cache=CacheKind(asked.cache_implementation),
        padded=request.padded,
    )


def _check_hardware(hardware: HardwareFields | None) -> None:
    if hardware is None:
        return
    if hardware.gpu is not None and hardware.capacity_gib is not None:
        raise RequestError("hardware.capacity_gib: give either gpu or capacity_gib, not both", field="hardware.capacity_gib")
    if hardware.filter is not None and (hardware.gpu, hardware.capacity_gib, hardware.nvidia_smi) != (None, None, None):
        raise RequestError("hardware.filter: give either one card or a filter, not both", field="hardware.filter")
    if hardware.nvidia_smi is not None and (hardware.gpu is not None or hardware.capacity_gib is not None):
        raise RequestError("hardware.nvidia_smi: give either a card or what nvidia-smi prints, not both", field="hardware.nvidia_smi")
