"""What a traced run allocated and released, in order: phases, passes of layers, peaks, and what was alive then."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from estimator.phases import Segment
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
    """The module that ran; for a tensor that was there before, its own name."""
    phase: str
    item: str
    """What it turned out to be, one of the answer's item names."""
    source: int = -1
    """Its number in the traced run; a copy made for a layer that did not run keeps that of the original. -1 for what no trace made."""

    @property
    def allocated_bytes(self) -> int:
        """As the allocator counts it [bytes]."""
        return allocated(self.num_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Where a phase, or a layer's pass in it, begins."""

    event: int
    """Index into the events."""
    phase: str
    segment: Segment
    layer: int
    """Position of the layer; -1 outside."""


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
    marks: tuple[Mark, ...]
    """In order; the first is at event 0."""

    def spans(self) -> Iterator[tuple[Mark, int]]:
        """Each mark with the event after its last."""
        for mark, following in pairwise(self.marks):
            yield mark, following.event
        if self.marks:
            yield self.marks[-1], len(self.events)

    def peaks(self) -> Mapping[str, PhasePeak]:
        """The worst instant of each phase; of several spans of one phase the larger."""
        sizes = [a.allocated_bytes for a in self.allocations]
        found: dict[str, PhasePeak] = {}
        live = 0
        for mark, end in self.spans():
            worst, at = live, mark.event - 1
            for position in range(mark.event, end):
                event = self.events[position]
                if event < 0:
                    live -= sizes[~event]
                    continue
                live += sizes[event]
                if live > worst:
                    worst, at = live, position
            if mark.phase not in found or worst > found[mark.phase].allocated_bytes:
                found[mark.phase] = PhasePeak(phase=mark.phase, allocated_bytes=worst, event=at)
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


def encode_timeline(timeline: Timeline) -> dict[str, object]:
    """As JSON values; words that recur are numbered."""
    words: dict[str, int] = {}

    def number(word: str) -> int:
        return words.setdefault(word, len(words))

    allocations = [
        [a.num_bytes, list(a.shape), number(a.dtype), number(a.operator), number(a.module), number(a.phase), number(a.item), a.source]
        for a in timeline.allocations
    ]
    marks = [[m.event, number(m.phase), number(m.segment.value), m.layer] for m in timeline.marks]
    return {"words": list(words), "allocations": allocations, "events": list(timeline.events), "marks": marks}


def decode_timeline(data: Mapping[str, Any]) -> Timeline:
    """The inverse of `encode_timeline`.

    Raises:
        ValueError, KeyError, TypeError, IndexError: if the values are not of that form.
    """
    words: list[str] = data["words"]
    return Timeline(
        allocations=tuple(
            Allocation(
                num_bytes=num_bytes,
                shape=tuple(shape),
                dtype=words[dtype],
                operator=words[operator],
                module=words[module],
                phase=words[phase],
                item=words[item],
                source=source,
            )
            for num_bytes, shape, dtype, operator, module, phase, item, source in data["allocations"]
        ),
        events=tuple(data["events"]),
        marks=tuple(
            Mark(event=event, phase=words[phase], segment=Segment(words[segment]), layer=layer)
            for event, phase, segment, layer in data["marks"]
        ),
    )
