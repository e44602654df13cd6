"""DistributedDataParallel: everything on every rank, and buckets in which gradients travel."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from estimator.dtypes import DType
from estimator.parallelism.nccl import communicator_bytes
from estimator.parallelism.options import Ddp
from estimator.parallelism.share import STEP_PHASES, Share, whole
from estimator.patterns import copies
from estimator.phases import Item, Phase
from estimator.recipe import Recipe
from estimator.static_memory import StaticMemory
from estimator.storage import StoredTensor
from estimator.units import MIB, allocated

# Source: torch, nn/parallel/distributed.py, DistributedDataParallel.__init__ (broadcast_bucket_size).
BROADCAST_BYTES = 250 * MIB
# Source: torch, csrc/distributed/c10d/comm.cpp, broadcast_coalesced (kMaxInFlight).
NUM_BROADCASTS = 2


def share(recipe: Recipe, static: StaticMemory) -> Share:
    """A rank of DDP.

    Gradients exist twice, as autograd makes them and in the buckets, unless they are views of the buckets; and for parameters that are
    trained alone. Buckets are made with the model and stay.

    Source: torch, csrc/distributed/c10d/reducer.cpp, Reducer::initialize_buckets and mark_variable_ready_dense; accelerate,
    accelerator.py, prepare_model (`gradient_as_bucket_view` is false by default).
    """
    training = recipe.training
    assert training is not None
    options = recipe.parallel.ddp
    accumulates = training.gradient_accumulation_steps > 1
    finds_unused = looks_for_unused(recipe)
    buckets = bucket_bytes(static.tensors, options, finds_unused=finds_unused)
    held = sum(map(allocated, buckets))
    if finds_unused:
        # One count for each parameter, on the host and on the device.
        held += allocated(DType.INT32.itemsize * sum(t.num_copies for t in static.tensors if t.trainable))
    alone = whole(static, accumulates=accumulates)
    if options.gradient_as_bucket_view:
        # Without synchronisation gradients of earlier micro-batches lie beside the buckets, until the last one moves them there.
        alone = replace(alone, gradients_bytes=0, gradients_have_places=True)
    return replace(
        alone,
        communication=dict.fromkeys((*STEP_PHASES, Phase.OPTIMIZER_STEP), held),
        loaded_communication_bytes=held + broadcast_bytes(static.tensors),
        outside_bytes=communicator_bytes(recipe.parallel.num_gpus),
    )


def looks_for_unused(recipe: Recipe) -> bool:
    """Whether DDP looks for parameters without a gradient: by default under adapters, and where nothing is checkpointed.

    Source: transformers, trainer.py, Trainer._build_accelerator_args: a PeftModel is no PreTrainedModel.
    """
    asked, training = recipe.parallel.ddp.find_unused_parameters, recipe.training
    assert training is not None
    return recipe.adapter is not None or not training.gradient_checkpointing if asked is None else asked


def bucket_bytes(tensors: Iterable[StoredTensor], options: Ddp, *, finds_unused: bool) -> tuple[int, ...]:
    """Sizes of all buckets of gradients, once the first step is over.

    Without a search for unused parameters buckets are made anew after the first backward pass, in the order in which gradients arrive,
    taken here as the reverse of the order of parameters.

    Returns:
        one size for each bucket [bytes].

    Source: torch, nn/parallel/distributed.py, _ddp_init_helper; csrc/distributed/c10d/reducer.cpp, Reducer::rebuild_buckets.
    """
    trained = [(t.dtype, t.num_elements * t.dtype.itemsize) for t in in_order(tensors) if t.trainable]
    rebuilds = options.static_graph or not finds_unused
    return tuple(_assigned(trained[::-1] if rebuilds else trained, options.limits_bytes))


def _assigned(sizes: Iterable[tuple[DType, int]], limits: Sequence[int]) -> Iterator[int]:
    """Buckets of one type, each closed as soon as it has reached its limit.

    Source: torch, csrc/distributed/c10d/reducer.cpp, compute_bucket_assignment_by_size.
    """
    open_bytes: dict[DType, int] = {}
    num_closed: dict[DType, int] = {}
    for dtype, size in sizes:
        open_bytes[dtype] = open_bytes.get(dtype, 0) + size
        number = num_closed.get(dtype, 0)
        if open_bytes[dtype] >= limits[min(number, len(limits) - 1)]:
            yield open_bytes.pop(dtype)
            num_closed[dtype] = number + 1
    yield from open_bytes.values()


def in_order(tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """One row per tensor, in the order of the modules: rows of repeated tensors are taken apart, layer by layer."""
    rows = list(tensors)
    groups: list[tuple[tuple[int, ...], int, StoredTensor]] = []
    first = next((n for n, t in enumerate(rows) if t.indices and t.item is Item.WEIGHTS), len(rows))
    for number, tensor in enumerate(rows):
        for indices, _ in copies(tensor.pattern, tensor.indices):
            # What stands before the first layer stays there, what stands behind follows the layers.
            rank = (1, *indices) if indices else ((0,) if number < first else (2,))
            groups.append((rank, number, replace(tensor, indices=tuple((i,) for i in indices))))
    for _, _, tensor in sorted(groups, key=lambda group: (group[0], group[1])):
        yield tensor


def broadcast_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Copies in which the first rank's parameters and buffers travel to the others, before the first step [bytes].

    Source: torch, distributed/utils.py, _sync_module_states; csrc/distributed/c10d/comm.cpp, broadcast_coalesced.
    """
    sizes: dict[DType, int] = {}
    for tensor in tensors:
        if tensor.item is not Item.QUANTIZATION_STATE:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_copies * tensor.raw_bytes
    return allocated(min(sum(sizes.values()), NUM_BROADCASTS * BROADCAST_BYTES))
