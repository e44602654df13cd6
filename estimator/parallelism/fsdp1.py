"""torch's FullyShardedDataParallel (FSDP1) as accelerate applies it: one flat parameter for each unit, cut into equal parts.

Units are the decoder layers and the root with all that is left: embeddings, final norm and head. In a PeftModel every module whose weight
is trained is a unit of its own inside them. Legend: N ranks.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.estimate import Notice
from estimator.optimizers import optimizer_states, step_temporary_bytes
from estimator.parallelism.ddp import in_order
from estimator.parallelism.fsdp import as_seen, is_head, waiting_gradients
from estimator.parallelism.nccl import communicator_bytes
from estimator.parallelism.options import BackwardPrefetch, Fsdp
from estimator.parallelism.share import Share
from estimator.phases import Item, Phase
from estimator.recipe import Recipe
from estimator.static_memory import StaticMemory, gradient_bytes
from estimator.storage import StoredTensor
from estimator.units import allocated, ceil_div

# Source: torch, distributed/fsdp/_flat_param.py, _get_aligned_numel.
_ALIGNMENT_BYTES = 16
_PARAMETERS = (Item.WEIGHTS, Item.ADAPTER_WEIGHTS)
_FIELD = "hardware.fsdp_config.version"
_TRAINS_FROZEN = Notice(
    code="fsdp1_trains_frozen_parameters_too",
    message="FSDP1 holds a unit as one parameter: where some of it is trained, gradients are made of all of it, and under mixed precision "
    "all of it is kept in float32, frozen parameters included.",
)
_KEEPS_LAYER_INPUTS = Notice(
    code="fsdp1_keeps_layer_inputs",
    message="a hook of FSDP1 on frozen layers holds the input of every layer and its gradient until the backward pass ends, since "
    "gradient_checkpointing is reentrant and this version of transformers puts it around FSDP's units, as those before 4.52 or 4.53 do; "
    'gradient_checkpointing_kwargs={"use_reentrant": False} holds neither.',
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One parameter in a flat one."""

    tensor: StoredTensor
    num_elements: int
    """In storage: those of packed weights count as elements of their storage type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is gathered at once: a flat parameter."""

    members: tuple[Member, ...]
    layer: int | None
    """Number of the decoder layer it is, or lies in; None outside of layers."""
    is_inside: bool
    """Whether it is a trained module inside another unit."""
    num_ranks: int
    precision: DType | None
    """`MixedPrecision.param_dtype`: of the gathered parameter; None = that of the shard."""
    raises: bool
    """Whether accelerate raises trained shards to float32."""
    keeps_parameters: bool
    """`use_orig_params`: parameters stay, as views of the shard, each aligned to 16 bytes."""

    @property
    def loaded_dtype(self) -> DType:
        return self.members[0].tensor.dtype

    @property
    def trains(self) -> bool:
        """Whether the flat parameter requires a gradient: if any part of it does.

        Source: torch, distributed/fsdp/_flat_param.py, FlatParamHandle._validate_tensors_to_flatten.
        """
        return any(m.tensor.trainable for m in self.members)

    @property
    def dtype(self) -> DType:
        """Of the shard. Source: accelerate, accelerator.py, Accelerator.prepare_model (upcasting)."""
        return DType.FLOAT32 if self.raises and self.trains else self.loaded_dtype

    @property
    def gathered_dtype(self) -> DType:
        """Type in which the operators see it."""
        return self.precision or self.dtype

    def offsets(self) -> Iterator[tuple[Member, int]]:
        """Where each member begins in the flat parameter."""
        aligned = _ALIGNMENT_BYTES // (self.precision or self.loaded_dtype).itemsize if self.keeps_parameters else 1
        end = 0
        for member in self.members:
            start = ceil_div(end, aligned) * aligned
            yield member, start
            end = start + member.num_elements

    @property
    def num_elements(self) -> int:
        """Of the flat parameter, filled up to a multiple of N where parameters are kept.

        Source: torch, distributed/fsdp/_flat_param.py, FlatParamHandle._init_flat_param_and_metadata.
        """
        member, start = list(self.offsets())[-1]
        end = start + member.num_elements
        return ceil_div(end, self.num_ranks) * self.num_ranks if self.keeps_parameters else end

    @property
    def shard_elements(self) -> int:
        """Of every rank's shard. Source: torch, distributed/fsdp/_flat_param.py, FlatParamHandle._get_shard."""
        return ceil_div(self.num_elements, self.num_ranks)

    @property
    def shard_bytes(self) -> int:
        """In the allocator [bytes]."""
        return allocated(self.shard_elements * self.dtype.itemsize)

    @property
    def gathered_bytes(self) -> int:
        """The flat parameter in full, of which all parameters are views [bytes]."""
        return allocated(self.num_ranks * self.shard_elements * self.gathered_dtype.itemsize)

    @property
    def cast_bytes(self) -> int:
        """The shard in the gathered type, alive while it is sent [bytes].

        Source: torch, distributed/fsdp/_flat_param.py, FlatParamHandle._use_low_precision_shard and post_unshard.
        """
        return allocated(self.shard_elements * self.gathered_dtype.itemsize) if self.gathered_dtype is not self.dtype else 0

    @property
    def gradients_bytes(self) -> int:
        """Gradients of all members as autograd leaves them; none is passed on before the last is there [bytes].

        Members are views of one `torch.split`, whose backward pass puts all gradients together.
        """
        if not self.trains:
            return 0
        return sum(allocated(m.num_elements * self.gathered_dtype.itemsize) for m in self.members)

    @property
    def flat_gradient_bytes(self) -> int:
        """They put together, as they leave to be reduced [bytes]."""
        return allocated(self.num_elements * self.gathered_dtype.itemsize) if self.trains else 0

    @property
    def sharded_gradient_bytes(self) -> int:
        """One tensor of the size and type of the shard.

        Source: torch, distributed/fsdp/_runtime_utils.py, _accumulate_sharded_grad and _cast_grad_to_param_dtype [bytes].
        """
        return self.shard_bytes if self.trains else 0

    def as_trained(self, rank: int) -> Iterator[StoredTensor]:
        """What the optimizer of a rank sees: the parts of trained parameters in its shard, without shape; or the whole shard.

        Source: torch, distributed/fsdp/_flat_param.py, FlatParamHandle._get_shard_metadata and _use_sharded_views.
        """
        if not self.trains:
            return
        if not self.keeps_parameters:
            yield self._flat(self.members[0].tensor, self.shard_elements, module_class="FlatParameter")
            return
        first, last = rank * self.shard_elements, (rank + 1) * self.shard_elements
        for member, start in self.offsets():
            here = min(start + member.num_elements, last) - max(start, first)
            if member.tensor.trainable and here > 0:
                yield self._flat(member.tensor, here, module_class=member.tensor.module_class)

    def _flat(self, tensor: StoredTensor, number: int, *, module_class: str) -> StoredTensor:
        raw = number * self.dtype.itemsize
        return replace(tensor, shape=(number,), dtype=self.dtype, raw_bytes=raw, module_class=module_class)


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """All units of a model, in the order in which they are run."""

    root: Unit | None
    layers: tuple[tuple[Unit, ...], ...]
    """Of each layer first the layer itself, then the trained modules inside it."""
    inside_root: tuple[Unit, ...]
    whole: tuple[StoredTensor, ...]
    """Tensors that FSDP does not know: buffers, quantization state."""

    @property
    def all(self) -> tuple[Unit, ...]:
        root = () if self.root is None else (self.root,)
        return (*root, *(unit for layer in self.layers for unit in layer), *self.inside_root)


def share(recipe: Recipe, static: StaticMemory) -> Share:
    """The first rank of FSDP1; padding lies at the end of the last.

    Source: accelerate, accelerator.py, Accelerator.prepare_model; transformers, distributed/fsdp.py, update_fsdp_plugin_peft; torch,
    distributed/fsdp/_flat_param.py and _runtime_utils.py.

    Raises:
        RequestError: for parameters that cannot be put into one, and for one rank.
    """
    training = recipe.training
    assert training is not None
    options = recipe.parallel.fsdp
    units = units_of(recipe, static.tensors)
    accumulates = training.gradient_accumulation_steps > 1
    recomputes = _recomputes_units(recipe, static.model_type)
    keeps_layer_inputs = recomputes and any(not layer[0].trains for layer in units.layers)
    parameters = {item: sum(u.shard_bytes for u in units.all if _item(u) is item) for item in _PARAMETERS}
    sharded_gradients = sum(u.sharded_gradient_bytes for u in units.all)
    trained = tuple(part for unit in units.all for part in unit.as_trained(rank=0))
    arguments = dict(training.optimizer_arguments)
    states = optimizer_states(training.optimizer, arguments, trained)
    states_bytes = sum(s.allocated_bytes for s in states)
    temporary = step_temporary_bytes(training.optimizer, trained, decays=training.decays)
    # Parameters are views of the loaded shards until the first forward pass, beside the raised ones.
    raised = sum(allocated(u.shard_elements * u.loaded_dtype.itemsize) for u in units.all if u.dtype is not u.loaded_dtype)
    host = 0
    if options.offload_params:
        host = sum(parameters.values()) + sharded_gradients + states_bytes
        states_bytes = temporary = sharded_gradients = raised = 0
        parameters = dict.fromkeys(_PARAMETERS, 0)
    stored = {item: sum(t.allocated_bytes for t in units.whole if t.item is item) for item in (Item.QUANTIZATION_STATE, Item.BUFFERS)}
    stored |= parameters
    loaded = stored | {Item.WEIGHTS: stored[Item.WEIGHTS] + raised}
    stored[Item.OPTIMIZER_STATES] = states_bytes
    seen = {m.tensor.pattern: u.gathered_dtype for u in units.all for m in u.members}
    tensors = as_seen(static.tensors, seen)
    trains_frozen = any(u.trains and not m.tensor.trainable for u in units.all for m in u.members)
    return Share(
        tensors=tensors,
        stored=stored,
        loaded=loaded,
        loaded_communication_bytes=_building_bytes(units),
        gradients_bytes=sharded_gradients,
        # The flat gradient is let go of as the next forward pass begins: torch, _runtime_utils.py, _reset_flat_param_grad_info_if_needed.
        gradients_rest=options.use_orig_params,
        waiting_gradients_bytes=sum(u.flat_gradient_bytes for u in units.all) if accumulates else 0,
        gradients_have_places=True,
        keeps_layer_inputs=keeps_layer_inputs,
        kept_gradients=Fraction(sharded_gradients, max(gradient_bytes(tensors), 1)),
        update_temporary_bytes=temporary,
        paged_bytes=sum(s.paged_bytes for s in states),
        communication=_communication(units, options, recomputes=recomputes),
        ending_communication_bytes=_ending_bytes(units),
        host_bytes=host,
        outside_bytes=communicator_bytes(recipe.parallel.num_gpus),
        notices=_notices(recipe, trains_frozen=trains_frozen, keeps_layer_inputs=keeps_layer_inputs),
    )


def _recomputes_units(recipe: Recipe, model_type: str) -> bool:
    """Whether layers run without gradients first, and for the backward pass again, each as a unit of FSDP.

    In the second run torch hooks the input of a frozen unit, to know when its gradient is there. That input is a leaf, cut off by the
    checkpoint; the hook names the node that adds up its gradient, which owns it: a circle through C++ that holds the input and its gradient
    until the hooks are taken away as the backward pass ends.

    Source: torch 2.2 and 2.13, utils/checkpoint.py, CheckpointFunction.backward; distributed/fsdp/_runtime_utils.py,
    _register_post_backward_reshard_only_hook and _finalize_params; autograd/graph.py, register_multi_grad_hook (`grad_fns`).
    """
    training = recipe.training
    assert training is not None
    return training.gradient_checkpointing and training.use_reentrant and recipe.stack.checkpoints_layers_from_outside(model_type)


def _notices(recipe: Recipe, *, trains_frozen: bool, keeps_layer_inputs: bool) -> tuple[Notice, ...]:
    training = recipe.training
    accumulates = training is not None and training.gradient_accumulation_steps > 1
    said = (
        (waiting_gradients("FSDP1", recipe.stack), accumulates),
        (_TRAINS_FROZEN, trains_frozen),
        (_KEEPS_LAYER_INPUTS, keeps_layer_inputs),
    )
    return tuple(notice for notice, applies in said if applies)


def _item(unit: Unit) -> Item:
    return Item.ADAPTER_WEIGHTS if all(m.tensor.item is Item.ADAPTER_WEIGHTS for m in unit.members) else Item.WEIGHTS


# -- units ------------------------------------------------------------------------------------------------------------------------------


def units_of(recipe: Recipe, tensors: tuple[StoredTensor, ...]) -> Units:
    """All parameters by unit.

    Source: accelerate, utils/dataclasses.py, FullyShardedDataParallelPlugin.set_auto_wrap_policy; peft, utils/other.py,
    fsdp_auto_wrap_policy.

    Raises:
        RequestError: for parameters that torch does not put into one.
    """
    if recipe.parallel.num_gpus == 1:
        raise RequestError(
            "hardware.num_gpus: on one GPU torch makes NO_SHARD of FSDP1, which is not modelled; accepted: 2 or more, or "
            "hardware.fsdp_config.version 2",
            field="hardware.num_gpus",
        )
    whole: list[StoredTensor] = []
    groups: dict[tuple[int | None, str], list[Member]] = {}
    ordered = [t for t in in_order(tensors) if t.item in _PARAMETERS]
    own = {_module(t) for t in ordered if recipe.adapter is not None and t.trainable and t.pattern.endswith(".weight")}
    for tensor in in_order(tensors):
        if tensor.item not in _PARAMETERS:
            whole.append(tensor)
            continue
        number = tensor.raw_bytes // tensor.dtype.itemsize
        key = tensor.indices[0][0] if tensor.indices else None, _module(tensor)[1] if _module(tensor) in own else ""
        groups.setdefault(key, []).append(Member(tensor=tensor, num_elements=number))
    units = [_unit(recipe, tuple(members), layer, is_inside=bool(module)) for (layer, module), members in groups.items()]
    numbers = sorted({u.layer for u in units if u.layer is not None})
    return Units(
        root=next((u for u in units if u.layer is None and not u.is_inside), None),
        layers=tuple(tuple(sorted((u for u in units if u.layer == n), key=lambda u: u.is_inside)) for n in numbers),
        inside_root=tuple(u for u in units if u.layer is None and u.is_inside),
        whole=tuple(whole),
    )


def _module(tensor: StoredTensor) -> tuple[tuple[tuple[int, ...], ...], str]:
    return tensor.indices, tensor.pattern.rpartition(".")[0]


def _unit(recipe: Recipe, members: tuple[Member, ...], layer: int | None, *, is_inside: bool) -> Unit:
    tensors = [m.tensor for m in members]
    options, training = recipe.parallel.fsdp, recipe.training
    assert training is not None
    _check(tensors, layer, keeps_parameters=options.use_orig_params)
    quantization = recipe.quantization
    # The Trainer makes the type of packed weights that of the mixed precision, so that they are not cast.
    precision = quantization.storage_dtype if quantization is not None and quantization.kind.is_4bit else training.autocast_dtype
    return Unit(
        members=members,
        layer=layer,
        is_inside=is_inside,
        num_ranks=recipe.parallel.num_gpus,
        precision=precision,
        raises=training.autocast_dtype is not None,
        keeps_parameters=options.use_orig_params,
    )


def _check(tensors: list[StoredTensor], layer: int | None, *, keeps_parameters: bool) -> None:
    """Source: torch, distributed/fsdp/_flat_param.py, FlatParamHandle._validate_tensors_to_flatten; _init_utils.py,
    _verify_managed_params.
    """
    where = "the root" if layer is None else "a layer"
    packed = [t for t in tensors if not t.dtype.is_floating_point]
    if packed and packed[0].quantization is not None and packed[0].quantization.is_4bit:
        field = "quantization.bnb_4bit_quant_storage"
        raise RequestError(
            f"{field}: FSDP1 puts the parameters of a layer into one, and torch refuses integers there; accepted: the dtype of the other "
            "weights, or hardware.fsdp_config.version 2",
            field=field,
        )
    if packed:
        raise RequestError(f"{_FIELD}: FSDP1 refuses LLM.int8 weights, which are integers; accepted: 4-bit or 16-bit weights", field=_FIELD)
    scalar = next((t for t in tensors if not t.shape), None)
    if scalar is not None:
        raise RequestError(f"{_FIELD}: FSDP1 refuses parameters without a dimension, such as {scalar.pattern}; accepted: 2", field=_FIELD)
    types = {t.dtype: t for t in reversed(tensors)}
    if len(types) > 1:
        named = " and ".join(f"{t.pattern} ({dtype.value})" for dtype, t in list(types.items())[:2])
        raise RequestError(
            f"{_FIELD}: FSDP1 puts the parameters of {where} into one and refuses several types: {named}; accepted: weights of one type, "
            "or 2",
            field=_FIELD,
        )
    if not keeps_parameters and len({t.trainable for t in tensors}) > 1:
        field = "hardware.fsdp_config.use_orig_params"
        raise RequestError(
            f"{field}: false needs the parameters of {where} to be all trained or all frozen; accepted: true, or version 2", field=field
        )


# -- what comes and goes ----------------------------------------------------------------------------------------------------------------


def _building_bytes(units: Units) -> int:
    """The most that is alive beside the shards while they are made, one unit after the other [bytes].

    A unit is moved to the card and put together there, twice its size; before the first step the places of the gathered parameter are made
    once, under mixed precision also in the type of the shard.

    Source: torch, distributed/fsdp/_init_utils.py, _init_param_handle_from_module; _flat_param.py, FlatParamHandle.flatten_tensors and
    init_flat_param_attributes.
    """
    return max((u.num_ranks * u.shard_elements * max(2 * u.loaded_dtype.itemsize, u.dtype.itemsize) for u in units.all), default=0)


def forward_bytes(units: Units, options: Fsdp) -> int:
    """The most that is gathered at once going forward, casts included [bytes].

    The root stays from the beginning on, other units while they run; without resharding all stay.
    """
    root = _gathered(units.root)
    arriving = 0 if units.root is None else units.root.cast_bytes + units.root.gathered_bytes
    if not options.reshard_after_forward:
        everything = sum(u.gathered_bytes for u in units.all)
        return max(everything + max((u.cast_bytes for layer in units.layers[-1:] for u in layer[-1:]), default=0), arriving)
    return max(arriving, root + max(_going_through(layer) for layer in (*units.layers, units.inside_root)))


def _going_through(layer: tuple[Unit, ...]) -> int:
    """A layer as it arrives, or beside it a module inside as that arrives [bytes]."""
    outer = [u for u in layer if not u.is_inside]
    inner = max((_arriving(u) for u in layer if u.is_inside), default=0)
    return max(sum(map(_arriving, outer)), sum(u.gathered_bytes for u in outer) + inner)


def backward_bytes(units: Units, options: Fsdp, *, recomputes: bool = False) -> int:
    """The most that is gathered at once going back, casts included [bytes].

    BACKWARD_PRE gathers the next unit before the gradients of the one that runs are there, so that two are; the others gather it after that
    one is gone, unless it is frozen: a frozen unit goes when its input has a gradient, just after the next one has been gathered for it.

    A unit that ran without gradients, inside a reentrant checkpoint, is not gathered ahead; it goes through forward and back before the
    one below it does.

    Args:
        recomputes: whether units are run again within the backward pass (`_recomputes_units`).

    Source: torch, distributed/fsdp/_runtime_utils.py, _pre_backward_hook, _get_handle_to_prefetch (`_needs_pre_backward_unshard`),
    _post_backward_hook and _register_post_backward_reshard_only_hook.
    """
    root = _gathered(units.root)
    if not options.reshard_after_forward:
        return sum(u.gathered_bytes for u in units.all)
    ahead = options.backward_prefetch is BackwardPrefetch.PRE
    found = [root + _going_back(layer, ahead=ahead) for layer in (*units.layers, units.inside_root)]
    if recomputes:
        return max((*found, *(root + _going_through(layer) for layer in units.layers)))
    for before, after in pairwise(units.layers):  # gone back through in the other order
        if ahead or not after[0].trains:
            beside = after[1].gathered_bytes if ahead and len(after) > 1 else 0
            then = _arriving(before[-1]) if ahead and len(before) > 1 else 0
            pair = after[0].gathered_bytes + before[0].gathered_bytes
            found.append(root + pair + max(before[0].cast_bytes + beside, then))
    return max(found, default=root)


def _going_back(layer: tuple[Unit, ...], *, ahead: bool) -> int:
    """The largest instant within a layer; of modules inside two at once where they are gathered ahead [bytes]."""
    inside = [u for u in layer if u.is_inside]
    outer = [u for u in layer if not u.is_inside]
    within = [_arriving(u) for u in inside]
    if ahead:
        within += [after.gathered_bytes + _arriving(before) for before, after in pairwise(inside)]
    return max(sum(map(_arriving, outer)), sum(u.gathered_bytes for u in outer) + max(within, default=0))


def _gathered(unit: Unit | None) -> int:
    return 0 if unit is None else unit.gathered_bytes


def _arriving(unit: Unit) -> int:
    return unit.cast_bytes + unit.gathered_bytes


def _waiting_bytes(unit: Unit | None) -> int:
    """Gradients of the root that are there long before those of the embedding, for which they wait [bytes]."""
    if unit is None or not unit.trains:
        return 0
    late = [m for m in unit.members if _is_embedding(m.tensor)]
    tied = not any(is_head(m.tensor) for m in unit.members)
    early = [m for m in unit.members if tied or m not in late]
    return sum(allocated(m.num_elements * unit.gathered_dtype.itemsize) for m in early)


def _is_embedding(tensor: StoredTensor) -> bool:
    return "embed" in tensor.pattern or "wte" in tensor.pattern


def _communication(units: Units, options: Fsdp, *, recomputes: bool) -> Mapping[Phase, int]:
    """Gathered parameters and gradients of one unit, by phase: upper bounds.

    Backwards the gradients of the unit that runs are counted as autograd makes them and put together, and with them what waits in the root.
    """
    forward, backward = forward_bytes(units, options), backward_bytes(units, options, recomputes=recomputes)
    at_loss = _gathered(units.root) if options.reshard_after_forward else backward
    made = max((u.gradients_bytes + u.flat_gradient_bytes for layer in units.layers for u in layer), default=0)
    offloads = max((u.shard_bytes for u in units.all), default=0) if options.offload_params else 0
    return {
        Phase.FORWARD: forward + offloads,
        Phase.LOSS: at_loss,
        Phase.BACKWARD: backward + _waiting_bytes(units.root) + made + offloads,
    }


def _ending_bytes(units: Units) -> int:
    """The root as its backward pass ends: gathered, its gradients, and they put together [bytes]."""
    root = units.root
    return 0 if root is None else root.gathered_bytes + root.gradients_bytes + root.flat_gradient_bytes
