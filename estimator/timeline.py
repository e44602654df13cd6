"""What a traced run allocated and released, in order: phases, their peaks, and what was alive then."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from estimator.units import allocated


@dataclass(slots=True, kw_only=True)
class Allocation:
    """One storage."""

    num_bytes: int
    """As requested [bytes]."""
    shape: tuple[int, ...]
    """Of the first tensor seen on it."""
    dtype: str
    operator: str
    """The operator that made it; empty for what was there before."""
    module: str
    """The module that ran, for a tensor that was there before its own name."""
    phase: str
    item: str
    """What it turned out to be, one of the answer's item names."""

    @property
    def allocated_bytes(self) -> int:
        """As the allocator counts it [bytes]."""
        return allocated(self.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhasePeak:
    """The worst instant of one phase."""

    phase: str
    allocated_bytes: int
    event: int
    """Index of the event that made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A run, from its first tensor to its last."""

    allocations: tuple[Allocation, ...]
    events: tuple[int, ...]
    """`i` when allocation `i` is made, `~i` when it is released."""
    borders: tuple[tuple[int, str], ...]
    """(index into `events`, phase that begins there), in order."""

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """(phase, first event, event after the last)."""
        ends = [start for start, _ in self.borders[1:]] + [len(self.events)]
        for (start, phase), end in zip(self.borders, ends, strict=True):
            yield phase, start, end

    def peaks(self) -> Mapping[str, PhasePeak]:
        """The worst instant of each phase; of several spans of one phase the larger."""
        sizes = [a.allocated_bytes for a in self.allocations]
        found: dict[str, PhasePeak] = {}
        live = 0
        for phase, start, end in self.spans():
            worst, at = live, start - 1
            for position in range(start, end):
                event = self.events[position]
                if event < 0:
                    live -= sizes[~event]
                    continue
                live += sizes[event]
                if live > worst:
                    worst, at = live, position
            if phase not in found or worst > found[phase].allocated_bytes:
                found[phase] = PhasePeak(phase=phase, allocated_bytes=worst, event=at)
        return found

    def alive(self, event: int) -> tuple[Allocation, ...]:
        """What is alive after an event, oldest first."""
        living: dict[int, None] = {}
        for e in self.events[: event + 1]:
            if e < 0:
                living.pop(~e, None)
            else:
                living[e] = None
        return tuple(self.allocations[i] for i in living)

    def items(self, event: int) -> Mapping[str, int]:
        """Bytes by item after an event [bytes]."""
        sums: Counter[str] = Counter()
        for allocation in self.alive(event):
            sums[allocation.item] += allocation.allocated_bytes
        return dict(sums)
