"""From a run with a few layers of each kind to the run with all of them.

Every layer that was left out is played by one that ran: what it allocates is allocated again, and dies where its counterpart dies, moved by
as many layers.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from estimator.phases import Segment
from estimator.timeline import Allocation, Mark, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    mark: Mark
    start: int
    end: int

    @property
    def is_layer(self) -> bool:
        return self.mark.segment is not Segment.OUTSIDE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Instance:
    """A span as it is played in the whole run."""

    span: int
    layer: int
    """In the whole model; -1 outside."""
    run: int
    """Which pass through the layers."""


def spliced(timeline: Timeline, stands_for: Sequence[int]) -> Timeline:
    """The timeline of the whole model.

    Args:
        timeline: of a run of the sampled layers.
        stands_for: for every layer of the whole model, the sampled layer that plays it.
    """
    return _Splice(timeline, stands_for).timeline()


class _Splice:
    def __init__(self, timeline: Timeline, stands_for: Sequence[int]) -> None:
        self.source = timeline
        self.stands_for = stands_for
        self.spans = [_Span(mark=mark, start=mark.event, end=end) for mark, end in timeline.spans()]
        self.starts = [span.start for span in self.spans]
        self.instances = list(self._played())
        self.by_place = {(i.run, self.spans[i.span].mark.segment, i.layer): n for n, i in enumerate(self.instances) if i.layer >= 0}
        self.by_span: dict[int, list[int]] = defaultdict(list)
        self.run_of_span: dict[int, int] = {}
        for number, instance in enumerate(self.instances):
            self.by_span[instance.span].append(number)
            self.run_of_span[instance.span] = instance.run
        self.deaths = {~event: position for position, event in enumerate(timeline.events) if event < 0}

    def _played(self) -> Iterator[_Instance]:
        """The spans of the whole run, in order."""
        indices = range(len(self.spans))
        for run, (segment, group) in enumerate(groupby(indices, key=lambda n: self.spans[n].mark.segment)):
            members = list(group)
            if segment is Segment.OUTSIDE:
                yield from (_Instance(span=n, layer=-1, run=run) for n in members)
                continue
            by_layer = {self.spans[n].mark.layer: n for n in members}
            whole = range(len(self.stands_for))
            for layer in whole if segment is Segment.FORWARD else reversed(whole):
                if (n := by_layer.get(self.stands_for[layer])) is not None:
                    yield _Instance(span=n, layer=layer, run=run)

    def _span_of(self, event: int) -> int:
        """The span an event lies in; of several that start there, the last."""
        return bisect_right(self.starts, event) - 1

    def timeline(self) -> Timeline:
        allocations: list[Allocation] = []
        # (instance, event of the source) → allocations that die there
        dying: dict[tuple[int, int], list[int]] = defaultdict(list)
        born: list[list[tuple[int, int]]] = []
        for number, instance in enumerate(self.instances):
            span = self.spans[instance.span]
            here = []
            for position in range(span.start, span.end):
                index = self.source.events[position]
                if index < 0:
                    continue
                clone = len(allocations)
                allocations.append(self._clone(index, instance))
                here.append((position, clone))
                if (place := self._death(index, number)) is not None:
                    dying[place].append(clone)
            born.append(here)
        events: list[int] = []
        marks: list[Mark] = []
        for number, instance in enumerate(self.instances):
            span = self.spans[instance.span]
            marks.append(replace(span.mark, event=len(events), layer=instance.layer))
            births = dict(born[number])
            for position in range(span.start, span.end):
                if position in births:
                    events.append(births[position])
                events += [~clone for clone in dying.get((number, position), ())]
        return Timeline(allocations=tuple(allocations), events=tuple(events), marks=tuple(marks))

    def _clone(self, index: int, instance: _Instance) -> Allocation:
        source = self.source.allocations[index]
        played = self.spans[instance.span].mark.layer
        if instance.layer < 0 or played == instance.layer:
            return source
        return replace(source, module=source.module.replace(f".{played}.", f".{instance.layer}.", 1))

    def _death(self, index: int, number: int) -> tuple[int, int] | None:
        """Where the copy of an allocation, made in instance `number`, dies: (instance, event of the source)."""
        position = self.deaths.get(index)
        if position is None:
            return None
        instance = self.instances[number]
        home, grave = self.spans[instance.span], self._span_of(position)
        if not self.spans[grave].is_layer:
            return self.by_span[grave][0], position
        places = self.by_span[grave]
        if instance.layer < 0:
            # Shared by layers: the last that uses it in the backward pass lets it go.
            return (places[-1] if self.spans[grave].mark.segment is Segment.BACKWARD else places[0]), position
        moved = instance.layer + self.spans[grave].mark.layer - home.mark.layer
        layer = min(max(moved, 0), len(self.stands_for) - 1)
        target = self.by_place.get((self.run_of_span[grave], self.spans[grave].mark.segment, layer))
        if target is None:
            return places[-1], position
        if target <= number:
            return (number, position) if grave == instance.span else (number, home.end - 1)
        if self.instances[target].span == grave:
            return target, position
        played = self.spans[self.instances[target].span]
        return target, min(played.start + position - self.spans[grave].start, played.end - 1)
