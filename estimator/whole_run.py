"""A traced step put among what lies on the device around it: the loaded model before, two optimizer steps, the optimizer's states.

The traced step may have run a few layers only; what is stored comes from exact rows, tensor by tensor.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from estimator.device import workspace_bytes
from estimator.inventory import Inventory
from estimator.loading import IN_FULL, REFERENCE, one_by_one, placements
from estimator.optimizers import play, states_in_order, step_lists
from estimator.phases import LOADED, Item, Phase, Segment
from estimator.recipe import Recipe
from estimator.static_memory import StaticMemory, static_memory
from estimator.storage import StoredTensor
from estimator.timeline import Allocation, Mark, Timeline

NUM_STEPS = 2
"""Optimizer states exist from the second step on."""

_STORED = (*LOADED, Item.GRADIENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeRun:
    """A run from its first tensor on."""

    timeline: Timeline
    cache_emptied_after: int
    """The event at which the trainer gives back what loading left in the cache.

    Source: transformers, trainer.py, Trainer._inner_training_loop; accelerate, accelerator.py, Accelerator.free_memory.
    """


def whole_run(step: Timeline, inventory: Inventory, recipe: Recipe) -> WholeRun:
    """The timeline of a run.

    Args:
        step: one optimizer step of the whole model, its update left out; what it took in is replaced by the rows of the inventory.
        inventory: of the model.
        recipe: of the run.
    """
    static = static_memory(inventory, recipe)
    run = _Run(workspace_bytes=workspace_bytes(recipe.compute_capability))
    run.mark(Phase.LOAD.value)
    rows = {name: tensor for tensor, name in one_by_one(static.tensors)}
    for name, num_bytes in placements(inventory, recipe):
        run.put(name, num_bytes, rows.get(name.removeprefix(REFERENCE)))
    loaded = len(run.events) - 1
    for number in range(NUM_STEPS):
        run.play(step, partial(_update, run, static, recipe, is_first=number == 0))
    timeline = Timeline(allocations=tuple(run.allocations), events=tuple(run.events), marks=tuple(run.marks))
    return WholeRun(timeline=timeline, cache_emptied_after=loaded)


def _update(run: "_Run", static: StaticMemory, recipe: Recipe, *, is_first: bool) -> None:
    """The optimizer's step: states where there are none yet, and what comes and goes."""
    training = recipe.training
    assert training is not None
    trained = tuple(t for t in static.tensors if t.trainable)
    if is_first:
        for state in states_in_order(training.optimizer, dict(training.optimizer_arguments), trained):
            run.make(state.raw_bytes, Item.OPTIMIZER_STATES, state.pattern, state.dtype.value)
    lists = step_lists(training.optimizer, trained, decays=training.decays)
    play(lists, partial(run.make, item=Item.TEMPORARY, module="optimizer"), run.release)


@dataclass(slots=True)
class _Run:
    workspace_bytes: int
    """One for each of both threads, made at its first matrix product [bytes]."""
    stored: dict[str, int] = field(default_factory=dict)
    """Allocations of what is loaded, by name."""
    threads: set[str] = field(default_factory=set)
    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def mark(self, phase: str, segment: Segment = Segment.OUTSIDE, layer: int = -1) -> None:
        self.marks.append(Mark(event=len(self.events), phase=phase, segment=segment, layer=layer))

    def put(self, name: str, num_bytes: int, row: StoredTensor | None) -> None:
        """Carries out a placement of loading."""
        former = self.stored.pop(name, None)
        if num_bytes:
            item = _loaded_item(name) if row is None else row.item
            is_final = row is not None and row.raw_bytes == num_bytes
            dtype, shape = (row.dtype.value, row.shape) if row is not None and is_final else ("uint8", ())
            self.stored[name] = self.make(num_bytes, item, name, dtype, shape)
        if former is not None:
            self.release(former)

    def make(self, num_bytes: int, item: Item, module: str, dtype: str = "uint8", shape: tuple[int, ...] = ()) -> int:
        return self.add(
            Allocation(
                num_bytes=num_bytes,
                shape=shape or (num_bytes,),
                dtype=dtype,
                operator="",
                module=module,
                phase=self.marks[-1].phase,
                item=item.value,
                source=-1,
            )
        )

    def add(self, allocation: Allocation) -> int:
        index = len(self.allocations)
        self.allocations.append(allocation)
        self.events.append(index)
        return index

    def release(self, index: int) -> None:
        self.events.append(~index)

    def release_all(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.release(index)

    def _begin(self, mark: Mark) -> None:
        self.mark(mark.phase, mark.segment, mark.layer)
        if mark.phase in (Phase.FORWARD, Phase.BACKWARD) and mark.phase not in self.threads:
            self.threads.add(mark.phase)
            self.make(self.workspace_bytes, Item.WORKSPACE, "cuBLAS")

    def play(self, step: Timeline, update: Callable[[], None]) -> None:
        """One optimizer step: the traced events without the stored tensors, and the update where its phase begins."""
        made: dict[int, int] = {}
        for mark, end in step.spans():
            if mark.phase != Phase.LOAD:
                self._begin(mark)
            if mark.phase == Phase.OPTIMIZER_STEP:
                update()
            for event in step.events[mark.event : end]:
                if event < 0:
                    if (index := made.pop(~event, None)) is not None:
                        self.release(index)
                elif not _is_stored(step.allocations[event]):
                    made[event] = self.add(step.allocations[event])
        # What outlives the traced run, such as its inputs, goes before the next step's.
        self.release_all(made.values())


def _loaded_item(name: str) -> Item:
    """Of what is no row of the settled model: it passes, or it is a part of a packed weight."""
    return Item.TEMPORARY if name.endswith(IN_FULL) or "." not in name else Item.QUANTIZATION_STATE


def _is_stored(allocation: Allocation) -> bool:
    return not allocation.operator and allocation.item in _STORED
