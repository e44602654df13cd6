"""Memory of one training run at many batches, lengths and accumulation steps at once: the engine's own sums, on arrays.

Every point equals the engine's quick answer for it, to the byte: what the allocator caches is modelled there, and not replayed. Points that
run the same program are worked out together: accumulating or not, beyond attention's window or not, and so many rows in a pass of a fused
loss.

Legend: B micro-batch, S sequence length, T = B·S tokens.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from estimator.allocator import IDLE_SHARE, SEGMENT_GRANULARITY_BYTES
from estimator.correction import margin_without_interval, radii
from estimator.device import device_bytes
from estimator.engine import INDEX_BYTES, between_steps, head_of, input_sizes, parts
from estimator.estimate import Estimate
from estimator.extent import Snapshot
from estimator.fused_loss import CHUNK_ROWS, TILE_ROWS
from estimator.inventory import Inventory
from estimator.parallelism.options import Strategy
from estimator.phases import Item, Phase
from estimator.recipe import Attention, Loss, Recipe, Training
from estimator.step import Program, copies_of_several
from estimator.units import allocated, ceil_div

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# Those under which a rank's memory is the sums of one card with its own share of what is stored.
STRATEGIES = (Strategy.SINGLE, Strategy.DDP, Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3)

# Beyond 2^59 bytes a point is answered with 2^61, and so is larger than any card: with its margins, int64 would not hold more.
LARGEST_BYTES = 1 << 59
SATURATED_BYTES = 1 << 61

# A training step knows the first of `extent.POWERS`: 1, B, S, B·S, S², B·S².
_NUM_POWERS = 6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sizes:
    """What varies: three arrays of one shape."""

    batch: Ints
    length: Ints
    steps: Ints

    @classmethod
    def of(cls, batch: Any, length: Any, steps: Any) -> "Sizes":
        """Sizes from numbers and arrays that go together."""
        arrays = np.broadcast_arrays(*(np.asarray(values, dtype=np.int64) for values in (batch, length, steps)))
        return cls(batch=arrays[0].ravel(), length=arrays[1].ravel(), steps=arrays[2].ravel())

    def __len__(self) -> int:
        return len(self.batch)

    def at(self, members: Any) -> "Sizes":
        """Those at some places."""
        return Sizes(batch=self.batch[members], length=self.length[members], steps=self.steps[members])

    def then(self, others: "Sizes") -> "Sizes":
        """These and others behind them."""
        pairs = ((self.batch, others.batch), (self.length, others.length), (self.steps, others.steps))
        batch, length, steps = map(np.concatenate, pairs)
        return Sizes(batch=batch, length=length, steps=steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Memory:
    """What each point takes, beside the CUDA context, which each card has of its own."""

    allocated_bytes: Ints
    """Peak [bytes]."""
    resident_bytes: Ints
    """What the card must hold at the peak, less the context [bytes]."""
    high_factors: Floats
    """Factors from estimate to upper end of the intervals of allocated and device bytes; NaN where there is none."""

    def device_bytes(self, context_bytes: int | Ints) -> Ints:
        """What the card must hold at the peak; with a column of contexts, one row for each [bytes]."""
        device: Ints = np.maximum(self.resident_bytes + context_bytes, self.allocated_bytes)
        return device

    def required_bytes(self, context_bytes: int | Ints) -> Ints:
        """What must be usable for a verdict of `fits` [bytes]: see `correction.required_bytes`."""
        device = self.device_bytes(context_bytes)
        with_margin: Floats = np.rint(device * (1 + margin_without_interval().share))
        has_interval = ~np.isnan(self.high_factors[0])
        if not has_interval.any():
            return with_margin.astype(np.int64)
        allocated_factor, device_factor = np.where(has_interval, self.high_factors, 1.0)
        high = np.maximum(np.ceil(self.allocated_bytes * allocated_factor), np.ceil(device * device_factor))
        required: Ints = np.where(has_interval, high, with_margin).astype(np.int64)
        return required


class Evaluator(Protocol):
    """Answers for one recipe at many sizes."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def is_quick(self) -> bool:
        """Whether many sizes cost hardly more than one."""

    def memory(self, sizes: Sizes) -> Memory:
        """What each point takes."""

    def programs(self, sizes: Sizes) -> Ints:
        """A number for each point; points with the same one run the same program, so that more tokens never take less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedForms:
    """Arrays through the closed forms; only for recipes whose step is modelled, on one card or under one of `STRATEGIES`."""

    inventory: Inventory
    recipe: Recipe
    is_quick: bool = True

    def memory(self, sizes: Sizes) -> Memory:
        peak, resident = np.empty(len(sizes), dtype=np.int64), np.empty(len(sizes), dtype=np.int64)
        bounds = np.full((2, len(sizes)), math.nan)
        for members in _groups(self.programs(sizes)):
            some = sizes.at(members)
            recipe = replace(self.recipe, training=_sized(self.recipe, some, 0))
            peak[members], resident[members], program = _memory(self.inventory, recipe, some)
            found = radii(recipe, program.kernels)
            if found is not None:
                bounds[:, members] = np.array([[math.exp(found[1])], [math.exp(found[2])]])
        return Memory(allocated_bytes=peak, resident_bytes=resident, high_factors=bounds)

    def programs(self, sizes: Sizes) -> Ints:
        return program_codes(self.inventory, self.recipe, sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneByOne:
    """Estimates, one for each point: for a traced step, and for several cards."""

    inventory: Inventory
    recipe: Recipe
    estimate: Callable[[Recipe], Estimate]
    context_bytes: int
    """That the estimates count [bytes]."""
    is_quick: bool = False

    def memory(self, sizes: Sizes) -> Memory:
        peak, resident = np.empty(len(sizes), dtype=np.int64), np.empty(len(sizes), dtype=np.int64)
        bounds = np.full((2, len(sizes)), math.nan)
        for point in range(len(sizes)):
            recipe = replace(self.recipe, training=_sized(self.recipe, sizes, point))
            found = self.estimate(recipe)
            peak[point], resident[point] = found.peak.allocated_bytes, found.quick_device_bytes - self.context_bytes
            known = radii(recipe, found.kernels)
            if known is not None:
                bounds[:, point] = math.exp(known[1]), math.exp(known[2])
        return Memory(allocated_bytes=peak, resident_bytes=resident, high_factors=bounds)

    def programs(self, sizes: Sizes) -> Ints:
        return program_codes(self.inventory, self.recipe, sizes)


def program_codes(inventory: Inventory, recipe: Recipe, sizes: Sizes) -> Ints:
    """A number for each point, the same only where accumulation and `step.regime_of` are."""
    training = recipe.training
    assert training is not None
    shape_length = sizes.batch * sizes.length if training.flattened else sizes.length
    window = inventory.config.get("sliding_window")
    is_beyond = (
        shape_length >= window if isinstance(window, int) and recipe.attention is Attention.SDPA else np.zeros(len(sizes), dtype=bool)
    )
    is_one = (sizes.batch == 1) | training.flattened if copies_of_several(recipe, inventory) else np.zeros(len(sizes), dtype=bool)
    passes = _pass_codes(training, inventory.config, sizes)
    codes: Ints = passes * 8 + is_one * 4 + is_beyond * 2 + (sizes.steps > 1)
    return codes


def _pass_codes(training: Training, config: Mapping[str, Any], sizes: Sizes) -> Ints:
    """See `scoring.rows_of`: rows of a pass where there are several, else 0."""
    none = np.zeros(len(sizes), dtype=np.int64)
    objective = training.objective
    positions = sizes.batch * objective.sequences_per_example * np.maximum(sizes.length - max(objective.prompt_length, 1), 0)
    match training.loss:
        case Loss.TRL_TILED:
            return np.where(positions > TILE_ROWS, TILE_ROWS, none)
        case Loss.TRL_CHUNKED:
            return np.where(positions > CHUNK_ROWS, CHUNK_ROWS, none)
        case Loss.LIGER:
            tokens = sizes.batch * sizes.length
            rows = ceil_div(tokens, ceil_div(config["vocab_size"], config["hidden_size"]))  # type: ignore[arg-type]
            # frexp's exponent is the bit length: both are below 2^53
            chunk = np.left_shift(1, np.frexp(np.asarray(rows - 1, dtype=np.float64))[1].astype(np.int64))
            return np.where(tokens > chunk, chunk, none)
        case _:
            return none


def _groups(codes: Ints) -> Iterator[Any]:
    """Places of each code."""
    known = distinct(codes)
    if len(known) == 1:
        yield slice(None)
        return
    for code in known:
        yield np.flatnonzero(codes == code)


def distinct(codes: Ints) -> list[int]:
    """The different codes, in ascending order; mostly there is one."""
    return [int(codes[0])] if len(codes) and (codes == codes[0]).all() else [int(code) for code in np.unique(codes)]


def _sized(recipe: Recipe, sizes: Sizes, point: int) -> Training:
    assert recipe.training is not None
    return replace(
        recipe.training,
        micro_batch_size=int(sizes.batch[point]),
        sequence_length=int(sizes.length[point]),
        gradient_accumulation_steps=int(sizes.steps[point]),
    )


def _memory(inventory: Inventory, recipe: Recipe, sizes: Sizes) -> tuple[Ints, Ints, Program]:
    """Peak and resident bytes of points that run one program.

    Source: `engine.estimate`, whose sums these are.
    """
    training = recipe.training
    assert training is not None
    found = parts(inventory, recipe)
    prepared, program, keeping = found.prepared, found.program, found.keeping
    share = prepared.share
    batch, length = (np.ones_like(sizes.batch), sizes.batch * sizes.length) if training.flattened else (sizes.batch, sizes.length)
    is_huge = _is_huge(program, batch, length, sizes.steps)
    if is_huge is not None:
        batch, length = np.where(is_huge, 1, batch), np.where(is_huge, 1, length)
    tensors: Any = input_sizes(training, batch, length)  # type: ignore[arg-type]
    inputs = sizes.steps * sum(allocated(INDEX_BYTES * n) for n in tensors)
    steady = sum(between_steps(prepared, program).values()) + inputs
    update = share.gradients_bytes + share.update_temporary_bytes + share.communication.get(Phase.OPTIMIZER_STEP, 0)
    ending = share.gradients_bytes + share.ending_communication_bytes
    peak = np.maximum(steady + max(update, ending), prepared.load.allocated_bytes)
    powers = _powers(batch, length)
    for phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD):
        waiting = share.waiting_gradients_bytes + share.communication.get(phase, 0)
        peak = np.maximum(peak, steady + waiting + _largest(program.peaks[phase], powers))
    if keeping is not None:
        kept = _largest(keeping.peaks[Phase.BACKWARD], powers, share.kept_gradients)
        peak = np.maximum(peak, steady + share.waiting_gradients_bytes + share.communication.get(Phase.BACKWARD, 0) + kept)
    moving = np.maximum(peak - steady, 0)
    held = peak + np.rint(moving * IDLE_SHARE[head_of(training)]).astype(np.int64)
    reserved = -(-held // SEGMENT_GRANULARITY_BYTES) * SEGMENT_GRANULARITY_BYTES
    resident = reserved + device_bytes(reserved_bytes=0, context_bytes=share.outside_bytes, paged_bytes=share.paged_bytes)
    if is_huge is not None:
        peak, resident = np.where(is_huge, SATURATED_BYTES, peak), np.where(is_huge, SATURATED_BYTES, resident)
    return peak, resident, program


def _is_huge(program: Program, batch: Ints, length: Ints, steps: Ints) -> NDArray[np.bool_] | None:
    """Which points int64 would not hold; None where it holds all of them."""
    snapshots = [snapshot for peaks in program.peaks.values() for snapshot in peaks]
    corner = int(batch.max()), int(length.max())
    if max(snapshot.at(*corner) for snapshot in snapshots) + 64 * int(steps.max()) * corner[0] * corner[1] <= LARGEST_BYTES:
        return None
    b, s = batch.astype(np.float64), length.astype(np.float64)
    largest = np.max([snapshot.at(b, s) + np.zeros_like(b) for snapshot in snapshots], axis=0)  # type: ignore[arg-type]
    return np.asarray(largest + 64.0 * steps * b * s > LARGEST_BYTES)


def _largest(snapshots: tuple[Snapshot, ...], powers: Ints, gradients: Fraction = Fraction(1)) -> Ints:
    """Rounded bytes of the instant that is largest before rounding, as `engine.largest` chooses it, of gradients a part [bytes]."""
    if len(snapshots) == 1:
        return _rounded(snapshots[0], powers, gradients)
    worst = np.argmax(np.array([snapshot.totals[:_NUM_POWERS] for snapshot in snapshots]) @ powers, axis=0)
    first = int(worst[0])
    if (worst == first).all():
        return _rounded(snapshots[first], powers, gradients)
    found = np.empty(powers.shape[1], dtype=np.int64)
    for index in np.unique(worst):
        where = np.flatnonzero(worst == index)
        found[where] = _rounded(snapshots[index], powers[:, where], gradients)
    return found


def _rounded(snapshot: Snapshot, powers: Ints, gradients: Fraction = Fraction(1)) -> Ints:
    table = _table(snapshot)
    total = _sum(table.sizes, table.numbers, powers)
    if not len(table.gradient_sizes):
        return total
    made = _sum(table.gradient_sizes, table.gradient_numbers, powers)
    if gradients == 1:
        return total + made
    # In integers of any size: a fraction's parts are sizes of whole models. Gradients have the same sizes at every point.
    different, place = np.unique(made, return_inverse=True)
    kept = np.array([int(int(num_bytes) * gradients) for num_bytes in different], dtype=np.int64)
    return total + kept[place]


def _powers(batch: Ints, length: Ints) -> Ints:
    """What the first of `extent.POWERS` are at every point; shape (powers, points)."""
    tokens = batch * length
    return np.stack((np.ones_like(batch), batch, length, tokens, length * length, tokens * length))


def _sum(sizes: Ints, numbers: Ints, powers: Ints) -> Ints:
    """Storages at every point, each rounded as the allocator does [bytes]."""
    rounded: Ints = allocated(sizes @ powers)  # type: ignore[assignment, arg-type]
    return numbers @ rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """A snapshot as arrays: of each size the coefficients in the order of `POWERS`, and how many storages have it; gradients apart."""

    sizes: Ints
    numbers: Ints
    gradient_sizes: Ints
    gradient_numbers: Ints


@lru_cache(maxsize=1024)
def _table(snapshot: Snapshot) -> _Table:
    others: Counter[tuple[int, ...]] = Counter()
    gradients: Counter[tuple[int, ...]] = Counter()
    for (item, size), number in snapshot.held:
        coefficients = size.totals()
        assert not any(coefficients[_NUM_POWERS:]), size  # a training step knows no keys
        (gradients if item is Item.GRADIENTS else others)[tuple(coefficients[:_NUM_POWERS])] += number
    (sizes, numbers), (gradient_sizes, gradient_numbers) = (_arrays(counted) for counted in (others, gradients))
    return _Table(sizes=sizes, numbers=numbers, gradient_sizes=gradient_sizes, gradient_numbers=gradient_numbers)


def _arrays(counted: Counter[tuple[int, ...]]) -> tuple[Ints, Ints]:
    return np.array(list(counted), dtype=np.int64).reshape(-1, _NUM_POWERS), np.array(list(counted.values()), dtype=np.int64)
