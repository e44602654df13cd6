"""torch's fully_shard (FSDP2) as accelerate applies it: every parameter cut along its first dimension, one unit gathered at a time.

Units are the decoder layers, the input embedding, the tail of final norm and head (with the embedding where they are tied), and the root
with what is left. Legend: N ranks.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.estimate import Notice
from estimator.optimizers import optimizer_states, step_temporary_bytes
from estimator.parallelism.ddp import in_order
from estimator.parallelism.nccl import communicator_bytes
from estimator.parallelism.share import Share
from estimator.phases import Item, Phase
from estimator.recipe import Recipe
from estimator.stack import Stack
from estimator.static_memory import StaticMemory, gradient_bytes
from estimator.storage import StoredTensor
from estimator.units import allocated, ceil_div

_PARAMETERS = (Item.WEIGHTS, Item.ADAPTER_WEIGHTS)
_WHOLE = Notice(
    code="fsdp_keeps_4bit_weights_whole",
    message="accelerate leaves 4-bit weights stored as uint8 out of FSDP2's sharding: every rank holds all of them. With "
    "bnb_4bit_quant_storage of a floating-point type, that of the other weights, they are sharded.",
)


def waiting_gradients(name: str, stack: Stack) -> Notice:
    """What accumulation costs under FSDP1 or FSDP2, and what spares it."""
    advice = "; accelerator_config.gradient_accumulation_kwargs.sync_each_batch=True reduces them each time"
    return Notice(
        code="fsdp_accumulates_whole_gradients",
        message=f"while gradients are accumulated accelerate switches {name}'s reduction off (no_sync): whole gradients of all that is "
        f"trained wait on every rank{advice if stack.trainer_can_sync_each_batch else ''}.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """One parameter under FSDP."""

    tensor: StoredTensor
    dtype: DType
    """Of the shard."""
    rows: int
    """Of the first dimension, in storage."""
    row_elements: int
    """Stored elements of one row."""
    num_ranks: int

    @property
    def shard_elements(self) -> int:
        """Of every rank's shard, filled up to the size of the first rank's; the first rank's are all used.

        Source: torch, distributed/fsdp/_fully_shard/_fsdp_param.py, FSDPParam._init_sharded_param (padded_sharded_size).
        """
        return ceil_div(self.rows, self.num_ranks) * self.row_elements

    @property
    def shard_bytes(self) -> int:
        """Of a shard in the allocator [bytes]."""
        return allocated(self.shard_elements * self.dtype.itemsize)

    def local_rows(self, rank: int) -> int:
        """Rows that a rank really has: `torch.chunk` gives the last ones less, or nothing."""
        chunk = ceil_div(self.rows, self.num_ranks)
        return max(0, min(self.rows - rank * chunk, chunk))

    def gathered_dtype(self, compute: DType | None) -> DType:
        """Type in which the operators see it."""
        return compute if compute is not None and self.tensor.quantization is None else self.dtype

    def gathered_bytes(self, compute: DType | None) -> int:
        """Of all shards together [bytes]."""
        return self.num_ranks * self.shard_elements * self.gathered_dtype(compute).itemsize

    @property
    def gradient_elements(self) -> int:
        return self.shard_elements if self.tensor.trainable else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is gathered at once."""

    members: tuple[Sharded, ...]
    compute: DType | None

    @property
    def gathered_bytes(self) -> int:
        """Parameters in full, one tensor each [bytes]."""
        return sum(allocated(m.gathered_bytes(self.compute)) for m in self.members)

    @property
    def buffer_bytes(self) -> int:
        """The flat tensor in which shards arrive; it stays until the next unit's is there. One rank alone copies without it [bytes].

        Source: torch, distributed/fsdp/_fully_shard/_fsdp_collectives.py, foreach_all_gather; _fsdp_param_group.py, wait_for_unshard.
        """
        if any(m.num_ranks == 1 for m in self.members):
            return 0
        return allocated(sum(m.gathered_bytes(self.compute) for m in self.members))

    @property
    def gradients_bytes(self) -> int:
        """Whole gradients as autograd leaves them [bytes]."""
        trained = (m for m in self.members if m.tensor.trainable)
        return sum(allocated(m.tensor.num_elements * m.gathered_dtype(self.compute).itemsize) for m in trained)

    @property
    def reduction_bytes(self) -> int:
        """The flat tensor in which gradients leave; it stays until the next unit's [bytes].

        Source: torch, distributed/fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce (reduce_scatter_input).
        """
        return allocated(sum(m.num_ranks * m.gradient_elements * m.gathered_dtype(self.compute).itemsize for m in self.members))

    @property
    def sharded_gradients_bytes(self) -> int:
        """All gradients of a unit are views of one tensor, in the type of the shards [bytes].

        Source: torch, distributed/fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce (reduce_output, as_strided).
        """
        return allocated(sum(m.gradient_elements * m.dtype.itemsize for m in self.members))


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """All units of a model."""

    layers: tuple[Unit, ...]
    embedding: Unit
    tail: Unit
    root: Unit
    whole: tuple[StoredTensor, ...]
    """Tensors that FSDP does not know: buffers, quantization state, packed weights of a type that cannot be sharded."""

    @property
    def all(self) -> tuple[Unit, ...]:
        return (*self.layers, self.embedding, self.tail, self.root)


def share(recipe: Recipe, static: StaticMemory) -> Share:
    """The first rank of FSDP2; its shards are the largest.

    Source: accelerate, utils/fsdp_utils.py, fsdp2_prepare_model; torch, distributed/fsdp/_fully_shard.

    Raises:
        RequestError: for weights that cannot be sharded.
    """
    training = recipe.training
    assert training is not None
    options = recipe.parallel.fsdp
    units = units_of(recipe, static.tensors)
    members = [m for unit in units.all for m in unit.members]
    accumulates = training.gradient_accumulation_steps > 1
    weights = {item: sum(t.allocated_bytes for t in units.whole if t.item is item) for item in Item}
    parameters = {item: sum(m.shard_bytes for m in members if m.tensor.item is item) for item in _PARAMETERS}
    sharded_gradients = sum(unit.sharded_gradients_bytes for unit in units.all)
    trained = tuple(as_trained(m) for m in members if m.tensor.trainable)
    arguments = dict(training.optimizer_arguments)
    states = optimizer_states(training.optimizer, arguments, trained)
    states_bytes = sum(s.allocated_bytes for s in states)
    temporary = step_temporary_bytes(training.optimizer, trained, decays=training.decays)
    stored = {item: weights.get(item, 0) for item in (Item.QUANTIZATION_STATE, Item.BUFFERS)}
    host = 0
    if options.offload_params:
        host = sum(parameters.values()) + sharded_gradients + states_bytes
        states_bytes = temporary = sharded_gradients = 0
        parameters = dict.fromkeys(_PARAMETERS, 0)
    stored |= {item: weights[item] + parameters[item] for item in _PARAMETERS}
    stored[Item.OPTIMIZER_STATES] = states_bytes
    notices = []
    if any(t.quantization is not None for t in units.whole):
        notices.append(_WHOLE)
    unreduced = sum(unit.gradients_bytes for unit in units.all) if accumulates else 0
    if accumulates:
        notices.append(waiting_gradients("FSDP2", recipe.stack))
    tensors = as_seen(static.tensors, {m.tensor.pattern: m.gathered_dtype(unit.compute) for unit in units.all for m in unit.members})
    return Share(
        tensors=tensors,
        stored=stored,
        loaded={item: stored[item] for item in (*_PARAMETERS, Item.QUANTIZATION_STATE, Item.BUFFERS)},
        gradients_bytes=sharded_gradients,
        waiting_gradients_bytes=unreduced,
        gradients_have_places=True,
        kept_gradients=Fraction(sharded_gradients, max(gradient_bytes(tensors), 1)),
        update_temporary_bytes=temporary,
        paged_bytes=sum(s.paged_bytes for s in states),
        communication=_communication(units, reshards=options.reshard_after_forward),
        host_bytes=host,
        outside_bytes=communicator_bytes(recipe.parallel.num_gpus),
        notices=tuple(notices),
    )


def as_trained(member: Sharded) -> StoredTensor:
    """The shard as the optimizer sees it: a tensor of its own on the first rank."""
    tensor = member.tensor
    shape = (member.local_rows(0), *tensor.shape[1:])
    return replace(tensor, shape=shape, dtype=member.dtype, raw_bytes=member.shard_elements * member.dtype.itemsize)


def units_of(recipe: Recipe, tensors: tuple[StoredTensor, ...]) -> Units:
    """All parameters by unit.

    Raises:
        RequestError: for LLM.int8 weights.
    """
    training = recipe.training
    compute = training.autocast_dtype if training is not None else None
    has_4bit = any(t.quantization is not None and t.quantization.is_4bit for t in tensors)
    whole: list[StoredTensor] = []
    groups: dict[object, list[Sharded]] = {}
    embedding, tail = "embedding", "tail"
    ordered = list(in_order(tensors))
    has_head = any(is_head(t) for t in ordered)
    for tensor in ordered:
        if tensor.quantization is not None and not tensor.quantization.is_4bit:
            raise RequestError(
                "hardware.strategy: 'fsdp' of LLM.int8 weights is not modelled; 4-bit weights are", field="hardware.strategy"
            )
        if tensor.item not in _PARAMETERS or not tensor.dtype.is_floating_point:
            whole.append(tensor)
            continue
        if tensor.indices:
            key: object = tensor.indices[0][0]
        elif "embed" in tensor.pattern or "wte" in tensor.pattern:
            key = embedding if has_head else tail
        else:
            # In a PeftModel accelerate finds no final norm: it stays with the root.
            is_norm = recipe.adapter is None and ("norm" in tensor.pattern or "ln_f" in tensor.pattern)
            key = tail if is_norm or is_head(tensor) else "root"
        groups.setdefault(key, []).append(_sharded(tensor, recipe.parallel.num_gpus, compute, has_4bit=has_4bit))

    def unit(key: object) -> Unit:
        return Unit(members=tuple(groups.get(key, ())), compute=compute)

    layers = tuple(unit(key) for key in groups if isinstance(key, int))
    return Units(layers=layers, embedding=unit(embedding), tail=unit(tail), root=unit("root"), whole=tuple(whole))


def is_head(tensor: StoredTensor) -> bool:
    """Whether it belongs to the output layer."""
    return "lm_head" in tensor.pattern or "embed_out" in tensor.pattern or "score" in tensor.pattern


def _sharded(tensor: StoredTensor, num_ranks: int, compute: DType | None, *, has_4bit: bool) -> Sharded:
    """Trained parameters are raised to float32 under mixed precision, but not in a model with 4-bit weights."""
    raises = compute is not None and tensor.trainable and not has_4bit
    dtype = DType.FLOAT32 if raises else tensor.dtype
    if tensor.quantization is not None:  # one column of packed elements
        return Sharded(tensor=tensor, dtype=dtype, rows=tensor.raw_bytes // dtype.itemsize, row_elements=1, num_ranks=num_ranks)
    rows = tensor.shape[0] if tensor.shape else 1
    return Sharded(tensor=tensor, dtype=dtype, rows=rows, row_elements=tensor.num_elements // max(rows, 1), num_ranks=num_ranks)


def as_seen(tensors: Iterable[StoredTensor], seen: Mapping[str, DType]) -> tuple[StoredTensor, ...]:
    """The tensors in the types in which the operators of the step see them, by pattern."""
    return tuple(_cast(t, seen) for t in tensors)


def _cast(tensor: StoredTensor, seen: Mapping[str, DType]) -> StoredTensor:
    dtype = seen.get(tensor.pattern, tensor.dtype)
    if dtype is tensor.dtype or tensor.quantization is not None:
        return tensor
    return replace(tensor, dtype=dtype, raw_bytes=tensor.num_elements * dtype.itemsize)


def _communication(units: Units, *, reshards: bool) -> Mapping[Phase, int]:
    """Gathered parameters and flat buffers, by phase.

    The tail and the root stay gathered until they have been run backwards. Beside the unit that runs there is one flat buffer: going
    forward that in which it arrived, going back that of the unit before, gathered ahead. Backwards, whole gradients of the running unit
    and the flat gradients of the one after it. What is largest of layers and tail is taken for the whole phase.
    """
    stays = units.tail.gathered_bytes + units.root.gathered_bytes
    layers = units.layers
    kept = 0 if reshards else sum(u.gathered_bytes for u in (*layers, units.embedding))
    running = [units.embedding, *layers]
    forward = max((u.buffer_bytes + (u.gathered_bytes if reshards else 0) for u in running), default=0)
    last = layers[-1].buffer_bytes if layers and reshards else 0
    backward = [stays + last + units.tail.gradients_bytes]
    order = [units.tail, *reversed(layers), units.embedding]
    for after, unit, before in _neighbours(order):
        ahead = before.buffer_bytes if before is not None and reshards else 0
        backward.append(
            units.root.gathered_bytes + (unit.gathered_bytes if reshards else 0) + ahead + unit.gradients_bytes + after.reduction_bytes
        )
    return {
        Phase.FORWARD: kept + forward + units.root.gathered_bytes,
        Phase.LOSS: kept + stays + units.tail.buffer_bytes,
        Phase.BACKWARD: kept + max(backward),
    }


def _neighbours(order: list[Unit]) -> Iterator[tuple[Unit, Unit, Unit | None]]:
    """Each unit but the first, with the one run before it and the one run after it, if there is one."""
    for number in range(1, len(order)):
        yield order[number - 1], order[number], order[number + 1] if number + 1 < len(order) else None
