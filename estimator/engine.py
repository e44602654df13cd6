"""The analytic engine: static memory, the step on the tape, the optimizer's update, put together phase by phase."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, assert_never

from estimator.allocator import Head, reserved_bytes, reserved_loaded_bytes
from estimator.allocator_settings import AllocatorSettings
from estimator.blocks.families import FAMILIES
from estimator.device import context_bytes, device_bytes, same_kernels, workspaces_bytes
from estimator.errors import RequestError
from estimator.estimate import Deferred, Engine, Estimate, Holding, LineItem, Notice, PhaseEstimate, RankEstimate
from estimator.extent import Snapshot
from estimator.inventory import Inventory
from estimator.kv_cache import is_cache_modelled
from estimator.loading import transient_bytes, unsplit_bytes
from estimator.parallelism import tensor
from estimator.parallelism.nccl import communicator_bytes
from estimator.parallelism.options import Parallel, Strategy
from estimator.parallelism.share import Share, whole
from estimator.phases import Basis, Item, Phase
from estimator.recipe import Attention, Loss, ObjectiveKind, Recipe, Training
from estimator.reservation import held_without_limit, reservation
from estimator.schedule import Schedule
from estimator.static_memory import StaticMemory, static_memory
from estimator.step import Program, Regime, compiles_decoding, generation_regimes, regime_of, run_generation, run_step, schedule_step
from estimator.storage import StoredTensor
from estimator.units import allocated

if TYPE_CHECKING:
    from estimator.parallelism.cards import Card

INDEX_BYTES = 8  # token ids, labels and masks are int64
# input_ids and attention_mask as a tokenizer makes them, and the positions that `generate` makes of them and holds to its end.
# Source: transformers, generation/utils.py, generate and _prepare_position_ids_for_generation.
_NUM_GENERATION_INPUTS = 3

_STATIC = (Item.WEIGHTS, Item.QUANTIZATION_STATE, Item.BUFFERS, Item.ADAPTER_WEIGHTS)
# What follows from shapes and types alone, in every phase; the rest rests on kernels and on the order of events.
_EXACT = (*_STATIC, Item.OPTIMIZER_STATES, Item.CHECKPOINTS, Item.KV_CACHE)
# Between steps all gradients are there, or none, and of the activations the inputs alone; at a phase's worst instant a part of them.
_EXACT_BETWEEN_STEPS = (*_EXACT, Item.GRADIENTS, Item.ACTIVATIONS)
# Of the last position, all there at once.
_EXACT_DECODING = (*_EXACT, Item.LOGITS)
# Fields of a config by which a model hands out what every layer makes.
_KEPT_OUTPUTS = ("output_hidden_states", "output_attentions")
_LOAD_ONLY = "{} is not modelled: only what is stored after loading is given, and that is exact."
_COMPILED = Notice(
    code="compiled_decoding",
    message="with a static cache generate compiles the decoding of an unquantized model (torch.compile, reduce-overhead): what the "
    "compiler fuses away and what CUDA graphs keep in a pool of their own is not modelled; disable_compile=True is what this answer "
    "describes, but for keys and values copied for all heads.",
)
_BORROWED = Notice(
    code="card_without_layers",
    message="one of the cards holds no layer; it is answered for as if it held one with its adapter, which is that much too high.",
)
_STEP_PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Everything of an estimate that does not depend on batch and length."""

    static: StaticMemory
    stored: Mapping[Item, int]
    """Between steps, inputs of the step left out [bytes]."""
    accumulates: bool
    share: Share
    """What one rank has of the static memory."""
    load: PhaseEstimate
    workspace_bytes: int
    unsplit_bytes: int
    """Of blocks larger than the weights in them [bytes]."""
    context_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The card as far as the allocator goes."""

    usable_bytes: int | None = None
    """What the whole process can have; None for a card without a limit [bytes]."""
    settings: AllocatorSettings | None = None
    """PyTorch's defaults if None."""


UNLIMITED = Device()


def estimate(inventory: Inventory, recipe: Recipe, traced: Program | None = None, device: Device = UNLIMITED) -> Estimate:
    """Memory of one run, phase by phase.

    Args:
        inventory: of the model.
        recipe: of the run.
        traced: the training step as a trace saw it; it then stands for the closed forms.
        device: that it runs on.

    Raises:
        RequestError: if the libraries would refuse the combination.
    """
    if recipe.parallel.is_spread and recipe.parallel.strategy is Strategy.DEVICE_MAP:
        return _over_cards(inventory, recipe, traced, device)
    if recipe.parallel.is_spread and recipe.parallel.strategy is Strategy.TENSOR_PARALLEL:
        return _in_slices(inventory, recipe, device)
    return _on_one_card(inventory, recipe, traced, device, replays=not recipe.parallel.is_spread)


def _on_one_card(inventory: Inventory, recipe: Recipe, traced: Program | None, device: Device, *, replays: bool) -> Estimate:
    structure = recipe.without_sizes()
    if traced is not None:
        seen = traced.schedule if replays else None
        prepared = _prepared(inventory, structure)
        held = _Held(inventory=inventory, recipe=recipe, prepared=prepared, device=device, schedule=lambda: seen)
        return replace(_training(held, traced, _BASIS_TRACED), engine=Engine.TRACE)
    reason = why_not_modelled(inventory, recipe)
    if reason is not None:
        return _load_only(_prepared(inventory, structure), Notice(code="not_modelled", message=reason))
    try:
        if recipe.training is not None:
            regime = regime_of(recipe, inventory)
            found = _parts(inventory, structure, regime)
            schedule = partial(_schedule, inventory, structure, regime) if replays else _no_schedule
            held = _Held(inventory=inventory, recipe=recipe, prepared=found.prepared, device=device, schedule=schedule)
            return _training(held, found.program, _BASIS, found.keeping)
        if recipe.inference is not None:
            return _inference(inventory, recipe, structure, _prepared(inventory, structure))
    except NotImplementedError as missing:  # a block met something of this recipe that it has no rule for
        reason = _LOAD_ONLY.format(f"The step with {missing}")
        return _load_only(_prepared(inventory, structure), Notice(code="not_modelled", message=reason))
    return _load_only(_prepared(inventory, structure))


def loaded(inventory: Inventory, recipe: Recipe) -> Estimate:
    """What one card stores after loading, and nothing of what follows: for recipes whose step has still to be found out."""
    return _load_only(_prepared(inventory, recipe.without_sizes()), Notice(code="not_modelled", message=_LOAD_ONLY.format("The step")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the estimate of a training step is put together from, the same for all batches and lengths of one regime."""

    prepared: Prepared
    program: Program
    """The step as one rank runs it."""
    keeping: Program | None
    """The step with the gradients it has made so far, where a rank keeps a part of each (`Share.kept_gradients`)."""


def parts(inventory: Inventory, recipe: Recipe) -> Parts:
    """The parts of a training step; only where `has_closed_forms`."""
    return _parts(inventory, recipe.without_sizes(), regime_of(recipe, inventory))


@lru_cache(maxsize=256)
def _parts(inventory: Inventory, structure: Recipe, regime: Regime) -> Parts:
    prepared = _prepared(inventory, structure)
    return Parts(
        prepared=prepared,
        program=_shared_program(inventory, structure, prepared, regime),
        keeping=_keeping_program(inventory, structure, prepared, regime),
    )


def has_closed_forms(inventory: Inventory, recipe: Recipe) -> bool:
    """Whether closed forms know the training step of a recipe.

    Raises:
        RequestError: if the libraries would refuse the combination.
    """
    if recipe.training is None or why_not_modelled(inventory, recipe) is not None:
        return False
    try:
        parts(inventory, recipe)
    except NotImplementedError:  # a block met something of this recipe that it has no rule for
        return False
    return True


def why_not_modelled(inventory: Inventory, recipe: Recipe) -> str | None:
    """A sentence when only the load can be answered for; None when the step is modelled."""
    if recipe.training is None and recipe.inference is None:
        return None
    reason = _unknown_step(inventory, recipe)
    return None if reason is None else _LOAD_ONLY.format(reason)


def _unknown_step(inventory: Inventory, recipe: Recipe) -> str | None:
    if recipe.training is not None and recipe.training.objective.kind is not ObjectiveKind.SFT:
        return f"The step of objective {recipe.training.objective.kind.value!r}"
    if inventory.is_stored:
        return f"The step of {inventory.model_class}, known by its checkpoint's files alone,"
    family = FAMILIES.get(inventory.model_type)
    if family is None or inventory.output_embedding is None:
        return f"The step of {inventory.model_class} ({inventory.model_type})"
    if recipe.stack.experts_are_modules and _has_experts(inventory):
        return f"The step of {inventory.model_class} under transformers 4, which runs experts one by one,"
    refused = next(filter(inventory.config.get, _KEPT_OUTPUTS), None) or family.refuses(inventory.config)
    if refused is not None:
        return f"The step of this {inventory.model_type} config ({refused})"
    if recipe.attention is Attention.FLEX_ATTENTION:
        return "The step under flex_attention"
    if recipe.inference is not None and not is_cache_modelled(inventory):
        return f"The key/value cache of {inventory.model_type}"
    return None


def _has_experts(inventory: Inventory) -> bool:
    return any(inventory.config.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts"))


# -- layers on several cards ------------------------------------------------------------------------------------------------------------


def _over_cards(inventory: Inventory, recipe: Recipe, traced: Program | None, device: Device) -> Estimate:
    """Each card's part by itself; the answer is that of the card that needs most.

    Source: accelerate, big_modeling.py, dispatch_model; hooks.py, AlignDevicesHook.
    """
    from estimator.parallelism.cards import cards  # as below: one card needs none of it

    if traced is not None:
        raise RequestError("engine: a trace runs on one card; accepted with 'device_map': 'analytic'", field="engine")
    alone = replace(recipe, parallel=Parallel())
    parts = cards(inventory, recipe.without_sizes())
    answers = [_on_one_card(card.inventory, alone, None, device, replays=False) for card in parts]
    if not parts[0].has_head:
        answers[0] = _with_returned_logits(answers[0], inventory, recipe)
    ranks = tuple(_rank(card, answer) for card, answer in zip(parts, answers, strict=True))
    largest_answer = max(answers, key=lambda answer: answer.device_bytes)
    borrowed = tuple(_BORROWED for card in parts if card.borrows_layer)[:1]
    # Parameters are counted over all cards.
    parameters = static_memory(inventory, alone).parameters
    return replace(largest_answer, ranks=ranks, parameters=parameters, notices=(*largest_answer.notices, *borrowed))


def _rank(card: "Card", answer: Estimate) -> RankEstimate:
    peak = answer.peak
    return RankEstimate(
        rank=card.number,
        phase=peak.phase,
        allocated_bytes=peak.allocated_bytes,
        reserved_bytes=answer.reserved_bytes,
        device_bytes=answer.device_bytes,
        holds=card.holds,
    )


def _with_returned_logits(answer: Estimate, inventory: Inventory, recipe: Recipe) -> Estimate:
    """The model's outputs travel to the card of its inputs, and are turned into float32 there.

    Source: accelerate, hooks.py, AlignDevicesHook.post_forward (io_same_device); utils/operations.py, convert_outputs_to_fp32.
    """
    training = recipe.training
    if training is None or training.loss is not Loss.STOCK:
        return answer
    batch, length = training.shape
    vocabulary = inventory.config["vocab_size"]
    assert isinstance(vocabulary, int)
    logits = batch * length * vocabulary
    widths = (recipe.dtype.itemsize,) if training.autocast_dtype is None else (training.autocast_dtype.itemsize, 4)
    returned = sum(allocated(logits * width) for width in widths)
    return _with_exchange(answer, {Phase.LOSS: returned})


def _with_exchange(answer: Estimate, exchanged: Mapping[Phase, int], outside_bytes: int = 0) -> Estimate:
    """With what cards give each other beside the work of one.

    Args:
        exchanged: by phase [bytes].
        outside_bytes: outside torch's allocator [bytes].
    """

    def item(num_bytes: int) -> LineItem:
        return LineItem(item=Item.COMMUNICATION, num_bytes=num_bytes, basis=Basis.MODELLED)

    phases = tuple(replace(p, items=(*p.items, item(exchanged[p.phase]))) if p.phase in exchanged else p for p in answer.phases)
    # What the new peak exceeds the former one by is held by the allocator, and seen from outside.
    more = max(p.allocated_bytes for p in phases) - answer.peak.allocated_bytes
    seen = more + outside_bytes
    held = answer.holding.get()
    holding = replace(
        held,
        reserved_bytes=held.reserved_bytes + more,
        device_bytes=held.device_bytes + seen,
        without_pressure_bytes=held.without_pressure_bytes + seen,
    )
    return replace(
        answer,
        phases=phases,
        holding=Deferred.of(holding),
        quick_device_bytes=answer.quick_device_bytes + seen,
        least_device_bytes=answer.least_device_bytes + seen,
        unpressed=None,
    )


_OTHER_PLAN = Notice(
    code="plan_of_other_version",
    message=f"layers are cut as transformers {'.'.join(map(str, tensor.TRANSFORMERS))} cuts them; other versions may keep some whole",
)


def _in_slices(inventory: Inventory, recipe: Recipe, device: Device) -> Estimate:
    """The first rank of tensor parallelism, which has the largest slices."""
    num_gpus = recipe.parallel.num_gpus
    alone = replace(recipe, parallel=Parallel())
    answer = _on_one_card(tensor.rank(inventory, num_gpus), alone, None, device, replays=False)
    exchanged = {}
    if recipe.inference is not None:
        gathered = tensor.gathered_bytes(inventory, num_gpus, recipe.inference.batch_size, recipe.dtype.itemsize)
        exchanged = dict.fromkeys((Phase.PREFILL, Phase.DECODE), gathered)
    # Parameters are counted over all cards.
    parameters = static_memory(inventory, alone).parameters
    other = () if recipe.stack.transformers[:2] == tensor.TRANSFORMERS else (_OTHER_PLAN,)
    spread = _with_exchange(answer, exchanged, communicator_bytes(num_gpus))
    return replace(spread, parameters=parameters, notices=(*answer.notices, *other))


# -- shared parts -----------------------------------------------------------------------------------------------------------------------


def _on_any_card(recipe: Recipe) -> Recipe:
    """The recipe for all cards on which a step allocates the same: what is replayed for one of them is kept for all."""
    return replace(recipe, compute_capability=same_kernels(recipe.compute_capability), num_multiprocessors=0)


@lru_cache(maxsize=256)
def _prepared(inventory: Inventory, recipe: Recipe) -> Prepared:
    static = static_memory(inventory, recipe)
    training = recipe.training
    accumulates = training is not None and training.gradient_accumulation_steps > 1
    share = _part(recipe, static) if training is not None and recipe.parallel.is_spread else whole(static, accumulates=accumulates)
    stored = dict(share.stored)
    loaded = _loaded(inventory, static, recipe) | dict(share.loaded)
    if share.loaded_communication_bytes > loaded[Item.TEMPORARY]:  # weights are quantized before models are made equal
        loaded |= {Item.TEMPORARY: 0, Item.COMMUNICATION: share.loaded_communication_bytes}
    if recipe.of_reference is not None:
        second = static_memory(inventory, recipe.of_reference)
        _add_reference(stored, second, second.weights_bytes)
        _add_reference(loaded, second, second.loaded_weights_bytes)
    return Prepared(
        static=static,
        stored=stored,
        accumulates=accumulates,
        share=share,
        load=_phase(Phase.LOAD, loaded),
        workspace_bytes=workspaces_bytes(recipe.compute_capability, training=training is not None),
        unsplit_bytes=unsplit_bytes(inventory, recipe) if _unknown_step(inventory, recipe) is None else 0,
        context_bytes=context_bytes(recipe.num_multiprocessors),
    )


def _part(recipe: Recipe, static: StaticMemory) -> Share:
    from estimator.parallelism.shares import share_of

    return share_of(recipe, static)


def _add_reference(held: dict[Item, int], second: StaticMemory, weights_bytes: int) -> None:
    """An objective's second model, its weights as they are by then; what passes while it is loaded is in `transient_bytes`."""
    held[Item.WEIGHTS] += weights_bytes
    held[Item.QUANTIZATION_STATE] += second.quantization_state_bytes
    held[Item.BUFFERS] += second.buffers_bytes


def _loaded(inventory: Inventory, static: StaticMemory, recipe: Recipe) -> dict[Item, int]:
    return {
        Item.WEIGHTS: static.loaded_weights_bytes,
        Item.QUANTIZATION_STATE: static.quantization_state_bytes,
        Item.BUFFERS: static.buffers_bytes,
        Item.ADAPTER_WEIGHTS: static.adapter_weights_bytes,
        Item.TEMPORARY: transient_bytes(inventory, recipe, adapter_bytes=static.adapter_weights_bytes),
    }


def between_steps(prepared: Prepared, program: Program) -> dict[Item, int]:
    """What stays from one step to the next, inputs left out [bytes]."""
    between = dict(prepared.stored)
    between[Item.WEIGHTS] += program.weights_growth_bytes
    between[Item.WORKSPACE] = prepared.workspace_bytes + prepared.unsplit_bytes
    return between


def _bases(exact: tuple[Item, ...]) -> dict[Item, Basis]:
    return {item: Basis.EXACT if item in exact else Basis.MODELLED for item in Item}


_BASIS = _bases(_EXACT)
_BASIS_TRACED = {item: Basis.TRACED if basis is Basis.MODELLED else basis for item, basis in _BASIS.items()} | {
    Item.WORKSPACE: Basis.MODELLED
}
_BASIS_BETWEEN_STEPS = _bases(_EXACT_BETWEEN_STEPS)
_BASIS_DECODING = _bases(_EXACT_DECODING)


def _phase(phase: Phase, held: Mapping[Item, int], basis_of: Mapping[Item, Basis] = _BASIS) -> PhaseEstimate:
    items = tuple([LineItem(item, num_bytes, basis) for item, basis in basis_of.items() if (num_bytes := held.get(item))])
    return PhaseEstimate(phase=phase, items=items)


def _load_only(prepared: Prepared, *notices: Notice) -> Estimate:
    load = prepared.load
    return Estimate(
        parameters=prepared.static.parameters,
        phases=(load,),
        steady_state_bytes=None,
        holding=_modelled(prepared, reserved_loaded_bytes(load.allocated_bytes)),
        quick_device_bytes=_holding(prepared, reserved_loaded_bytes(load.allocated_bytes), Basis.MODELLED).device_bytes,
        least_device_bytes=device_bytes(reserved_bytes=load.allocated_bytes, context_bytes=prepared.context_bytes),
        notices=notices,
    )


def _modelled(prepared: Prepared, reserved: int) -> Deferred[Holding]:
    return Deferred(lambda: _holding(prepared, reserved, Basis.MODELLED))


def _holding(prepared: Prepared, reserved: int, basis: Basis, unpressed: int | None = None) -> Holding:
    def shown(num_bytes: int) -> int:
        context = prepared.context_bytes + prepared.share.outside_bytes
        return device_bytes(reserved_bytes=num_bytes, context_bytes=context, paged_bytes=prepared.share.paged_bytes)

    return Holding(
        reserved_bytes=reserved,
        device_bytes=shown(reserved),
        basis=basis,
        without_pressure_bytes=shown(reserved if unpressed is None else unpressed),
    )


# -- training ---------------------------------------------------------------------------------------------------------------------------


def input_sizes(training: Training, batch: int, length: int) -> list[int]:
    """Elements of a micro-batch's tensors; those of one element per sequence, or less, are left out.

    Source: transformers, data/data_collator.py (ids, labels, mask); trl 1.16, trainer/dpo_trainer.py and reward_trainer.py,
    DataCollatorForPreference; grpo_trainer.py, GRPOTrainer._generate_and_score_completions.
    """
    objective = training.objective
    tokens = batch * length * objective.sequences_per_example
    match objective.kind:
        case ObjectiveKind.SFT | ObjectiveKind.DPO:
            return [tokens] * 3
        case ObjectiveKind.REWARD | ObjectiveKind.CLASSIFICATION:
            return [tokens] * 2
        case ObjectiveKind.GRPO:
            prompt = batch * objective.prompt_length
            return [prompt, prompt, tokens - prompt, tokens - prompt]
        case _:
            assert_never(objective.kind)


def head_of(training: Training) -> Head:
    """How the loss is computed, as far as fragmentation goes."""
    has_logits = training.loss is Loss.STOCK and not training.objective.kind.is_classification
    return Head.FULL_LOGITS if has_logits else Head.FUSED


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What a replay of a training run takes."""

    inventory: Inventory
    recipe: Recipe
    prepared: Prepared
    device: Device
    schedule: Callable[[], Schedule | None]

    def modelled(self, peak_bytes: int, steady_bytes: int) -> Holding:
        """What the peak suggests."""
        training = self.recipe.training
        assert training is not None
        reserved = reserved_bytes(peak_bytes=peak_bytes, steady_bytes=steady_bytes, head=head_of(training))
        return _holding(self.prepared, reserved, Basis.MODELLED)

    def replayed(self, peak_bytes: int, steady_bytes: int) -> Holding:
        """The run on the allocator; where its allocations are not known one by one, what the peak suggests.

        Under a limit the allocator gives its cache back before it fails. A run that fails all the same is told by what it would hold
        without a limit.
        """
        prepared, schedule = self.prepared, self.schedule()
        if schedule is None:
            return self.modelled(peak_bytes, steady_bytes)
        free = self._free(schedule)
        limit = self.device.usable_bytes
        if limit is not None:
            limit -= device_bytes(reserved_bytes=0, context_bytes=prepared.context_bytes, paged_bytes=prepared.static.paged_bytes)
        least = reserved_loaded_bytes(peak_bytes)
        pressed = None
        # What is allocated at the peak does not shrink under pressure; paged states alone may leave nothing.
        if limit is not None and least <= limit < free:
            recipe = _on_any_card(self.recipe)
            pressed = reservation(self.inventory, recipe, schedule, self._inputs(), self.device.settings, limit)
        held = free if pressed is None else pressed.max_bytes
        holding = _holding(prepared, max(held, least), Basis.REPLAYED, unpressed=max(free, least))
        return holding if pressed is None else replace(holding, num_alloc_retries=pressed.num_alloc_retries)

    def unpressed_bytes(self, peak_bytes: int, steady_bytes: int, enough_bytes: int | None = None) -> int:
        """`Holding.without_pressure_bytes` of the same, for which no limit matters; see `Estimate.without_pressure_bytes` [bytes]."""
        schedule = self.schedule()
        if schedule is None:
            return self.modelled(peak_bytes, steady_bytes).without_pressure_bytes
        beside = _holding(self.prepared, 0, Basis.REPLAYED).device_bytes
        enough = None if enough_bytes is None else max(enough_bytes - beside, 0)
        return beside + max(self._free(schedule, enough), reserved_loaded_bytes(peak_bytes))

    def _free(self, schedule: Schedule, enough_bytes: int | None = None) -> int:
        recipe = _on_any_card(self.recipe)
        return held_without_limit(self.inventory, recipe, schedule, self._inputs(), self.device.settings, enough_bytes)

    def _inputs(self) -> list[int]:
        training = self.recipe.training
        assert training is not None
        return [INDEX_BYTES * n for n in input_sizes(training, *training.shape)]


def _schedule(inventory: Inventory, structure: Recipe, regime: Regime) -> Schedule:
    return _step_schedule(inventory, _on_any_card(structure), regime)


def _no_schedule() -> Schedule | None:
    """What a rank allocates is not known one by one."""
    return None


def _training(run: _Held, program: Program, basis_of: Mapping[Item, Basis], keeping: Program | None = None) -> Estimate:
    prepared, training = run.prepared, run.recipe.training
    assert training is not None
    batch, length = training.shape
    static, share = prepared.static, prepared.share
    inputs = training.gradient_accumulation_steps * sum(allocated(INDEX_BYTES * n) for n in input_sizes(training, batch, length))
    between = between_steps(prepared, program)
    between[Item.ACTIVATIONS] = inputs
    phases, peak = [prepared.load], prepared.load.allocated_bytes
    for phase in _STEP_PHASES:
        held = dict(between)
        held[Item.COMMUNICATION] = share.communication.get(phase, 0)
        if share.waiting_gradients_bytes:
            # Those of earlier micro-batches wait, all of them, and later ones are added in place.
            held[Item.GRADIENTS] = share.waiting_gradients_bytes
        basis = {**basis_of, Item.GRADIENTS: Basis.EXACT} if prepared.accumulates else basis_of
        step = _sum(held, largest(program.peaks[phase], batch, length).items())
        if keeping is not None and phase is Phase.BACKWARD:
            kept = largest(keeping.peaks[phase], batch, length).items()
            kept[Item.GRADIENTS] = int(kept.get(Item.GRADIENTS, 0) * share.kept_gradients)
            step = max(step, _sum(held, kept), key=lambda items: sum(items.values()))
        if share.ending_communication_bytes and phase is Phase.BACKWARD:
            ending = {**between, Item.COMMUNICATION: share.ending_communication_bytes, Item.GRADIENTS: share.gradients_bytes}
            step = max(step, ending, key=lambda items: sum(items.values()))
        phases.append(_phase(phase, step, basis))
        peak = max(peak, sum(step.values()))
    update = dict(between)
    update[Item.GRADIENTS] = share.gradients_bytes
    update[Item.TEMPORARY] = share.update_temporary_bytes
    update[Item.COMMUNICATION] = share.communication.get(Phase.OPTIMIZER_STEP, 0)
    phases.append(_phase(Phase.OPTIMIZER_STEP, update, _BASIS_BETWEEN_STEPS))
    steady, peak = sum(between.values()), max(peak, sum(update.values()))
    return Estimate(
        parameters=static.parameters,
        phases=tuple(phases),
        steady_state_bytes=steady + (share.gradients_bytes if share.gradients_rest else 0),
        holding=Deferred(lambda: run.replayed(peak, steady)),
        quick_device_bytes=run.modelled(peak, steady).device_bytes,
        least_device_bytes=device_bytes(
            reserved_bytes=peak, context_bytes=prepared.context_bytes + share.outside_bytes, paged_bytes=share.paged_bytes
        ),
        unpressed=partial(run.unpressed_bytes, peak, steady),
        paged_bytes=share.paged_bytes,
        host_bytes=share.host_bytes,
        notices=share.notices,
        kernels=program.kernels,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """The largest instant of a phase, and the sizes that make it so."""

    snapshot: Snapshot
    batch: int
    sequence: int
    keys: int = 0

    @property
    def num_bytes(self) -> int:
        """Before rounding [bytes]."""
        return self.snapshot.at(self.batch, self.sequence, self.keys)

    def items(self) -> dict[Item, int]:
        """Bytes per item, each storage rounded up as the allocator does [bytes]."""
        return self.snapshot.items(self.batch, self.sequence, self.keys)


def worst_instants(inventory: Inventory, recipe: Recipe) -> Mapping[Phase, Instant]:
    """What is alive at the largest instant of each phase that runs on the tape, every tensor with the name of its module and operator.

    Only for recipes whose step is modelled (`why_not_modelled`).
    """
    structure = recipe.without_sizes()
    training = recipe.training
    if training is not None:
        peaks = _named_step_program(*_shared_run(inventory, structure, _prepared(inventory, structure), regime_of(recipe, inventory))).peaks
        return {phase: largest(peaks[phase], *training.shape) for phase in _STEP_PHASES}
    if recipe.inference is not None:
        tensors = static_memory(inventory, structure).tensors
        return _generation_instants(recipe, inventory, lambda regime: run_generation(inventory, structure, tensors, regime, names=True))
    return {}


def weights_growth_bytes(inventory: Inventory, recipe: Recipe) -> int:
    """What the first forward pass adds to stored weights for good; only for recipes whose step is modelled [bytes]."""
    structure = recipe.without_sizes()
    if recipe.training is not None:
        return _shared_program(inventory, structure, _prepared(inventory, structure), regime_of(recipe, inventory)).weights_growth_bytes
    return _first_generation(inventory, recipe, structure).weights_growth_bytes if recipe.inference is not None else 0


def largest(snapshots: tuple[Snapshot, ...], batch: int, sequence: int, keys: int = 0) -> Instant:
    """The instant that is largest at these sizes."""
    worst = max(snapshots, key=lambda s: s.at(batch, sequence, keys))
    return Instant(snapshot=worst, batch=batch, sequence=sequence, keys=keys)


_Run = tuple[Inventory, Recipe, Regime, tuple[StoredTensor, ...] | None, bool]
"""What `_step_program` takes."""


def _shared_program(inventory: Inventory, recipe: Recipe, prepared: Prepared, regime: Regime) -> Program:
    return _step_program(*_shared_run(inventory, recipe, prepared, regime))


def _shared_run(inventory: Inventory, recipe: Recipe, prepared: Prepared, regime: Regime) -> _Run:
    """The step as one rank runs it; strategies that change nothing in it share the program of one card."""
    share = prepared.share
    tensors = None if share.tensors is prepared.static.tensors else share.tensors
    return inventory, _as_run(recipe, share), regime, tensors, share.keeps_layer_inputs


def _keeping_program(inventory: Inventory, recipe: Recipe, prepared: Prepared, regime: Regime) -> Program | None:
    """The step with the gradients it has made so far, for ranks that keep a part of each.

    A backward pass is largest at its beginning, where logits are, or towards its end, where gradients are: the one shows in the program
    that hands gradients on, the other in this one.
    """
    share = prepared.share
    if not share.kept_gradients:
        return None
    return _step_program(
        inventory, replace(_without_accumulation(recipe), parallel=Parallel()), regime, share.tensors, share.keeps_layer_inputs
    )


def _without_accumulation(recipe: Recipe) -> Recipe:
    assert recipe.training is not None
    return replace(recipe, training=replace(recipe.training, gradient_accumulation_steps=1))


def _as_run(recipe: Recipe, share: Share) -> Recipe:
    """The recipe of the step alone: gradients that have places of their own are handed on like those of a second micro-batch."""
    if not recipe.parallel.is_spread:
        return recipe
    training = recipe.training
    if training is not None and share.gradients_have_places:
        training = replace(training, gradient_accumulation_steps=2)
    return replace(recipe, training=training, parallel=Parallel())


@lru_cache(maxsize=256)
def _step_program(
    inventory: Inventory, recipe: Recipe, regime: Regime, tensors: tuple[StoredTensor, ...] | None, keeps_layer_inputs: bool
) -> Program:
    """The step without the names of its tensors: whoever asks for the one mostly asks to have it explained."""
    named = _named_step_program(inventory, recipe, regime, tensors, keeps_layer_inputs)
    return replace(named, peaks={phase: tuple(snapshot.unnamed() for snapshot in kept) for phase, kept in named.peaks.items()})


# A few times larger than without names.
@lru_cache(maxsize=32)
def _named_step_program(
    inventory: Inventory, recipe: Recipe, regime: Regime, tensors: tuple[StoredTensor, ...] | None, keeps_layer_inputs: bool
) -> Program:
    stored = static_memory(inventory, recipe).tensors if tensors is None else tensors
    return run_step(inventory, recipe, stored, regime, names=True, keeps_layer_inputs=keeps_layer_inputs)


@lru_cache(maxsize=64)
def _step_schedule(inventory: Inventory, recipe: Recipe, regime: Regime) -> Schedule:
    return schedule_step(inventory, recipe, static_memory(inventory, recipe).tensors, regime)


# -- inference --------------------------------------------------------------------------------------------------------------------------


def _inference(inventory: Inventory, recipe: Recipe, structure: Recipe, prepared: Prepared) -> Estimate:
    inference = recipe.inference
    assert inference is not None
    program = _first_generation(inventory, recipe, structure)
    between = between_steps(prepared, program)
    between[Item.ACTIVATIONS] = _NUM_GENERATION_INPUTS * allocated(INDEX_BYTES * inference.batch_size * inference.prompt_length)
    instants = _generation_instants(recipe, inventory, lambda regime: _generation_program(inventory, structure, regime))
    phases = (
        prepared.load,
        *(
            _phase(phase, _sum(between, worst.items()), _BASIS_DECODING if phase is Phase.DECODE else _BASIS)
            for phase, worst in instants.items()
        ),
    )
    peak = max(p.allocated_bytes for p in phases)
    steady = sum(between.values())
    held = _holding(prepared, reserved_bytes(peak_bytes=peak, steady_bytes=steady, head=Head.FUSED), Basis.MODELLED)
    return Estimate(
        parameters=prepared.static.parameters,
        phases=phases,
        steady_state_bytes=steady,
        holding=Deferred.of(held),
        quick_device_bytes=held.device_bytes,
        least_device_bytes=device_bytes(reserved_bytes=peak, context_bytes=prepared.context_bytes),
        kernels=program.kernels,
        notices=(_COMPILED,) if compiles_decoding(recipe) and Phase.DECODE in instants else (),
    )


def _sum(between: Mapping[Item, int], held: Mapping[Item, int]) -> dict[Item, int]:
    together = dict(between)
    for item, num_bytes in held.items():
        together[item] = together.get(item, 0) + num_bytes
    return together


def _generation_instants(recipe: Recipe, inventory: Inventory, program: Callable[[Regime], Program]) -> Mapping[Phase, Instant]:
    """The largest instants of reading the prompt and of the passes of one token, if there is any."""
    inference = recipe.inference
    assert inference is not None
    batch, prompt = inference.batch_size, inference.prompt_length
    worst: dict[Phase, Instant] = {}
    for regime, keys in generation_regimes(recipe, inventory):
        peaks = program(regime).peaks
        for phase, length in ((Phase.PREFILL, prompt), (Phase.DECODE, 1)):
            if phase in peaks:
                instant = largest(peaks[phase], batch, length, keys)
                worst[phase] = max(worst.get(phase, instant), instant, key=lambda i: i.num_bytes)
    return worst


def _first_generation(inventory: Inventory, recipe: Recipe, structure: Recipe) -> Program:
    regime, _ = next(iter(generation_regimes(recipe, inventory)))
    return _generation_program(inventory, structure, regime)


@lru_cache(maxsize=256)
def _generation_program(inventory: Inventory, recipe: Recipe, regime: Regime) -> Program:
    return run_generation(inventory, recipe, static_memory(inventory, recipe).tensors, regime)
