"""What a run makes the caching allocator hold: loading, then optimizer steps, replayed block by block until they add nothing.

Nothing here is fitted: sizes and order come from the program, the rules from the allocator.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from estimator.allocator_settings import AllocatorSettings
from estimator.caching_allocator import Block, CachingAllocator
from estimator.device import workspace_bytes
from estimator.inventory import Inventory
from estimator.loading import NoRoomError, load, place
from estimator.optimizers import Residence, optimizer_states, step_lists, weight_decay_groups
from estimator.patterns import in_order
from estimator.recipe import Recipe, Reference
from estimator.schedule import MicroBatch, Schedule
from estimator.static_memory import Preparation, StaticMemory, static_memory
from estimator.storage import StoredTensor

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
    run = _Run(allocator, inventory, recipe)
    try:
        run.load()
        # Source: transformers, trainer.py, Trainer._inner_training_loop; accelerate, accelerator.py, Accelerator.free_memory.
        allocator.empty_cache()
        for number in range(MAX_STEPS):
            before = allocator.max_reserved_bytes
            run.step(schedule, inputs)
            if number > 0 and allocator.max_reserved_bytes == before:
                break
    except NoRoomError:
        return None
    return allocator.max_reserved_bytes


class _Run:
    def __init__(self, allocator: CachingAllocator, inventory: Inventory, recipe: Recipe) -> None:
        assert recipe.training is not None
        self.allocator = allocator
        self.inventory = inventory
        self.recipe = recipe
        self.training = recipe.training
        self.static = static_memory(inventory, recipe)
        self.groups = weight_decay_groups(t for t in self.static.tensors if t.trainable)
        self.unpacked: dict[MicroBatch, tuple[Sequence[int], Sequence[int]]] = {}
        self.has_states = False
        self.has_workspaces = False

    # -- before the first step ------------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Source: trl 1.16, trainer/dpo_trainer.py, DPOTrainer.__init__, for the second model."""
        self._load(self.recipe, self.static)
        if self.training.objective.reference is Reference.MODEL:
            second = replace(self.recipe, adapter=None, prepare_for_kbit_training=False, training=None)
            self._load(second, static_memory(self.inventory, second))

    def _load(self, recipe: Recipe, static: StaticMemory) -> None:
        """Quantized models are loaded on the card; others are made on the host, and moved by the trainer in the order of their modules.

        Source: transformers, trainer.py, Trainer._move_model_to_device; quantizers/quantizer_bnb_4bit.py, update_device_map.
        """
        quantized = recipe.quantization is not None
        blocks = load(self.allocator, self.inventory, Preparation.of(recipe)) if quantized else {}
        for tensor, name in _one_by_one(static.tensors):
            former = blocks.get(name)
            if former is None or former.requested_bytes != tensor.raw_bytes:
                self._make(tensor.raw_bytes)
                self._free(former)

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

    def _micro_batch(self, part: MicroBatch) -> list[Block | None]:
        """Forward and backward pass; the gradients.

        The first matrix product of each of both threads takes a workspace for good.
        """
        allocator = self.allocator
        sizes, events = self._unpacked(part)
        blocks: dict[int, Block] = {}
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
            for size in self._states():
                self._make(size)
        for group in self.groups:
            former: list[Block | None] = []
            for sizes in step_lists(self.training.optimizer, group):
                made = [self._make(size) for size in sizes]
                for block in former:
                    self._free(block)
                former = made
            for block in former:
                self._free(block)

    def _states(self) -> Iterator[int]:
        """What the optimizer keeps, parameter by parameter [bytes]."""
        arguments = dict(self.training.optimizer_arguments)
        seen: set[str] = set()
        for group in self.groups:
            states = {t: optimizer_states(self.training.optimizer, arguments, (t,)) for t in group}
            for tensor, _ in _one_by_one(group):
                for state in states[tensor]:
                    if state.pattern.startswith(tensor.pattern):
                        if state.residence is Residence.DEVICE:
                            yield state.raw_bytes
                    elif state.pattern not in seen:  # tables that all share
                        seen.add(state.pattern)
                        yield from [state.raw_bytes] * state.num_tensors

    def _make(self, num_bytes: int) -> Block | None:
        return place(self.allocator, num_bytes) if num_bytes else None

    def _free(self, block: Block | None) -> None:
        if block is not None:
            self.allocator.free(block)


def _one_by_one(tensors: Sequence[StoredTensor]) -> Iterator[tuple[StoredTensor, str]]:
    """Every copy with its name, in the order of the modules."""
    return ((tensors[position], name) for position, name in in_order((t.pattern, t.indices) for t in tensors))
