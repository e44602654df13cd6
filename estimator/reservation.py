"""What a run makes the caching allocator hold: loading, then optimizer steps, replayed block by block until they add nothing.

Nothing here is fitted: sizes and order come from the program, the rules from the allocator.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Generic

from estimator.allocator_settings import AllocatorSettings
from estimator.caching_allocator import UNLIMITED_BYTES, Allocator, CachingAllocator, Taken
from estimator.device import workspace_bytes
from estimator.free_ranges import FreeRanges, Range
from estimator.inventory import Inventory
from estimator.loading import NoRoomError, place, placements, put
from estimator.optimizers import play, states_in_order, step_lists
from estimator.recipe import Recipe
from estimator.schedule import MicroBatch, Schedule
from estimator.static_memory import StaticMemory, static_memory
from estimator.streams import Stream, apart
from estimator.units import allocated

MAX_SEPARATE_INPUTS = 256
"""Micro-batches whose inputs are placed tensor by tensor; those of all further ones lie in one block."""

MAX_BLOCK_BYTES = 2**50
"""Beyond any card: what is larger fails or is told by what is allocated."""

MAX_STEPS = 6
"""Optimizer steps that are replayed at most. The second finds the optimizer's states; a third that adds nothing is the last, unless the
cache had to be given back in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """What the allocator came to in a run."""

    max_bytes: int
    """`max_memory_reserved` [bytes]."""
    num_alloc_retries: int
    """How often every step gives the cache back to make room, once steps repeat each other; often the first steps alone have to."""


def reservation(
    inventory: Inventory,
    recipe: Recipe,
    schedule: Schedule,
    inputs: Sequence[int],
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
) -> Reserved | None:
    """A training run on the allocator.

    Args:
        inventory: of the model.
        recipe: of the run, with its batch and length.
        schedule: of its step.
        inputs: tensors of one micro-batch [bytes].
        settings: the allocator's options.
        capacity_bytes: what the driver can give in all; None for a card without a limit [bytes].

    Returns:
        None where the card has too little.
    """
    if capacity_bytes is None:
        return Reserved(max_bytes=held_without_limit(inventory, recipe, schedule, inputs, settings), num_alloc_retries=0)
    return _under_limit(inventory, recipe, schedule, tuple(inputs), settings, capacity_bytes)


def held_without_limit(
    inventory: Inventory,
    recipe: Recipe,
    schedule: Schedule,
    inputs: Sequence[int],
    settings: AllocatorSettings | None = None,
    enough_bytes: int | None = None,
) -> int:
    """`max_memory_reserved` of a run on a card without a limit; see `reservation`.

    Args:
        enough_bytes: the answer may be too low where it is above this: a run that is too large is not played to its end [bytes].
    """
    return _unlimited(inventory, recipe, schedule, tuple(inputs), settings).max_reserved_bytes(enough_bytes)


class _Unlimited:
    """A run without a limit, played as far as somebody wanted to know: of a search most sizes are too large, and show it early."""

    def __init__(self, play: Callable[[], Iterator[int]]) -> None:
        self._play = play
        self._stages: Iterator[int] | None = None
        self._reserved_bytes = 0
        self._is_finished = False
        self._lock = Lock()

    def max_reserved_bytes(self, enough_bytes: int | None) -> int:
        with self._lock:
            if not self._is_finished and (enough_bytes is None or self._reserved_bytes <= enough_bytes):
                stages = self._stages if self._stages is not None else self._play()
                self._stages = None  # what is interrupted is played again
                try:
                    for reserved in stages:
                        self._reserved_bytes = max(self._reserved_bytes, reserved)
                        if enough_bytes is not None and reserved > enough_bytes:
                            self._stages = stages
                            break
                    else:
                        self._is_finished = True
                except NoRoomError:  # more than there are addresses
                    self._reserved_bytes, self._is_finished = MAX_BLOCK_BYTES, True
            is_paused, found = self._stages is not None, self._reserved_bytes
        if is_paused:
            _pause(self)
        return found

    def rewind(self) -> None:
        """Lets go of the allocator: who wants to know more has the run played from its start."""
        if self._lock.acquire(blocking=False):
            self._stages = None
            self._lock.release()


# Runs that were not played to their end: each holds an allocator with its blocks, a few MiB.
_paused: deque[_Unlimited] = deque()
_MAX_PAUSED = 16


def _pause(run: _Unlimited) -> None:
    _paused.append(run)
    while len(_paused) > _MAX_PAUSED:
        with suppress(IndexError):  # another thread took it
            if (oldest := _paused.popleft()) is not run:
                oldest.rewind()


@lru_cache(maxsize=1024)
def _unlimited(
    inventory: Inventory, recipe: Recipe, schedule: Schedule, inputs: tuple[int, ...], settings: AllocatorSettings | None
) -> _Unlimited:
    return _Unlimited(lambda: _stages(_allocator(settings), inventory, recipe, schedule, inputs))


@lru_cache(maxsize=1024)
def _under_limit(
    inventory: Inventory,
    recipe: Recipe,
    schedule: Schedule,
    inputs: tuple[int, ...],
    settings: AllocatorSettings | None,
    capacity_bytes: int,
) -> Reserved | None:
    allocator = _allocator(settings, capacity_bytes)
    try:
        _load(allocator, inventory, recipe)
        run = _run(allocator, inventory, recipe)
        for _ in run.steps(schedule, inputs):
            pass
    except NoRoomError:
        return None
    return Reserved(max_bytes=run.allocator.max_reserved_bytes, num_alloc_retries=run.num_retries_of_last_step)


def _stages(
    allocator: CachingAllocator | FreeRanges, inventory: Inventory, recipe: Recipe, schedule: Schedule, inputs: tuple[int, ...]
) -> Iterator[int]:
    """A run, which yields what was reserved at most so far: after loading, and after every part of a step [bytes]."""
    _load(allocator, inventory, recipe)
    yield allocator.max_reserved_bytes
    yield from _run(allocator, inventory, recipe, by_pool=True).steps(schedule, inputs)


def _allocator(settings: AllocatorSettings | None, capacity_bytes: int = UNLIMITED_BYTES) -> CachingAllocator | FreeRanges:
    """At PyTorch's defaults by its free ranges alone, which hold the same and take less time."""
    if settings is None or settings == AllocatorSettings():
        return FreeRanges(capacity_bytes)
    return CachingAllocator(settings, capacity_bytes=capacity_bytes)


def _load(allocator: Allocator[Any], inventory: Inventory, recipe: Recipe) -> None:
    blocks: dict[str, Any] = {}
    for name, num_bytes in placements(inventory, recipe):
        put(allocator, blocks, name, num_bytes)
    # Source: transformers, trainer.py, Trainer._inner_training_loop; accelerate, accelerator.py, Accelerator.free_memory.
    allocator.empty_cache()


def _run(allocator: CachingAllocator | FreeRanges, inventory: Inventory, recipe: Recipe, *, by_pool: bool = False) -> "_Run[Any]":
    """The steps of a loaded model; where no limit matters, pool by pool."""
    static = static_memory(inventory, recipe)
    if by_pool and isinstance(allocator, FreeRanges):
        return _PoolByPool(allocator, static, recipe)
    return _Run(allocator, static, recipe)


class _Run(Generic[Taken]):
    def __init__(self, allocator: Allocator[Taken], static: StaticMemory, recipe: Recipe) -> None:
        assert recipe.training is not None
        self.allocator = allocator
        self.recipe = recipe
        self.training = recipe.training
        self.trained = tuple(t for t in static.tensors if t.trainable)
        self.update = tuple(step_lists(self.training.optimizer, self.trained, decays=self.training.decays))
        self.unpacked: dict[MicroBatch, tuple[Sequence[int], Sequence[int]]] = {}
        self.has_states = False
        self.has_workspaces = False
        self.num_retries_of_last_step = 0

    # -- steps ----------------------------------------------------------------------------------------------------------------------------

    def steps(self, schedule: Schedule, inputs: Sequence[int]) -> Iterator[int]:
        """Steps until one adds nothing and keeps the cache; yields what was reserved at most so far [bytes]."""
        for number in range(MAX_STEPS):
            before, retries = self.allocator.max_reserved_bytes, self.allocator.num_alloc_retries
            yield from self.step(schedule, inputs)
            self.num_retries_of_last_step = self.allocator.num_alloc_retries - retries
            if number > 0 and self.allocator.max_reserved_bytes == before and not self.num_retries_of_last_step:
                break

    def step(self, schedule: Schedule, inputs: Sequence[int]) -> Iterator[int]:
        """One optimizer step; yields what was reserved at most so far [bytes].

        Further micro-batches are played until one adds nothing.

        Source: transformers, trainer.py, Trainer._inner_training_loop (get_batch_samples takes the inputs of all of them first).
        """
        accumulation = self.training.gradient_accumulation_steps
        alone = min(accumulation, MAX_SEPARATE_INPUTS)
        batches = [self._make(size) for _ in range(alone) for size in inputs]
        batches.append(self._make(min((accumulation - alone) * sum(map(allocated, inputs)), MAX_BLOCK_BYTES)))
        gradients = self._micro_batch(schedule.first)
        yield self.allocator.max_reserved_bytes
        for _ in range(accumulation - 1):
            before = self.allocator.max_reserved_bytes
            gradients += self._micro_batch(schedule.later)
            yield self.allocator.max_reserved_bytes
            if self.allocator.max_reserved_bytes == before:
                break
        self._update()
        for block in (*gradients, *batches):
            self._free(block)
        yield self.allocator.max_reserved_bytes

    def _micro_batch(self, part: MicroBatch) -> list[Taken | None]:
        """Forward and backward pass; the gradients."""
        allocator, staying = self.allocator, self._workspaces(part)
        sizes, events = self._unpacked(part)
        blocks: dict[int, Taken] = {}
        for position, event in enumerate(events):
            if position in staying:
                place(allocator, staying[position])
            if event < 0:
                if (freed := blocks.pop(~event, None)) is not None:
                    allocator.free(freed)
            elif size := sizes[event]:
                made = allocator.allocate(size)
                if made is None:
                    raise NoRoomError
                blocks[event] = made
        kept = [blocks.pop(index, None) for index in part.kept]
        for block in blocks.values():
            allocator.free(block)
        return kept

    def _workspaces(self, part: MicroBatch) -> dict[int, int]:
        """What stays for good, by the event before which it is made: one for the first matrix product of each of both threads [bytes]."""
        if self.has_workspaces:
            return {}
        self.has_workspaces = True
        return dict.fromkeys((0, part.backward), workspace_bytes(self.recipe.compute_capability))

    def _unpacked(self, part: MicroBatch) -> tuple[Sequence[int], Sequence[int]]:
        """The size of every storage at this batch and length [bytes], and the events."""
        if part not in self.unpacked:
            at_size = [size.at(*self.training.shape) for size in part.sizes]
            self.unpacked[part] = [at_size[kind] for kind in part.kinds], part.events
        return self.unpacked[part]

    def _update(self) -> None:
        if not self.has_states:
            self.has_states = True
            for state in states_in_order(self.training.optimizer, dict(self.training.optimizer_arguments), self.trained):
                self._make(state.raw_bytes)
        play(self.update, self._make, self._free)

    def _make(self, num_bytes: int) -> Taken | None:
        return place(self.allocator, num_bytes) if num_bytes else None

    def _free(self, block: Taken | None) -> None:
        if block is not None:
            self.allocator.free(block)


class _PoolByPool(_Run[Range]):
    """Where neither pool takes room from the other: none plays the same again from the same state."""

    def __init__(self, allocator: FreeRanges, static: StaticMemory, recipe: Recipe) -> None:
        super().__init__(allocator, static, recipe)
        self.ranges = allocator
        self.streams: dict[MicroBatch, tuple[Stream, Stream]] = {}

    def _micro_batch(self, part: MicroBatch) -> list[Range | None]:
        staying = self._workspaces(part)
        streams = None if staying else self.streams.get(part)
        if streams is None:
            streams = apart(*self._unpacked(part), part.kept, staying)
            if not staying:
                self.streams[part] = streams
        kept = self.ranges.play(*streams)
        if kept is None:
            raise NoRoomError
        return [*kept]
