"""What a run makes the caching allocator hold: loading, then optimizer steps, replayed block by block until they add nothing.

Nothing here is fitted: sizes and order come from the program, the rules from the allocator.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Generic

from estimator.allocator_settings import AllocatorSettings
from estimator.caching_allocator import Allocator, Block, CachingAllocator, Taken
from estimator.device import workspace_bytes
from estimator.free_ranges import FreeRanges
from estimator.inventory import Inventory
from estimator.loading import NoRoomError, place, placements, put
from estimator.optimizers import states_in_order, step_lists, weight_decay_groups
from estimator.recipe import Recipe
from estimator.schedule import MicroBatch, Schedule
from estimator.static_memory import StaticMemory, static_memory

MAX_STEPS = 6
"""Optimizer steps that are replayed at most. The second finds the optimizer's states; a third that adds nothing is the last."""


def reservation(
    inventory: Inventory,
    recipe: Recipe,
    schedule: Schedule,
    inputs: Sequence[int],
    settings: AllocatorSettings | None = None,
    capacity_bytes: int | None = None,
) -> int | None:
    """A training run on the allocator.

    Args:
        inventory: of the model.
        recipe: of the run, with its batch and length.
        schedule: of its step.
        inputs: tensors of one micro-batch [bytes].
        settings: the allocator's options.
        capacity_bytes: what the driver can give in all; None for a card without a limit [bytes].

    Returns:
        `max_memory_reserved` [bytes]; None where the card has too little.
    """
    return _reservation(inventory, recipe, schedule, tuple(inputs), settings, capacity_bytes)


@lru_cache(maxsize=1024)
def _reservation(
    inventory: Inventory,
    recipe: Recipe,
    schedule: Schedule,
    inputs: tuple[int, ...],
    settings: AllocatorSettings | None,
    capacity_bytes: int | None,
) -> int | None:
    allocator = CachingAllocator(settings, capacity_bytes=capacity_bytes)
    static = static_memory(inventory, recipe)
    try:
        blocks: dict[str, Block] = {}
        for name, num_bytes in placements(inventory, recipe):
            put(allocator, blocks, name, num_bytes)
        # Source: transformers, trainer.py, Trainer._inner_training_loop; accelerate, accelerator.py, Accelerator.free_memory.
        allocator.empty_cache()
        if allocator.settings == AllocatorSettings():
            # The model stays where it is, so that only what is free matters from here on.
            return _Run(FreeRanges.following(allocator, capacity_bytes), static, recipe).most_reserved_bytes(schedule, inputs)
        return _Run(allocator, static, recipe).most_reserved_bytes(schedule, inputs)
    except NoRoomError:
        return None


class _Run(Generic[Taken]):
    def __init__(self, allocator: Allocator[Taken], static: StaticMemory, recipe: Recipe) -> None:
        assert recipe.training is not None
        self.allocator = allocator
        self.recipe = recipe
        self.training = recipe.training
        self.trained = tuple(t for t in static.tensors if t.trainable)
        self.unpacked: dict[MicroBatch, tuple[Sequence[int], Sequence[int]]] = {}
        self.has_states = False
        self.has_workspaces = False

    def most_reserved_bytes(self, schedule: Schedule, inputs: Sequence[int]) -> int:
        """Steps until one adds nothing.

        Raises:
            NoRoomError: if the card has too little.
        """
        for number in range(MAX_STEPS):
            before = self.allocator.max_reserved_bytes
            self.step(schedule, inputs)
            if number > 0 and self.allocator.max_reserved_bytes == before:
                break
        return self.allocator.max_reserved_bytes

    # -- steps ----------------------------------------------------------------------------------------------------------------------------

    def step(self, schedule: Schedule, inputs: Sequence[int]) -> None:
        """One optimizer step.

        Further micro-batches are played until one adds nothing.

        Source: transformers, trainer.py, Trainer._inner_training_loop (get_batch_samples takes the inputs of all of them first).
        """
        accumulation = self.training.gradient_accumulation_steps
        batches = [self._make(size) for _ in range(accumulation) for size in inputs]
        gradients = self._micro_batch(schedule.first)
        for _ in range(accumulation - 1):
            before = self.allocator.max_reserved_bytes
            gradients += self._micro_batch(schedule.later)
            if self.allocator.max_reserved_bytes == before:
                break
        self._update()
        for block in (*gradients, *batches):
            self._free(block)

    def _micro_batch(self, part: MicroBatch) -> list[Taken | None]:
        """Forward and backward pass; the gradients.

        The first matrix product of each of both threads takes a workspace for good.
        """
        allocator = self.allocator
        sizes, events = self._unpacked(part)
        blocks: dict[int, Taken] = {}
        workspaces = () if self.has_workspaces else (0, part.backward)
        self.has_workspaces = True
        for position, event in enumerate(events):
            if position in workspaces:
                place(allocator, workspace_bytes(self.recipe.compute_capability))
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

    def _unpacked(self, part: MicroBatch) -> tuple[Sequence[int], Sequence[int]]:
        """The size of every storage at this batch and length, and the events."""
        if part not in self.unpacked:
            at_size = [size.at(*self.training.shape) for size in part.sizes]
            self.unpacked[part] = [at_size[kind] for kind in part.kinds], part.events
        return self.unpacked[part]

    def _update(self) -> None:
        if not self.has_states:
            self.has_states = True
            for state in states_in_order(self.training.optimizer, dict(self.training.optimizer_arguments), self.trained):
                self._make(state.raw_bytes)
        for group in weight_decay_groups(self.trained):
            former: list[Taken | None] = []
            for sizes in step_lists(self.training.optimizer, group):
                made = [self._make(size) for size in sizes]
                for block in former:
                    self._free(block)
                former = made
            for block in former:
                self._free(block)

    def _make(self, num_bytes: int) -> Taken | None:
        return place(self.allocator, num_bytes) if num_bytes else None

    def _free(self, block: Taken | None) -> None:
        if block is not None:
            self.allocator.free(block)
