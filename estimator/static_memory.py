"""Everything that lies on the device once a model is loaded and prepared, before the first step."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from estimator.adapters import MAGNITUDE, Base, adapter_tensors, module_names
from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.estimate import ParameterCounts
from estimator.inventory import Inventory, ModuleKind, TensorRole, TensorRow
from estimator.inventory_v4 import unfuse_experts
from estimator.optimizers import OptimizerState, optimizer_states, step_temporary_bytes
from estimator.patterns import Indices, copies, leaf, parent, partition
from estimator.phases import Item
from estimator.precision import kept_in_float32
from estimator.quantization import NESTED_CODE, check_packing, is_replaceable, is_skipped, packed_bytes, quantization_state, skipped_modules
from estimator.recipe import Adapter, Quantization, Recipe, Trainer
from estimator.stack import Stack
from estimator.storage import StoredTensor
from estimator.units import allocated


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """The part of a recipe that decides static memory: recipes that differ in sizes alone share it."""

    dtype: DType
    quantization: Quantization | None
    adapter: Adapter | None
    prepare_for_kbit_training: bool
    trainer: Trainer
    is_training: bool
    autocast_dtype: DType | None
    optimizer: str | None
    optimizer_arguments: tuple[tuple[str, str], ...]
    decays: bool
    stack: Stack

    @classmethod
    def of(cls, recipe: Recipe) -> "Preparation":
        training = recipe.training
        return cls(
            dtype=recipe.dtype,
            quantization=recipe.quantization,
            adapter=recipe.adapter,
            prepare_for_kbit_training=recipe.prepare_for_kbit_training,
            trainer=recipe.trainer,
            is_training=training is not None,
            autocast_dtype=training.autocast_dtype if training is not None else None,
            optimizer=training.optimizer if training is not None else None,
            optimizer_arguments=training.optimizer_arguments if training is not None else (),
            decays=training is not None and training.decays,
            stack=recipe.stack,
        )

    def without_optimizer(self) -> "Preparation":
        """What decides the stored tensors alone."""
        return replace(self, optimizer=None, optimizer_arguments=(), decays=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticMemory:
    """What lies on the device between steps, and what the optimizer's step adds, each rounded up per tensor."""

    model_type: str
    tensors: tuple[StoredTensor, ...]
    parameters: ParameterCounts
    loaded_weights_bytes: int
    """Before the first forward pass [bytes]."""
    weights_bytes: int
    """After it [bytes]."""
    quantization_state_bytes: int
    buffers_bytes: int
    adapter_weights_bytes: int
    gradients_bytes: int
    """One gradient for each trainable parameter, in its type [bytes]."""
    optimizer: tuple[OptimizerState, ...]
    optimizer_states_bytes: int
    """On the device, paged states left out [bytes]."""
    paged_bytes: int
    """Managed memory of paged optimizers [bytes]."""
    optimizer_temporary_bytes: int
    """Peak of what `optimizer.step()` allocates and frees [bytes]."""

    @property
    def loaded_bytes(self) -> int:
        """Weights, quantization state, buffers and adapter [bytes]."""
        return self.loaded_weights_bytes + self.quantization_state_bytes + self.buffers_bytes + self.adapter_weights_bytes


def static_memory(inventory: Inventory, recipe: Recipe) -> StaticMemory:
    """Static memory of a recipe; recipes that differ in batch and lengths alone share one result.

    Raises:
        RequestError: if the libraries would refuse the combination.
        UnknownNameError: if the optimizer has no memory model.
    """
    return _static_memory(inventory, Preparation.of(recipe))


def stored_tensors(inventory: Inventory, recipe: Recipe) -> tuple[StoredTensor, ...]:
    """Every tensor on the device after loading, quantization, preparation and adapter injection.

    Raises:
        RequestError: if the libraries would refuse the combination.
    """
    return _stored(inventory, Preparation.of(recipe).without_optimizer())


def parameter_counts(tensors: Iterable[StoredTensor]) -> ParameterCounts:
    """Logical scalars of the parameters: in all, trained, added by the adapter, packed.

    Source: peft, peft_model.py, PeftModel.get_nb_trainable_parameters counts packed weights logically too.
    """
    total = trainable = adapter = quantized = 0
    for tensor in tensors:
        if tensor.item not in (Item.WEIGHTS, Item.ADAPTER_WEIGHTS):
            continue
        count = tensor.num_elements * tensor.num_copies
        total += count
        trainable += count if tensor.trainable else 0
        adapter += count if tensor.item is Item.ADAPTER_WEIGHTS else 0
        quantized += count if tensor.quantization is not None else 0
    return ParameterCounts(total=total, trainable=trainable, adapter=adapter, quantized=quantized)


def gradient_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Gradients of all trainable parameters, in the types of the parameters, each rounded up [bytes].

    Source: torch, csrc/autograd/functions/accumulate_grad.h; a gradient has its parameter's type and shape.
    """
    return sum(t.num_copies * allocated(t.num_elements * t.dtype.itemsize) for t in tensors if t.trainable)


@lru_cache(maxsize=512)
def _static_memory(inventory: Inventory, preparation: Preparation) -> StaticMemory:
    loaded = _stored(inventory, preparation.without_optimizer())
    tensors = _settled(loaded, preparation.quantization)
    trained = tuple(t for t in tensors if t.trainable)
    states: tuple[OptimizerState, ...] = ()
    temporary = 0
    if preparation.optimizer is not None:
        arguments = dict(preparation.optimizer_arguments)
        states = optimizer_states(preparation.optimizer, arguments, trained)
        temporary = step_temporary_bytes(preparation.optimizer, trained, decays=preparation.decays)
    by_item = {item: sum(t.allocated_bytes for t in tensors if t.item is item) for item in Item}
    return StaticMemory(
        model_type=inventory.model_type,
        tensors=tensors,
        parameters=parameter_counts(tensors),
        loaded_weights_bytes=sum(t.allocated_bytes for t in loaded if t.item is Item.WEIGHTS),
        weights_bytes=by_item[Item.WEIGHTS],
        quantization_state_bytes=by_item[Item.QUANTIZATION_STATE],
        buffers_bytes=by_item[Item.BUFFERS],
        adapter_weights_bytes=by_item[Item.ADAPTER_WEIGHTS],
        gradients_bytes=gradient_bytes(tensors),
        optimizer=states,
        optimizer_states_bytes=sum(s.allocated_bytes for s in states),
        paged_bytes=sum(s.paged_bytes for s in states),
        optimizer_temporary_bytes=temporary,
    )


def _settled(tensors: tuple[StoredTensor, ...], quantization: Quantization | None) -> tuple[StoredTensor, ...]:
    """Stored tensors after the first forward pass, in which every 4-bit layer casts its bias for good to the type it computes in.

    LLM.int8 casts to the type of its input; that stays as loaded here.

    Source: bitsandbytes, nn/modules.py, Linear4bit.forward.
    """
    if quantization is None or not quantization.kind.is_4bit:
        return tensors
    packed = {name for t in tensors if t.quantization is not None for _, name in copies(parent(t.pattern), t.indices)}
    return tuple(_settled_biases(tensors, packed, quantization.compute_dtype))


def _settled_biases(tensors: tuple[StoredTensor, ...], packed: set[str], dtype: DType) -> Iterator[StoredTensor]:
    for tensor in tensors:
        if tensor.item is not Item.WEIGHTS or leaf(tensor.pattern) != "bias" or tensor.dtype is dtype:
            yield tensor
            continue
        for is_cast, indices in partition(parent(tensor.pattern), tensor.indices, packed.__contains__):
            part = replace(tensor, indices=indices)
            yield _cast(part, dtype) if is_cast else part


@lru_cache(maxsize=512)
def _stored(inventory: Inventory, preparation: Preparation) -> tuple[StoredTensor, ...]:
    if preparation.stack.experts_are_modules:
        inventory = unfuse_experts(inventory)
    tensors = _loaded_tensors(inventory, preparation)
    frozen = tuple(replace(t, trainable=False) if t.trainable else t for t in tensors)
    adapter = preparation.adapter
    if preparation.prepare_for_kbit_training:
        frozen = tuple(map(_upcast, frozen))
    if adapter is None:
        if not preparation.is_training or preparation.prepare_for_kbit_training:
            return frozen
        if preparation.quantization is not None:
            raise RequestError(
                "peft: a quantized model cannot be trained without an adapter; give a LoraConfig, or drop quantization", field="peft"
            )
        return tensors
    tensors = _with_adapter(inventory, frozen, adapter, preparation)
    if not preparation.is_training:
        return tuple(replace(t, trainable=False) for t in tensors)
    return _trl_casts(tensors, preparation) if preparation.trainer is Trainer.TRL else tensors


def loaded_tensors(inventory: Inventory, preparation: Preparation) -> tuple[StoredTensor, ...]:
    """What `from_pretrained` leaves on the device, in the order of the modules: before any preparation, cast or adapter."""
    return _loaded_tensors(unfuse_experts(inventory) if preparation.stack.experts_are_modules else inventory, preparation)


def _loaded_tensors(inventory: Inventory, preparation: Preparation) -> tuple[StoredTensor, ...]:
    tensors = tuple(_loaded(inventory, preparation))
    return tuple(_with_one_nested_code(tensors)) if preparation.stack.shares_nested_code else tensors


def _with_one_nested_code(tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """The first packed weight's table of nested codes is the table of all."""
    seen = False
    for tensor in tensors:
        if not (tensor.item is Item.QUANTIZATION_STATE and leaf(tensor.pattern) == NESTED_CODE):
            yield tensor
        elif not seen:
            seen = True
            yield replace(tensor, indices=tuple(choices[:1] for choices in tensor.indices))


def _loaded(inventory: Inventory, preparation: Preparation) -> Iterator[StoredTensor]:
    """What `from_pretrained` leaves on the device: weights, their quantization state, buffers; trainable as modules made them.

    Raises:
        RequestError: if a linear module that shares its weight with an embedding would be replaced, or a weight cannot be packed.

    Source: transformers, core_model_loading.py, convert_and_load_state_dict_in_model; integrations/bitsandbytes.py.
    """
    quantization = preparation.quantization
    stack = preparation.stack
    keeps_float32 = kept_in_float32(inventory, preparation.dtype, is_quantized=quantization is not None, stack=stack)
    keys = skipped_modules(inventory, quantization) if quantization is not None else ()
    if quantization is not None:
        _refuse_shared(inventory, quantization, keys, stack)

    def label(name: str) -> tuple[bool, bool]:
        packed = replaceable and not is_skipped(parent(name), keys, stack)
        return packed, not packed and keeps_float32(name)

    for row in inventory.rows:
        if row.tied_to is not None:
            continue
        replaceable = quantization is not None and row.leaf == "weight" and is_replaceable(row.module_kind, row.module_class, stack)
        for (is_packed, is_kept), indices in partition(row.pattern, row.indices, label):
            if is_packed and quantization is not None:
                yield from _packed(row, indices, quantization)
            else:
                dtype = DType.FLOAT32 if is_kept and row.role is not TensorRole.NONPERSISTENT_BUFFER else load_dtype(row, preparation.dtype)
                yield _plain(row, indices, dtype)


def _refuse_shared(inventory: Inventory, quantization: Quantization, keys: tuple[str, ...], stack: Stack) -> None:
    """A linear module that shares an embedding's weight must be left out: replaced, it gets that weight, which is not packed, and fails.

    Source: bitsandbytes, nn/modules.py, Linear4bit.forward asks for `quant_state`, Linear8bitLt.forward for `CB`; so held to real
    models. transformers leaves it out unless `llm_int8_skip_modules` is given.
    """
    rows = {row.pattern: row for row in inventory.rows if row.tied_to is None}
    for row in inventory.rows:
        owner = rows.get(row.tied_to or "")
        if owner is None or row.leaf != "weight":
            continue
        replaceable = [is_replaceable(one.module_kind, one.module_class, stack) for one in (row, owner)]
        linear, other = (row, owner) if replaceable[0] else (owner, row)
        if replaceable[0] == replaceable[1] or is_skipped(parent(linear.pattern), keys, stack):
            continue
        head = parent(linear.pattern)
        raise RequestError(
            f"quantization.llm_int8_skip_modules: {list(quantization.skip_modules or ())} leaves {head} to be quantized, which shares the "
            f"weight of {parent(other.pattern)} and fails in its forward pass; accepted: a list that names {head!r} too, or none at all",
            field="quantization.llm_int8_skip_modules",
        )


def load_dtype(row: TensorRow, dtype: DType) -> DType:
    """Type a tensor gets from `from_pretrained(dtype=…)`: that, unless its module asks for a type by name, or it holds no floats."""
    return row.dtype if row.dtype_is_fixed or not row.dtype.is_floating_point else dtype


def _plain(row: TensorRow, indices: Indices, dtype: DType) -> StoredTensor:
    return StoredTensor(
        pattern=row.pattern,
        indices=indices,
        item=Item.WEIGHTS if row.role is TensorRole.PARAMETER else Item.BUFFERS,
        shape=row.shape,
        dtype=dtype,
        raw_bytes=row.num_elements * dtype.itemsize,
        module_kind=row.module_kind,
        module_class=row.module_class,
        trainable=row.role is TensorRole.PARAMETER and not row.is_frozen,
    )


def _packed(row: TensorRow, indices: Indices, quantization: Quantization) -> Iterator[StoredTensor]:
    check_packing(quantization, row.pattern, row.num_elements)
    yield StoredTensor(
        pattern=row.pattern,
        indices=indices,
        item=Item.WEIGHTS,
        shape=row.shape,
        dtype=quantization.storage_dtype if quantization.kind.is_4bit else DType.INT8,
        raw_bytes=packed_bytes(quantization, row.num_elements),
        module_kind=row.module_kind,
        module_class=row.module_class,
        quantization=quantization.kind,
    )
    # A Conv1D holds (in, out) and is transposed before it is quantized.
    out_features = row.shape[1] if row.module_kind is ModuleKind.CONV1D else row.shape[0]
    for part in quantization_state(quantization, row.num_elements, out_features):
        yield StoredTensor(
            pattern=f"{row.pattern}.{part.name}",
            indices=indices,
            item=Item.QUANTIZATION_STATE,
            shape=(part.num_elements,),
            dtype=part.dtype,
            raw_bytes=part.raw_bytes,
            module_kind=row.module_kind,
            module_class=row.module_class,
        )


def _cast(tensor: StoredTensor, dtype: DType) -> StoredTensor:
    return replace(tensor, dtype=dtype, raw_bytes=math.prod(tensor.shape) * dtype.itemsize)


def _upcast(tensor: StoredTensor) -> StoredTensor:
    """`prepare_model_for_kbit_training`: every 16-bit parameter but packed 4-bit weights becomes float32, fused experts included.

    Source: peft, utils/other.py, prepare_model_for_kbit_training.
    """
    is_raised = tensor.item is Item.WEIGHTS and tensor.dtype.is_half and tensor.quantization is None
    return _cast(tensor, DType.FLOAT32) if is_raised else tensor


def _with_adapter(
    inventory: Inventory, tensors: tuple[StoredTensor, ...], adapter: Adapter, preparation: Preparation
) -> tuple[StoredTensor, ...]:
    shared = tuple(_tied(inventory.rows, tensors))
    base = Base(
        names=module_names(inventory, (*tensors, *shared)),
        tensors=(*(t for t in tensors if t.item is not Item.QUANTIZATION_STATE), *shared),
        own=frozenset(t.pattern for t in tensors),
    )
    added, adapted = adapter_tensors(adapter, base, preparation.quantization, preparation.stack, preparation.dtype)
    frozen = tensors if adapter.bias == "none" else tuple(_train_biases(tensors, adapter.bias, adapted))
    return (*frozen, *added)


def _tied(rows: tuple[TensorRow, ...], tensors: tuple[StoredTensor, ...]) -> Iterator[StoredTensor]:
    """Tied parameters as if stored: an adapter and a trained copy get storage of their own even there."""
    tied = [row for row in rows if row.tied_to is not None and row.role is TensorRole.PARAMETER]
    if not tied:
        return
    wanted = {row.tied_to for row in tied}
    sources = {name: t for t in tensors for _, name in copies(t.pattern, t.indices) if name in wanted}
    for row in tied:
        source = sources.get(row.tied_to or "")
        if source is not None:
            yield replace(_plain(row, row.indices, source.dtype), quantization=source.quantization, trainable=False)


def _train_biases(tensors: tuple[StoredTensor, ...], bias: str, adapted: tuple[tuple[str, Indices], ...]) -> Iterator[StoredTensor]:
    """`bias="all"` trains every parameter named bias, `lora_only` those of adapted modules.

    Source: peft, tuners/tuners_utils.py, BaseTuner._mark_only_adapters_as_trainable.
    """
    chosen = {name for pattern, indices in adapted for _, name in copies(pattern, indices)}
    for tensor in tensors:
        if leaf(tensor.pattern) != "bias" or tensor.item is not Item.WEIGHTS:
            yield tensor
            continue
        for trains, indices in partition(parent(tensor.pattern), tensor.indices, lambda name: bias == "all" or name in chosen):
            yield replace(tensor, indices=indices, trainable=trains)


def _trl_casts(tensors: tuple[StoredTensor, ...], preparation: Preparation) -> tuple[StoredTensor, ...]:
    """What SFTTrainer casts after it has added the adapter.

    Source: trl, trainer/sft_trainer.py, SFTTrainer.__init__; before 0.26 models/utils.py, prepare_peft_model.
    """
    quantization = preparation.quantization
    if quantization is None:
        return tensors
    stack = preparation.stack
    if stack.sft_casts_trainable_to_bfloat16:
        leaves_magnitudes = stack.sft_leaves_dora_magnitudes
        is_cast = (t.trainable and not (leaves_magnitudes and MAGNITUDE in t.pattern) for t in tensors)
        return tuple(_cast(t, DType.BFLOAT16) if casts else t for t, casts in zip(tensors, is_cast, strict=True))
    if stack.sft_casts_4bit_models_by_name and quantization.kind.is_4bit and preparation.autocast_dtype is DType.BFLOAT16:
        return tuple(_cast_by_name(t) for t in tensors)
    return tensors


def _cast_by_name(tensor: StoredTensor) -> StoredTensor:
    if tensor.quantization is not None or tensor.item not in (Item.WEIGHTS, Item.ADAPTER_WEIGHTS) or not tensor.dtype.is_floating_point:
        return tensor
    module = parent(tensor.pattern)
    if tensor.module_class == "LayerNorm" or "norm" in module:
        return _cast(tensor, DType.FLOAT32)
    if any(name in module for name in ("lm_head", "embed_tokens", "wte", "wpe")):
        return _cast(tensor, DType.BFLOAT16) if tensor.dtype is DType.FLOAT32 else tensor
    return tensor
