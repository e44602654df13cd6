"""Which cards hold a run, and at which size: memory is worked out once for all cards that run the same kernels."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from estimator.device import context_bytes, workspaces_bytes
from estimator.gpus import Gpu
from estimator.grid import Evaluator, Ints, Sizes
from estimator.planner import Goal, PlanObjective, reachable, search

# Compute capability from which the flash kernels run.
NEWER_KERNELS = (8, 0)


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
    return gpu.compute_capability >= NEWER_KERNELS, workspaces_bytes(gpu.compute_capability, training=True)


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
    sizes = candidates.then(goal.smallest())
    memory = evaluator.memory(sizes)
    usable, contexts = (np.array(column)[:, None] for column in zip(*((m.usable_bytes, m.context_bytes) for m in group), strict=True))
    device, required = memory.device_bytes(contexts), memory.required_bytes(contexts)
    places = _best_places(device[:, :-1], (required <= usable)[:, :-1], goal)
    for row, (machine, place) in enumerate(zip(group, places.tolist(), strict=True)):
        # where none fits, the place is the last one: the smallest size
        yield _choice(machine, sizes, place, device[row], required[row], fits=place >= 0)


def _best_places(device: Ints, fits: NDArray[np.bool_], goal: Goal) -> Ints:
    """The best candidate for each machine, one row each; -1 where none fits."""
    order = np.arange(fits.shape[1])
    if goal.objective is PlanObjective.MOST_MARGIN:
        largest = np.iinfo(np.int64).max
        left = np.where(fits, device, largest)
        fits = fits & (left == left.min(axis=1, keepdims=True, initial=largest))
    best: Ints = np.where(fits, order, -1).max(axis=1, initial=-1)
    return best


def _one_by_one(group: list[Machine], evaluator: Evaluator, goal: Goal) -> Iterator[Choice]:
    for machine in group:
        found = search(evaluator, goal, machine.usable_bytes, machine.context_bytes)
        sizes = goal.smallest() if found is None else found
        memory = evaluator.memory(sizes)
        device, required = memory.device_bytes(machine.context_bytes), memory.required_bytes(machine.context_bytes)
        yield _choice(machine, sizes, 0, device, required, fits=found is not None)


def _choice(machine: Machine, sizes: Sizes, place: int, device: Ints, required: Ints, *, fits: bool) -> Choice:
    return Choice(
        machine=machine,
        fits=fits,
        micro_batch_size=int(sizes.batch[place]),
        gradient_accumulation_steps=int(sizes.steps[place]),
        sequence_length=int(sizes.length[place]),
        device_bytes=int(device[place]),
        required_bytes=int(required[place]),
    )
