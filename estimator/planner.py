"""What a card can hold: searches over micro-batch, accumulation and length that look at every size that could be the answer.

Memory is not monotone in the micro-batch: gradients wait only where there is accumulation, fused losses go over to several passes, and
attention beyond its window wants a mask. Within one program it is, up to rounding (`ROUNDING_BYTES`), and only that is made use of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from estimator.errors import RequestError
from estimator.grid import Evaluator, Ints, Sizes, distinct
from estimator.units import MIB

# Within one program every tensor grows with batch and length; what does not is its rounding to 512 bytes and that of the whole to 2 MiB,
# with the shares and margins on top. A hundred thousand tensors alive at once would take 49 MiB, and a step has a few thousand.
ROUNDING_BYTES = 64 * MIB

# Sequence lengths are searched in steps of this: kernels pad to it anyway.
LENGTH_STEP = 64

# Sizes asked for at once where many cost hardly more than one.
_FAN = 64


class PlanObjective(StrEnum):
    """What the best plan is."""

    LARGEST_MICRO_BATCH = "largest_micro_batch"  # fewest accumulation steps
    LONGEST_SEQUENCE = "longest_sequence"
    MOST_MARGIN = "most_margin"


class Policy(StrEnum):
    """What a size must leave for a plan to recommend it; both ask for the margin that the estimate may be wrong by, and the headroom."""

    CACHE_KEPT = "cache_kept"  # room for all that the allocator caches: the verdict is `fits`
    CACHE_GIVEN_BACK = "cache_given_back"  # the run lives, as the allocator gives its cache back to make room: the verdict may be `tight`


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is given, and what is to be found."""

    objective: PlanObjective
    micro_batch_size: int
    """For the longest sequence."""
    gradient_accumulation_steps: int
    """Where the global batch is free."""
    sequence_length: int
    global_batch_size: int | None = None
    """Samples per optimizer step over all cards; None: free."""
    num_gpus: int = 1
    """Cards that take samples of their own."""
    batch_limit: int
    length_limit: int

    def __post_init__(self) -> None:
        total = self.global_batch_size
        if total is not None and total % self.num_gpus:
            raise RequestError(
                f"global_batch_size: {total} is not a multiple of {self.num_gpus} GPUs; {_near(total, self.num_gpus)}",
                field="global_batch_size",
            )
        if self.objective is PlanObjective.LONGEST_SEQUENCE and total is not None and total % (self.micro_batch_size * self.num_gpus):
            cards = f" × {self.num_gpus} GPUs" if self.num_gpus > 1 else ""
            raise RequestError(
                f"global_batch_size: {total} is not a multiple of per_device_train_batch_size {self.micro_batch_size}{cards}; "
                f"{_near(total, self.micro_batch_size * self.num_gpus)}",
                field="global_batch_size",
            )

    def steps(self, micro_batch_size: Any) -> Any:
        """Accumulation steps that keep the global batch."""
        if self.global_batch_size is None:
            return self.gradient_accumulation_steps
        return self.global_batch_size // self.num_gpus // micro_batch_size

    @property
    def keeps_global_batch(self) -> bool:
        """Whether micro-batches are the divisors of a given number: few, and each with accumulation steps of its own."""
        return self.global_batch_size is not None and self.objective is not PlanObjective.LONGEST_SEQUENCE

    def candidates(self) -> Sizes:
        """Every size that could be the answer, in ascending order."""
        if self.objective is PlanObjective.LONGEST_SEQUENCE:
            return lengths(self.micro_batch_size, self.steps(self.micro_batch_size), self.length_limit)
        if self.global_batch_size is None:
            batches = np.arange(1, self.batch_limit + 1)
        else:
            batches = np.array([d for d in divisors(self.global_batch_size // self.num_gpus) if d <= self.batch_limit])
        return Sizes.of(batches, self.sequence_length, self.steps(batches))

    def smallest(self) -> Sizes:
        """The size that a shortfall is told for."""
        batch = self.micro_batch_size if self.objective is PlanObjective.LONGEST_SEQUENCE else 1
        return Sizes.of(batch, self.sequence_length, self.steps(batch))


def _near(total: int, factor: int) -> str:
    """What would be accepted, for people."""
    below = total // factor * factor
    return f"expected {below} or {below + factor}" if below else f"expected {factor}, or a multiple of it"


def lengths(batch: int, steps: int, limit: int) -> Sizes:
    """Every multiple of `LENGTH_STEP` up to a limit; the limit alone where it is shorter."""
    step = min(LENGTH_STEP, limit)
    return Sizes.of(batch, np.arange(step, limit + 1, step), steps)


def divisors(number: int) -> tuple[int, ...]:
    """All divisors in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    large = [number // d for d in reversed(small) if d * d != number]
    return (*small, *large)


def search(evaluator: Evaluator, goal: Goal, usable_bytes: int, context_bytes: int) -> Sizes | None:
    """The best size that fits one card; None when no candidate does.

    Args:
        usable_bytes: capacity less headroom [bytes].
        context_bytes: of the card [bytes].
    """
    candidates = goal.candidates()
    if goal.objective is PlanObjective.MOST_MARGIN:
        return _most_margin(evaluator, goal, candidates, usable_bytes, context_bytes)
    return largest(evaluator, candidates, usable_bytes, context_bytes, listed=goal.keeps_global_batch)


def largest(evaluator: Evaluator, candidates: Sizes, usable_bytes: int, context_bytes: int, *, listed: bool = False) -> Sizes | None:
    """The last of ascending candidates that fits.

    Args:
        listed: whether they are few and unlike each other, so that all are looked at.
    """

    def excess(places: Ints) -> Ints:
        return evaluator.memory(candidates.at(places)).required_bytes(context_bytes) - usable_bytes

    if listed:
        fitting = np.flatnonzero(excess(np.arange(len(candidates))) <= 0)
        return candidates.at(fitting[-1:]) if len(fitting) else None
    place = largest_place(evaluator.programs(candidates), excess, fan=_FAN if evaluator.is_quick else 1)
    return None if place is None else candidates.at(np.array([place]))


def largest_place(programs: Ints, excess: Callable[[Ints], Ints], *, fan: int = _FAN) -> int | None:
    """The last place whose size fits.

    Args:
        programs: of each place: within one, sizes ascend and memory falls by no more than `ROUNDING_BYTES` from one to any later one.
        excess: bytes by which the sizes at some places are too large.
        fan: how many places are asked for at once.

    Returns:
        The last place with no excess; None when there is none.
    """
    best: int | None = None
    for program in distinct(programs):
        run = np.flatnonzero(programs == program)
        if best is None or run[-1] > best:
            found = _last_of_run(run, excess, fan)
            best = found if best is None or (found is not None and found > best) else best
    return best


def reachable(programs: Ints, excess: Callable[[Ints], Ints], *, fan: int = _FAN) -> Ints:
    """Places of which some may fit: of each program all up to where it is certain that nothing does; see `largest_place`."""
    runs = (np.flatnonzero(programs == program) for program in distinct(programs))
    return np.sort(np.concatenate([run[: _end(run, excess, fan)] for run in runs]))


def _last_of_run(run: Ints, excess: Callable[[Ints], Ints], fan: int) -> int | None:
    """What is too large by more than rounding ends the run; before it every place is looked at from the end."""
    for end in range(_end(run, excess, fan), 0, -fan):
        block = run[max(0, end - fan) : end]
        fitting = np.flatnonzero(excess(block) <= 0)
        if len(fitting):
            return int(block[fitting[-1]])
    return None


def _end(run: Ints, excess: Callable[[Ints], Ints], fan: int) -> int:
    """How many of a run come before a place from which on nothing fits."""
    low, high = -1, len(run)
    while high - low > 1:
        probes = _probes(low, high, fan)
        beyond = np.flatnonzero(excess(run[probes]) > ROUNDING_BYTES)
        first = int(beyond[0]) if len(beyond) else len(probes)
        high = int(probes[first]) if len(beyond) else high
        low = int(probes[first - 1]) if first else low
    return high


def _probes(low: int, high: int, fan: int) -> Ints:
    """Places between two: doubling at first, since the answer is mostly near the beginning, then evenly spread."""
    if fan == 1:
        return np.array([min(2 * low + 2, (low + high) // 2)])
    if low < 0:
        return np.unique(np.minimum(2 ** np.arange(fan.bit_length() + 10) - 1, high - 1))
    return np.unique(np.linspace(low + 1, high - 1, min(fan, high - low - 1)).astype(np.int64))


def _most_margin(evaluator: Evaluator, goal: Goal, candidates: Sizes, usable_bytes: int, context_bytes: int) -> Sizes | None:
    """The candidate that leaves most, the largest of those; where the batch is free, the first few of each program are looked at."""
    if goal.global_batch_size is None:
        programs = evaluator.programs(candidates)
        looked_at = _FAN if evaluator.is_quick else 1
        candidates = candidates.at(np.concatenate([np.flatnonzero(programs == program)[:looked_at] for program in distinct(programs)]))
    memory = evaluator.memory(candidates)
    device = np.where(memory.required_bytes(context_bytes) <= usable_bytes, memory.device_bytes(context_bytes), np.iinfo(np.int64).max)
    least = device.min()
    if least == np.iinfo(np.int64).max:
        return None
    place = max(np.flatnonzero(device == least), key=lambda place: int(candidates.batch[place]))
    return candidates.at(np.array([place]))


def last_near(start: int, number: int, fits: Callable[[int], bool]) -> int | None:
    """The last place that fits, near a guess: from there on in growing strides, up or down, then bisection between the last two.

    Args:
        start: the guess; −1 where nothing was thought to fit.
        number: of places; what fits at one is taken to fit at all before it.
        fits: asked as seldom as can be.

    Returns:
        The place, None when not even the first fits.
    """
    low, high, stride = -1, number, 1
    place = max(start, 0)
    if number and fits(place):
        low = place
        while low + stride < number and fits(low + stride):
            low, stride = low + stride, 2 * stride
        high = min(low + stride, number)
    else:
        high = place
        while high > 0:
            place = max(high - stride, 0)
            if fits(place):
                low = place
                break
            high, stride = place, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low if low >= 0 else None
