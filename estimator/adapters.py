"""The tensors that PEFT adds to a model: LoRA matrices, DoRA magnitudes, trained copies of modules, trained tokens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from estimator.adapter_targets import Matcher, ModuleNames, Targets, no_match, refuse_mamba, resolve
from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.inventory import Inventory, ModuleKind, TensorRole
from estimator.patterns import Indices, copies, leaf, parent, partition
from estimator.phases import Item
from estimator.quantization import is_linear
from estimator.recipe import Adapter, Quantization
from estimator.stack import Stack
from estimator.storage import StoredTensor

# Fused experts that keep (experts, in, out); all others keep (experts, out, in).
# Source: transformers 5.23, `use_experts_implementation(is_transposed=True)` in models/{gpt_oss,aria,openai_privacy_filter}.
TRANSPOSED_EXPERTS = frozenset({"GptOssExperts", "AriaExperts", "OpenAIPrivacyFilterExperts"})

# Source: peft, tuners/lora/layer.py, dispatch_default.
_CONVOLUTIONS = frozenset({"Conv1d", "Conv2d", "Conv3d"})

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The model an adapter is put on, as it lies in memory, with the names PEFT matches against."""

    names: ModuleNames
    tensors: tuple[StoredTensor, ...]
    """Parameters as stored, tied ones included: PEFT adapts a tied head apart from the embedding."""
    own: frozenset[str]
    """Patterns with storage of their own."""


def lora_matrices(in_features: int, out_features: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A (r, in) and B (out, r): r·(in + out) scalars.

    Source: peft, tuners/lora/layer.py, LoraLayer.update_layer.
    """
    return (rank, in_features), (out_features, rank)


def expert_matrices(shape: tuple[int, ...], rank: int, *, is_transposed: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A (r·E, in) and B (out, r·E) for one parameter: r·E·(in + out) scalars.

    Args:
        shape: (E, out, in), or (E, in, out) if transposed, or (out, in) of a parameter without experts.
        rank: rank per expert.
        is_transposed: whether the experts keep (E, in, out).

    Raises:
        RequestError: if the parameter has neither two nor three dimensions.

    Source: peft, tuners/lora/layer.py, ParamWrapper._get_in_out_features and update_layer.
    """
    match shape:
        case (out, inner):
            return (rank, inner), (out, rank)
        case (experts, inner, out) if is_transposed:
            return (rank * experts, inner), (out, rank * experts)
        case (experts, out, inner):
            return (rank * experts, inner), (out, rank * experts)
        case _:
            raise RequestError(
                f"peft.target_parameters: a parameter of shape {shape} cannot be adapted, only 2 or 3 dimensions can",
                field="peft.target_parameters",
            )


def adapter_dtype(base: DType, *, autocast: bool, compute_dtype: DType | None = None) -> DType:
    """Type of a LoRA matrix.

    It is created in the type of the base weight (for a 4-bit weight its compute type, for int8 float32), and 16-bit types are
    then raised to float32 unless `autocast_adapter_dtype=False`.

    Args:
        base: type of the base weight's storage.
        autocast: `autocast_adapter_dtype`.
        compute_dtype: compute type of a 4-bit base weight, None for others.

    Source: peft, tuners/tuners_utils.py, BaseTunerLayer._move_adapter_to_device_of_base_layer and cast_adapter_dtype.
    """
    created = compute_dtype or (base if base.is_floating_point else DType.FLOAT32)
    return DType.FLOAT32 if autocast and created.itemsize < DType.FLOAT32.itemsize else created


def adapter_tensors(
    adapter: Adapter, base: Base, quantization: Quantization | None, stack: Stack, load_dtype: DType
) -> tuple[tuple[StoredTensor, ...], tuple[tuple[str, Indices], ...]]:
    """Everything PEFT adds, and which modules it adapted.

    Args:
        adapter: the user's choices.
        base: the model as it lies in memory when `get_peft_model` is called.
        quantization: how its packed weights are stored.
        stack: library versions.
        load_dtype: what packed weights are dequantized to.

    Returns:
        the added tensors, trainable unless they are buffers, and (pattern, indices) of the adapted modules.

    Raises:
        RequestError: if PEFT would refuse the adapter on this model.
    """
    targets = resolve(adapter, base.names, rewrites_experts=stack.rewrites_expert_targets)
    matcher = Matcher(adapter, targets)
    _check(adapter, base, matcher, targets)
    added: list[StoredTensor] = []
    adapted: list[tuple[str, Indices]] = []
    for weight in base.tensors:
        if _is_adaptable(weight):
            for rank, indices in partition(
                parent(weight.pattern), weight.indices, lambda name: matcher.rank(name) if matcher.matches(name) else 0
            ):
                if rank:
                    piece = replace(weight, indices=indices)
                    added += _module_adapter(adapter, piece, rank, quantization, load_dtype)
                    adapted.append((parent(weight.pattern), indices))
        if targets.parameters:
            added += _parameter_adapters(adapter, weight, matcher)
    if not added:
        raise no_match(adapter, base.names)
    _refuse_adapted(adapter, {name for pattern, indices in adapted for _, name in copies(pattern, indices)})
    added += _saved_copies(adapter, base)
    added += _trained_tokens(adapter, base)
    return tuple(added), tuple(adapted)


def _is_adaptable(weight: StoredTensor) -> bool:
    is_matrix = _is_linear(weight) or weight.module_kind is ModuleKind.EMBEDDING
    return leaf(weight.pattern) == "weight" and (is_matrix or _is_convolution(weight))


def _is_linear(weight: StoredTensor) -> bool:
    return weight.module_kind is ModuleKind.CONV1D or is_linear(weight.module_kind, weight.module_class)


def _is_convolution(weight: StoredTensor) -> bool:
    """Whether it is a convolution over all its input channels; groups cannot be told from the shape of a depthwise one."""
    return weight.module_class in _CONVOLUTIONS and (weight.shape[1] > 1 or weight.shape[0] == 1)


def _module_adapter(
    adapter: Adapter, weight: StoredTensor, rank: int, quantization: Quantization | None, load_dtype: DType
) -> Iterator[StoredTensor]:
    """LoRA on one kind of module. A convolution gets A with its kernel, and a pointwise B.

    Source: peft, tuners/lora/layer.py, Linear, Embedding and _ConvNd; tuners/lora/dora.py, DoraLinearLayer.update_layer.
    """
    module = parent(weight.pattern)
    is_4bit = weight.quantization is not None and weight.quantization.is_4bit
    compute = quantization.compute_dtype if quantization is not None and is_4bit else None
    dtype = adapter_dtype(weight.dtype, autocast=adapter.autocast_adapter_dtype, compute_dtype=compute)
    created = adapter_dtype(weight.dtype, autocast=False, compute_dtype=compute)
    if weight.module_kind is ModuleKind.EMBEDDING:
        rows, width = weight.shape  # (V, h)
        out_features = width
        yield _added(weight, f"{module}.lora_embedding_A", (rank, rows), dtype, ModuleKind.OTHER)
        yield _added(weight, f"{module}.lora_embedding_B", (width, rank), dtype, ModuleKind.OTHER)
    elif _is_convolution(weight):
        out_features, in_channels, *kernel = weight.shape
        ones = [1] * len(kernel)
        yield _added(weight, f"{module}.lora_A.weight", (rank, in_channels, *kernel), dtype, ModuleKind.OTHER)
        yield _added(weight, f"{module}.lora_B.weight", (out_features, rank, *ones), dtype, ModuleKind.OTHER)
        if adapter.lora_bias:
            yield _added(weight, f"{module}.lora_B.bias", (out_features,), dtype, ModuleKind.OTHER)
    else:
        first, second = weight.shape
        in_features, out_features = (first, second) if weight.module_kind is ModuleKind.CONV1D else (second, first)
        a, b = lora_matrices(in_features, out_features, rank)
        yield _added(weight, f"{module}.lora_A.weight", a, dtype, ModuleKind.LINEAR)
        yield _added(weight, f"{module}.lora_B.weight", b, dtype, ModuleKind.LINEAR)
        if adapter.lora_bias:
            yield _added(weight, f"{module}.lora_B.bias", (out_features,), dtype, ModuleKind.LINEAR)
    if adapter.use_dora:
        # The norm of base + B·A, in the wider of the two types, then raised like the matrices.
        dequantized = load_dtype if is_4bit else DType.FLOAT32 if weight.quantization is not None else weight.dtype
        norm = created if dequantized is created else DType.FLOAT32
        magnitude = adapter_dtype(norm, autocast=adapter.autocast_adapter_dtype)
        yield _added(weight, f"{module}.{MAGNITUDE}.weight", (out_features,), magnitude, ModuleKind.OTHER)


def _parameter_adapters(adapter: Adapter, weight: StoredTensor, matcher: Matcher) -> Iterator[StoredTensor]:
    """LoRA on one kind of parameter (`target_parameters`)."""
    for rank, indices in partition(
        weight.pattern, weight.indices, lambda name: matcher.rank(name) if matcher.matches_parameter(name) else 0
    ):
        if not rank:
            continue
        if weight.quantization is not None:
            raise RequestError(
                f"peft.target_parameters: {weight.pattern} is packed by bitsandbytes and cannot be adapted so; use target_modules",
                field="peft.target_parameters",
            )
        if adapter.dropout or adapter.use_dora or adapter.lora_bias:
            which = "lora_dropout" if adapter.dropout else "use_dora" if adapter.use_dora else "lora_bias"
            raise RequestError(
                f"peft.{which}: PEFT refuses it for adapters on parameters, here {weight.pattern}; leave it unset or do not target experts",
                field=f"peft.{which}",
            )
        dtype = adapter_dtype(weight.dtype, autocast=adapter.autocast_adapter_dtype)
        a, b = expert_matrices(weight.shape, rank, is_transposed=weight.module_class in TRANSPOSED_EXPERTS)
        piece = replace(weight, indices=indices)
        yield _added(piece, f"{weight.pattern}.lora_A.weight", a, dtype, ModuleKind.LINEAR)
        yield _added(piece, f"{weight.pattern}.lora_B.weight", b, dtype, ModuleKind.LINEAR)


def _saved_copies(adapter: Adapter, base: Base) -> Iterator[StoredTensor]:
    """`modules_to_save`: a trained copy beside each frozen original, of a tied module too.

    A name counts if any module on the way to the tensor ends with it, with or without a dot before.

    Source: peft, utils/other.py, _set_trainable and ModulesToSaveWrapper.update.
    """
    if not adapter.modules_to_save:
        return
    for weight in base.tensors:
        for is_saved, indices in partition(parent(weight.pattern), weight.indices, lambda name: _ends_with(name, adapter.modules_to_save)):
            if not is_saved:
                continue
            if weight.quantization is not None:
                raise RequestError(
                    f"peft.modules_to_save: {parent(weight.pattern)} is quantized, so that a copy cannot be trained; "
                    "name it in llm_int8_skip_modules too",
                    field="peft.modules_to_save",
                )
            pattern = f"{parent(weight.pattern)}.modules_to_save.{leaf(weight.pattern)}"
            copied = replace(weight, pattern=pattern, indices=indices)
            yield copied if copied.item is Item.BUFFERS else replace(copied, item=Item.ADAPTER_WEIGHTS, trainable=True)


def _trained_tokens(adapter: Adapter, base: Base) -> Iterator[StoredTensor]:
    """`trainable_token_indices`: the rows of those tokens, once to train and once as they were.

    Of tied modules named one by one, the one without storage of its own uses the other's.

    Raises:
        RequestError: if a name matches no module with a weight of two dimensions.

    Source: peft, tuners/trainable_tokens/layer.py, TrainableTokensLayer.update_layer.
    """
    named = {
        module: [w for w in base.tensors if leaf(w.pattern) == "weight" and parent(w.pattern).endswith(module)]
        for module, _ in adapter.trainable_token_indices
    }
    owners = {module for module, weights in named.items() if any(weight.pattern in base.own for weight in weights)}
    for module, num_tokens in adapter.trainable_token_indices:
        if not named[module]:
            raise RequestError(f"peft.trainable_token_indices: no module is named {module!r}", field="peft.trainable_token_indices")
        for weight in named[module]:
            if owners - {module} and weight.pattern not in base.own:
                continue
            dtype = adapter_dtype(weight.dtype, autocast=adapter.autocast_adapter_dtype)
            shape = (num_tokens, weight.shape[1])
            name = parent(weight.pattern)
            yield _added(weight, f"{name}.trainable_tokens_delta", shape, dtype, ModuleKind.OTHER)
            original = _added(weight, f"{name}.trainable_tokens_original", shape, dtype, ModuleKind.OTHER)
            yield replace(original, item=Item.BUFFERS, trainable=False)


def _ends_with(module: str, suffixes: Sequence[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[:end]).endswith(suffix) for end in range(1, len(parts) + 1) for suffix in suffixes)


def _added(beside: StoredTensor, pattern: str, shape: tuple[int, ...], dtype: DType, kind: ModuleKind) -> StoredTensor:
    num_elements = 1
    for size in shape:
        num_elements *= size
    return StoredTensor(
        pattern=pattern,
        indices=beside.indices,
        item=Item.ADAPTER_WEIGHTS,
        shape=shape,
        dtype=dtype,
        raw_bytes=num_elements * dtype.itemsize,
        module_kind=kind,
        module_class="Linear" if kind is ModuleKind.LINEAR else "",
        trainable=True,
    )


def _check(adapter: Adapter, base: Base, matcher: Matcher, targets: Targets) -> None:
    """What PEFT refuses before or while it replaces modules."""
    if adapter.use_dora and adapter.lora_bias:
        raise RequestError("peft.lora_bias: PEFT refuses it together with use_dora", field="peft.lora_bias")
    if adapter.bias not in ("none", "all", "lora_only"):
        raise RequestError(f"peft.bias: {adapter.bias!r} is not known; accepted: all, lora_only, none", field="peft.bias")
    if isinstance(adapter.target_modules, str) and (adapter.layers_to_transform is not None or adapter.layers_pattern):
        raise RequestError(
            "peft.layers_to_transform: PEFT refuses it while target_modules is a string; give a list", field="peft.layers_to_transform"
        )
    matched = [name for name in base.names.modules if matcher.matches(name)]
    refuse_mamba(base.names.model_type, matched)
    adaptable = {name for w in base.tensors if _is_adaptable(w) for _, name in copies(parent(w.pattern), w.indices)}
    for name in matched:
        if name not in adaptable:
            raise RequestError(
                f"peft.target_modules: {name} is matched but is no linear, convolution or embedding module that can be adapted",
                field="peft.target_modules",
            )
    embeddings = {name for w in base.tensors if w.module_kind is ModuleKind.EMBEDDING for _, name in copies(parent(w.pattern), w.indices)}
    if adapter.lora_bias and embeddings.intersection(matched):
        raise RequestError("peft.lora_bias: PEFT refuses it for embeddings", field="peft.lora_bias")


def _refuse_adapted(adapter: Adapter, adapted: set[str]) -> None:
    """A module that has an adapter cannot be saved or have tokens trained too; both names match any ending.

    Source: peft, utils/other.py, AuxiliaryTrainingWrapper.check_module.
    """
    tokens = tuple(name for name, _ in adapter.trainable_token_indices)
    for field, endings in (("modules_to_save", adapter.modules_to_save), ("trainable_token_indices", tokens)):
        clash = next((name for name in sorted(adapted) if name.endswith(endings)), None) if endings else None
        if clash is not None:
            raise RequestError(f"peft.{field}: {clash} is matched too but has an adapter; PEFT refuses both", field=f"peft.{field}")


def module_names(inventory: Inventory, tensors: Iterable[StoredTensor]) -> ModuleNames:
    """All names in the model, containers included, as PEFT's matching sees them."""
    modules: dict[str, None] = {}
    for row in inventory.rows:
        for _, name in copies(row.module_pattern, row.indices if "{}" in row.module_pattern else ()):
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                modules[".".join(parts[:end])] = None
    linear: set[str] = set()
    for weight in tensors:
        if leaf(weight.pattern) == "weight" and _is_linear(weight):
            linear.update(name for _, name in copies(parent(weight.pattern), weight.indices))
    return ModuleNames(
        # PEFT reads the type of the whole model, also where only its text part is modelled.
        model_type=str(inventory.config.get("root_model_type", inventory.model_type)),
        modules=tuple(modules),
        linear=frozenset(linear),
        output_embedding=inventory.output_embedding,
        parameters=tuple(name for row in inventory.rows if row.role is TensorRole.PARAMETER for name in row.names()),
    )
