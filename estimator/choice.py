"""Which cards hold a run, and at which size: memory is worked out once for all cards that run the same kernels."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from estimator.device import context_bytes, workspaces_bytes
from estimator.gpus import Gpu
from estimator.grid import Evaluator, Ints, Memory, Sizes
from estimator.planner import Goal, PlanObjective, reachable, search

# Compute capability from which the flash kernels run.
_NEWER_KERNELS = (8, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Some cards of one kind, with what may be used of each."""

    gpu: Gpu
    num_gpus: int
    usable_bytes: int
    """Capacity less headroom [bytes]."""

    @property
    def context_bytes(self) -> int:
        """Of one card [bytes]."""
        return context_bytes(self.gpu.num_sms)

    @property
    def kind(self) -> tuple[object, ...]:
        """Machines of one kind are answered for together."""
        return *kernel_class(self.gpu), self.num_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A machine and the best size on it, or the smallest where none fits."""

    machine: Machine
    fits: bool
    micro_batch_size: int
    gradient_accumulation_steps: int
    sequence_length: int
    device_bytes: int
    """Of one card at that size [bytes]."""
    required_bytes: int
    """With its margin [bytes]."""

    @property
    def verdict(self) -> str:
        """`fits`, `tight` or `does_not_fit`."""
        if self.fits:
            return "fits"
        return "tight" if self.device_bytes <= self.machine.usable_bytes else "does_not_fit"


def kernel_class(gpu: Gpu) -> tuple[bool, int]:
    """Cards of one class take the same memory for the same run, but for the context: they have the same kernels and workspaces."""
    return gpu.compute_capability >= _NEWER_KERNELS, workspaces_bytes(gpu.compute_capability, training=True)


def choices(machines: Iterable[Machine], evaluator_of: Callable[[Machine], tuple[Evaluator, Goal]]) -> Iterator[Choice]:
    """The best size of each machine.

    Args:
        machines: in any order; choices come in the order of their classes.
        evaluator_of: how runs on a machine are answered for, and what is to be found; asked once for each class and number of cards.
    """
    groups: dict[tuple[object, ...], list[Machine]] = {}
    for machine in machines:
        groups.setdefault(machine.kind, []).append(machine)
    for group in groups.values():
        evaluator, goal = evaluator_of(group[0])
        yield from _quickly(group, evaluator, goal) if evaluator.is_quick else _one_by_one(group, evaluator, goal)


def _quickly(group: list[Machine], evaluator: Evaluator, goal: Goal) -> Iterator[Choice]:
    candidates = goal.candidates()
    if not goal.keeps_global_batch:
        roomiest, smallest_context = max(m.usable_bytes for m in group), min(m.context_bytes for m in group)

        def excess(places: Ints) -> Ints:
            return evaluator.memory(candidates.at(places)).required_bytes(smallest_context) - roomiest

        candidates = candidates.at(reachable(evaluator.programs(candidates), excess))
    memory = evaluator.memory(candidates)
    smallest = goal.smallest()
    of_smallest = evaluator.memory(smallest)
    for machine in group:
        place = _best_place(candidates, memory, machine, goal)
        yield (
            _choice(machine, smallest, of_smallest, 0, fits=False)
            if place is None
            else _choice(machine, candidates, memory, place, fits=True)
        )


def _best_place(candidates: Sizes, memory: Memory, machine: Machine, goal: Goal) -> int | None:
    fitting = np.flatnonzero(memory.required_bytes(machine.context_bytes) <= machine.usable_bytes)
    if not len(fitting):
        return None
    if goal.objective is not PlanObjective.MOST_MARGIN:
        return int(fitting[-1])
    device = memory.device_bytes(machine.context_bytes)[fitting]
    return int(fitting[np.flatnonzero(device == device.min())[-1]])


def _one_by_one(group: list[Machine], evaluator: Evaluator, goal: Goal) -> Iterator[Choice]:
    for machine in group:
        found = search(evaluator, goal, machine.usable_bytes, machine.context_bytes)
        sizes = goal.smallest() if found is None else found
        yield _choice(machine, sizes, evaluator.memory(sizes), 0, fits=found is not None)


def _choice(machine: Machine, sizes: Sizes, memory: Memory, place: int, *, fits: bool) -> Choice:
    at = slice(place, place + 1)
    found = Memory(allocated_bytes=memory.allocated_bytes[at], resident_bytes=memory.resident_bytes[at], radii=memory.radii[:, at])
    return Choice(
        machine=machine,
        fits=fits,
        micro_batch_size=int(sizes.batch[place]),
        gradient_accumulation_steps=int(sizes.steps[place]),
        sequence_length=int(sizes.length[place]),
        device_bytes=int(found.device_bytes(machine.context_bytes)[0]),
        required_bytes=int(found.required_bytes(machine.context_bytes)[0]),
    )
