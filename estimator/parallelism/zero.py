"""DeepSpeed's ZeRO under the Trainer: half-precision parameters, and a float32 master copy whose parts the ranks share out.

Legend: N ranks, n trained parameters.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fractions import Fraction

from estimator.dtypes import DType
from estimator.estimate import Notice
from estimator.inventory import ModuleKind
from estimator.optimizers import OptimizerState, optimizer_states, step_temporary_bytes, weight_decay_groups
from estimator.parallelism.nccl import communicator_bytes
from estimator.parallelism.options import Zero
from estimator.parallelism.share import STEP_PHASES, Share
from estimator.phases import Item, Phase
from estimator.recipe import Recipe, Training
from estimator.static_memory import StaticMemory, gradient_bytes
from estimator.storage import StoredTensor
from estimator.units import allocated, ceil_div

_PARAMETERS = (Item.WEIGHTS, Item.ADAPTER_WEIGHTS)
# Flat groups are filled up to a multiple of this many elements for each rank.
# Source: deepspeed, runtime/zero/stage_1_and_2.py, DeepSpeedZeroOptimizer.__init__ (nccl_start_alignment_factor).
ALIGNMENT = 2
_MASTER = DType.FLOAT32
_QUANTIZED = Notice(
    code="zero3_quantized_weights",
    message="packed weights are partitioned by ZeRO-3 like all others, their quantization state is not; PEFT's guide asks for a "
    "bnb_4bit_quant_storage of the type of the other weights. Not held to a run of bitsandbytes under DeepSpeed.",
)


def share(recipe: Recipe, static: StaticMemory) -> Share:
    """The first rank under ZeRO-1, 2 or 3.

    Source: deepspeed, runtime/zero/stage_1_and_2.py and stage3.py; held to deepspeed 0.19.8.
    """
    training = recipe.training
    assert training is not None
    tensors = tuple(_cast(t, training) for t in static.tensors)
    return _stage3(recipe, training, tensors) if recipe.parallel.strategy.zero_stage == 3 else _stage12(recipe, training, tensors)


def _cast(tensor: StoredTensor, training: Training) -> StoredTensor:
    """The engine turns every floating-point parameter and buffer into the half type that is trained in.

    Source: deepspeed, runtime/engine.py, DeepSpeedEngine._configure_distributed_model (module.bfloat16(), module.half()).
    """
    dtype = training.autocast_dtype
    if dtype is None or tensor.item is Item.QUANTIZATION_STATE or tensor.quantization is not None or not tensor.dtype.is_floating_point:
        return tensor
    return replace(tensor, dtype=dtype, raw_bytes=tensor.num_elements * dtype.itemsize)


def flat_sizes(tensors: Iterable[StoredTensor], num_ranks: int) -> tuple[int, ...]:
    """Elements of the flat tensor of each parameter group, filled up so that all ranks get the same.

    Source: deepspeed, runtime/zero/stage_1_and_2.py, flatten_dense_tensors_aligned.
    """
    groups = weight_decay_groups(t for t in tensors if t.trainable)
    sizes = (sum(t.num_elements * t.num_copies for t in group) for group in groups)
    alignment = ALIGNMENT * num_ranks
    return tuple(ceil_div(size, alignment) * alignment for size in sizes if size)


def partition_elements(tensor: StoredTensor, num_ranks: int) -> int:
    """Elements of one parameter's partition under ZeRO-3.

    Source: deepspeed, runtime/zero/partition_parameters.py, Init._padding_size.
    """
    stored = tensor.raw_bytes // tensor.dtype.itemsize
    return ceil_div(stored, num_ranks)


def _of_size(num_elements: int, dtype: DType) -> int:
    return allocated(num_elements * dtype.itemsize)


def _decayed(training: Training, tensors: Iterable[StoredTensor]) -> int:
    """How many of the groups are decayed: the first, or none."""
    return int(training.decays and bool(weight_decay_groups(t for t in tensors if t.trainable)[0]))


def master_tensors(sizes: Iterable[int]) -> tuple[StoredTensor, ...]:
    """The flat float32 partitions that the optimizer works on, one for each parameter group."""
    return tuple(
        StoredTensor(
            pattern=f"group{number}",
            indices=(),
            item=Item.WEIGHTS,
            shape=(size,),
            dtype=_MASTER,
            raw_bytes=size * _MASTER.itemsize,
            module_kind=ModuleKind.OTHER,
            trainable=True,
        )
        for number, size in enumerate(sizes)
    )


def _states(training: Training, master: tuple[StoredTensor, ...], num_decayed: int) -> tuple[tuple[OptimizerState, ...], int]:
    """States of the optimizer, and what its step allocates; each group is updated by itself, the decayed one first."""
    states = optimizer_states(training.optimizer, dict(training.optimizer_arguments), master)
    steps = (step_temporary_bytes(training.optimizer, (group,), decays=number < num_decayed) for number, group in enumerate(master))
    return states, max(steps, default=0)


def _stage12(recipe: Recipe, training: Training, tensors: tuple[StoredTensor, ...]) -> Share:
    """All parameters on every rank, the trained ones in one flat tensor for each group; master, states and (stage 2) gradients in parts."""
    parallel = recipe.parallel
    options, ranks = parallel.zero, parallel.num_gpus
    half = next((t.dtype for t in tensors if t.trainable), DType.BFLOAT16)
    flat = flat_sizes(tensors, ranks)
    parts = tuple(size // ranks for size in flat)
    master = master_tensors(parts)
    states, temporary = _states(training, master, _decayed(training, tensors))
    held = sum(t.allocated_bytes for t in master) + sum(s.allocated_bytes for s in states)
    averaged = sum(_of_size(size, half) for size in parts)
    stored = {item: sum(t.allocated_bytes for t in tensors if t.item is item and not t.trainable) for item in Item}
    trained = sum(_of_size(size, half) for size in flat)
    by_adapter = any(t.trainable and t.item is Item.ADAPTER_WEIGHTS for t in tensors)
    stored[Item.ADAPTER_WEIGHTS if by_adapter else Item.WEIGHTS] += trained
    whole = gradient_bytes(tensors)
    accumulates = training.gradient_accumulation_steps > 1
    is_second = parallel.strategy.zero_stage == 2
    # A flat copy of a group's gradients in their type and one in float32, which alone is there while the optimizer works.
    update = max((_of_size(size, _MASTER) + max(_of_size(size, half), temporary) for size in parts), default=0)
    host = 0
    gradients = averaged if is_second else whole
    if options.offload_optimizer:
        # master, states and float32 gradients, and a half-precision copy of the updated part
        host = held + sum(_of_size(size, _MASTER) + _of_size(size, half) for size in parts)
        held = update = 0
        gradients = 0 if is_second else whole
    waiting = 0
    if accumulates:
        waiting = gradients
    stored[Item.OPTIMIZER_STATES] = held
    places = is_second or accumulates
    at_update = gradients
    if not is_second and averaged + update > whole:
        at_update = averaged  # gradients of other ranks' parts go before the copies are made
    elif not is_second:
        update = 0
    return Share(
        tensors=tensors,
        stored=stored,
        loaded={Item.WEIGHTS: stored[Item.WEIGHTS], Item.ADAPTER_WEIGHTS: stored[Item.ADAPTER_WEIGHTS]},
        gradients_bytes=at_update,
        waiting_gradients_bytes=waiting,
        gradients_have_places=places,
        kept_gradients=Fraction(gradients, max(whole, 1)) if is_second else Fraction(0),
        update_temporary_bytes=update,
        paged_bytes=sum(s.paged_bytes for s in states),
        communication=_reduction(options, tensors, half, stage=parallel.strategy.zero_stage),
        host_bytes=host,
        outside_bytes=communicator_bytes(ranks),
    )


def _reduction(options: Zero, tensors: Iterable[StoredTensor], dtype: DType, *, stage: int) -> Mapping[Phase, int]:
    """Buckets during the backward pass, and under offloading room for one gradient on its way, which stays.

    Source: deepspeed, runtime/zero/stage_1_and_2.py, DeepSpeedZeroOptimizer.__init__ (temp_grad_buffer_for_gpu_offload).
    """
    largest = max((t.num_elements for t in tensors if t.trainable), default=0) if options.offload_optimizer else 0
    on_its_way = dict.fromkeys((*STEP_PHASES, Phase.OPTIMIZER_STEP), _of_size(largest, dtype))
    return on_its_way | {Phase.BACKWARD: on_its_way[Phase.BACKWARD] + _bucket_bytes(options, dtype, stage=stage)}


def _bucket_bytes(options: Zero, dtype: DType, *, stage: int) -> int:
    """Buffers in which gradients are reduced: of full size whatever the model's, one of them or two that take turns [bytes].

    Source: deepspeed, runtime/zero/stage_1_and_2.py, backward_prologue; stage3.py, _setup_for_real_optimizer; zero/config.py,
    overlap_comm_valid.
    """
    if not (options.contiguous_gradients or options.offload_optimizer):
        return 0
    overlaps = options.overlap_comm is True and stage < 3
    return (2 if overlaps else 1) * _of_size(options.reduce_bucket_size, dtype)


def _stage3(recipe: Recipe, training: Training, tensors: tuple[StoredTensor, ...]) -> Share:
    """Parameters in parts too, all but small ones; they are gathered for the module that runs, and ahead of it."""
    parallel = recipe.parallel
    options, ranks = parallel.zero, parallel.num_gpus
    half = next((t.dtype for t in tensors if t.trainable), DType.BFLOAT16)
    groups = weight_decay_groups(t for t in tensors if t.trainable)
    parts = tuple(n for group in groups if (n := sum(partition_elements(t, ranks) * t.num_copies for t in group)))
    master = master_tensors(parts)
    states, temporary = _states(training, master, _decayed(training, tensors))
    held = sum(t.allocated_bytes for t in master) + sum(s.allocated_bytes for s in states)
    gradients = _of_size(sum(parts), half)
    stored = dict.fromkeys(Item, 0)
    host = 0
    for tensor in tensors:
        if tensor.item not in _PARAMETERS:
            stored[tensor.item] += tensor.allocated_bytes
            continue
        part = 0 if tensor.trainable else tensor.num_copies * _of_size(partition_elements(tensor, ranks), tensor.dtype)
        stays = tensor.allocated_bytes if _persists(tensor, options) else 0
        if options.offload_param:
            host, part = host + part, 0
        stored[tensor.item] += part + stays
    by_adapter = any(t.trainable and t.item is Item.ADAPTER_WEIGHTS for t in tensors)
    # Partitions of trained parameters lie in one flat tensor for each group.
    flat = sum(_of_size(size, half) for size in parts)
    if options.offload_param:
        host += flat
    else:
        stored[Item.ADAPTER_WEIGHTS if by_adapter else Item.WEIGHTS] += flat
    update = max((_of_size(size, _MASTER) for size in parts), default=0) + temporary
    if options.offload_optimizer:
        host += held + gradients + sum(_of_size(size, _MASTER) for size in parts)
        held = update = gradients = 0
    stored[Item.OPTIMIZER_STATES] = held
    bucket = _bucket_bytes(options, half, stage=3)
    return Share(
        tensors=tensors,
        stored=stored,
        loaded={item: stored[item] for item in _PARAMETERS},
        gradients_bytes=gradients,
        waiting_gradients_bytes=gradients,  # made with the optimizer, one flat tensor
        gradients_have_places=True,
        update_temporary_bytes=update,
        paged_bytes=sum(s.paged_bytes for s in states),
        communication=_gathered(tensors, options, bucket),
        host_bytes=host,
        outside_bytes=communicator_bytes(ranks),
        notices=(_QUANTIZED,) if any(t.quantization is not None for t in tensors) else (),
    )


def _persists(tensor: StoredTensor, options: Zero) -> bool:
    """Small parameters are never let go.

    Source: deepspeed, runtime/zero/parameter_offload.py, mark_persistent_parameters.
    """
    return tensor.raw_bytes // tensor.dtype.itemsize <= options.param_persistence_threshold


def _gathered(tensors: tuple[StoredTensor, ...], options: Zero, bucket: int) -> Mapping[Phase, int]:
    """Gathered parameters up to `stage3_max_live_parameters`, which is what DeepSpeed keeps rather than gather again; the bucket stays.

    Source: deepspeed, runtime/zero/partitioned_param_coordinator.py, PartitionedParameterCoordinator.fetch_sub_module.
    """
    parted = [t for t in tensors if t.item in _PARAMETERS and not _persists(t, options)]
    total = sum(t.num_copies * (t.raw_bytes // t.dtype.itemsize) for t in parted)
    num_bytes = sum(t.allocated_bytes for t in parted)
    largest = max((t.raw_bytes for t in parted), default=0)
    live = num_bytes if total <= options.max_live_parameters else num_bytes * options.max_live_parameters // total
    live = max(live, min(num_bytes, largest))
    return {**dict.fromkeys(STEP_PHASES, live + bucket), Phase.OPTIMIZER_STEP: bucket}
