"""A traced step put among what lies on the device around it: the loaded model before, two optimizer steps, the optimizer's states.

The traced step may have run a few layers only; what is stored comes from exact rows, tensor by tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from estimator.optimizers import Residence
from estimator.patterns import copies
from estimator.phases import Item, Phase
from estimator.static_memory import StaticMemory
from estimator.timeline import Allocation, Mark, Segment, Timeline

NUM_STEPS = 2
"""Optimizer states exist from the second step on."""

_STORED = (Item.WEIGHTS, Item.QUANTIZATION_STATE, Item.BUFFERS, Item.ADAPTER_WEIGHTS, Item.GRADIENTS)


def whole_run(step: Timeline, static: StaticMemory, *, workspace_bytes: int) -> Timeline:
    """The timeline of a run.

    Args:
        step: one optimizer step of the whole model, its update left out; what it took in is replaced by the rows of `static`.
        static: what is stored, and the optimizer's states.
        workspace_bytes: cuBLAS workspaces, made once [bytes].
    """
    run = _Run()
    run.mark(Phase.LOAD.value)
    for tensor in static.tensors:
        for _, name in copies(tensor.pattern, tensor.indices):
            run.make(tensor.raw_bytes, tensor.item, name, tensor.dtype.value, tensor.shape)
    run.make(workspace_bytes, Item.WORKSPACE, "cuBLAS")
    for number in range(NUM_STEPS):
        run.play(step, partial(_update, run, static, is_first=number == 0))
    return Timeline(allocations=tuple(run.allocations), events=tuple(run.events), marks=tuple(run.marks))


def _update(run: "_Run", static: StaticMemory, *, is_first: bool) -> None:
    """The optimizer's step: states where there are none yet, and what comes and goes."""
    if is_first:
        for state in static.optimizer:
            if state.residence is Residence.DEVICE:
                for _ in range(state.num_tensors):
                    run.make(state.raw_bytes, Item.OPTIMIZER_STATES, state.pattern, state.dtype.value)
    if static.optimizer_temporary_bytes:
        run.release(run.make(static.optimizer_temporary_bytes, Item.TEMPORARY, "optimizer"))


@dataclass(slots=True)
class _Run:
    allocations: list[Allocation] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def mark(self, phase: str, segment: Segment = Segment.OUTSIDE, layer: int = -1) -> None:
        self.marks.append(Mark(event=len(self.events), phase=phase, segment=segment, layer=layer))

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

    def play(self, step: Timeline, update: Callable[[], None]) -> None:
        """One optimizer step: the traced events without the stored tensors, and the update where its phase begins."""
        made: dict[int, int] = {}
        for mark, end in step.spans():
            if mark.phase != Phase.LOAD:
                self.mark(mark.phase, mark.segment, mark.layer)
            if mark.phase == Phase.OPTIMIZER_STEP:
                update()
            for event in step.events[mark.event : end]:
                if event < 0:
                    if (index := made.pop(~event, None)) is not None:
                        self.release(index)
                elif not _is_stored(step.allocations[event]):
                    made[event] = self.add(step.allocations[event])
        for index in made.values():
            # What outlives the traced run, such as its inputs, goes before the next step's.
            self.release(index)


def _is_stored(allocation: Allocation) -> bool:
    return not allocation.operator and allocation.item in _STORED
