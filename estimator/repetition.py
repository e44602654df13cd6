"""From the log of a step with a few layers to that of the step with all of them.

Where layers repeat, one period in the middle is played for all between the first and the last: what it makes is made again, and what it
holds of its neighbours is theirs. A log whose layers do not lend themselves to it is refused, and the step is run in full.
"""

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from estimator.log import Log, Mark
from estimator.phases import Segment

_MAX_PERIOD = 8
_NUM_RUN = 3
"""Periods of the middle that are run: the middle one has neighbours of its own kind on both sides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Which layers stand for all."""

    num_layers: int
    start: int
    """First layer of the middle."""
    period: int
    num_periods: int
    """Of the middle, in the whole model."""

    @property
    def end(self) -> int:
        """First layer after the middle."""
        return self.start + self.num_periods * self.period

    @property
    def shift(self) -> int:
        """From the last period that is run to the last of the middle [layers]."""
        return (self.num_periods - _NUM_RUN) * self.period

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that are run: all before the middle, three periods of it, all after it."""
        return (*range(self.start + _NUM_RUN * self.period), *range(self.end, self.num_layers))

    def period_of(self, layer: int) -> int | None:
        """Which of the periods that are run the layer belongs to; None outside the middle."""
        return (layer - self.start) // self.period if self.start <= layer < self.end else None


def sample(kinds: Sequence[Hashable]) -> Sample | None:
    """The fewest layers that can stand for all.

    One period before the middle and one after it are run as well: the first and the last layer have other neighbours.

    Args:
        kinds: of every layer; equal ones do the same.

    Returns:
        None where as many layers would have to be run.
    """
    best = None
    for period in range(1, min(_MAX_PERIOD, len(kinds)) + 1):
        start, length = _longest_stretch(kinds, period)
        num_periods = length // period - 1
        if num_periods > _NUM_RUN:
            found = Sample(num_layers=len(kinds), start=start + period, period=period, num_periods=num_periods)
            if best is None or len(found.layers) < len(best.layers):
                best = found
    return best


def _longest_stretch(kinds: Sequence[Hashable], period: int) -> tuple[int, int]:
    """Where layers equal those a period later for longest: the first of them, and how many there are."""
    best = (0, 0)
    start = 0
    for index in range(period, len(kinds) + 1):
        if index == len(kinds) or kinds[index] != kinds[index - period]:
            best = max(best, (start, index - period - start), key=lambda found: found[1])
            start = index - period + 1
    return best


class IrregularError(Exception):
    """Layers refer to each other in a way that does not repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Storages and events of a micro-batch."""

    kinds: tuple[int, ...]
    """For every storage, which of the sizes it has."""
    events: tuple[int, ...]
    backward: int
    kept: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class _Slice:
    mark: Mark
    end_event: int
    end_storage: int
    sources: list[int] = field(default_factory=list)
    """Slices that made what its events speak of."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """For every event: which of `sources` (from the end where it is released), and the number within it."""

    @property
    def layer(self) -> int:
        return self.mark.layer

    @property
    def num_made(self) -> int:
        return self.end_storage - self.mark.storage


_Instance = tuple[int, int]
"""A slice as it is played: its number, and by how many layers it is moved."""


class _Repetition:
    def __init__(self, log: Log, kinds: Sequence[int], picked: Sample, kept: Sequence[int]) -> None:
        self.sample = picked
        self.kinds = kinds
        following = [*((m.event, m.storage) for m in log.marks[1:]), (len(log.events), len(log.sizes))]
        self.slices = [_Slice(mark=m, end_event=e, end_storage=s) for m, (e, s) in zip(log.marks, following, strict=True)]
        self.starts = [s.mark.storage for s in self.slices]
        self.log = log
        self.kept = kept
        self.places: dict[tuple[Segment, int], int] = {}
        for number, one in enumerate(self.slices):
            if one.layer >= 0 and self.places.setdefault((one.mark.segment, one.layer), number) != number:
                raise IrregularError
        self._check_layouts()

    def program(self) -> Program:
        instances = list(self._played())
        base: dict[_Instance, int] = {}
        kinds: list[int] = []
        for instance in instances:
            base[instance] = len(kinds)
            one = self.slices[instance[0]]
            kinds += self.kinds[one.mark.storage : one.end_storage]
        events: list[int] = []
        backward = 0
        for number, moved in instances:
            one = self.slices[number]
            if one.mark.event == self.log.backward and one.mark.segment is Segment.OUTSIDE:
                backward = len(events)
            said = self.log.events[one.mark.event : one.end_event]
            if one.layer < 0:
                events += self._expanded(said, base)
                continue
            if not one.places:
                self._read(one, said)
            at = [base[self._instance(source, one, moved)] for source in one.sources]
            at += [-b for b in reversed(at)]
            events += [at[which] + within for which, within in one.places]
        return Program(kinds=tuple(kinds), events=tuple(events), backward=backward, kept=tuple(self._expanded(self.kept, base)))

    # -- which slices are played ------------------------------------------------------------------------------------------------------

    def _played(self) -> Iterator[_Instance]:
        """Slices in order; those of the period in the middle again and again."""
        for (is_middle, segment), group in groupby(enumerate(self.slices), key=self._is_repeated):
            numbers = [number for number, _ in group]
            if not is_middle:
                for number in numbers:
                    in_last = self.sample.period_of(self.slices[number].layer) == _NUM_RUN - 1
                    yield number, self.sample.shift if in_last else 0
                continue
            if len(numbers) != self.sample.period:
                raise IrregularError
            copies = range(self.sample.num_periods - _NUM_RUN + 1)
            for copy in copies if segment is Segment.FORWARD else reversed(copies):
                yield from ((number, copy * self.sample.period) for number in numbers)

    def _is_repeated(self, entry: tuple[int, _Slice]) -> tuple[bool, Segment]:
        _, one = entry
        return one.layer >= 0 and self.sample.period_of(one.layer) == 1, one.mark.segment

    def _check_layouts(self) -> None:
        """The periods that are run make the same storages."""
        for (segment, layer), number in self.places.items():
            if self.sample.period_of(layer) in (0, 1):
                twin = self.places.get((segment, layer + self.sample.period))
                if twin is None or self._made(number) != self._made(twin):
                    raise IrregularError

    def _made(self, number: int) -> Sequence[int]:
        return self.kinds[self.slices[number].mark.storage : self.slices[number].end_storage]

    # -- what events speak of ---------------------------------------------------------------------------------------------------------

    def _read(self, one: _Slice, said: Sequence[int]) -> None:
        """Splits the events of a layer into the slices they speak of and numbers within those."""
        sources: dict[int, int] = {}
        for event in said:
            storage = event if event >= 0 else ~event
            source = self._maker(storage)
            which = sources.setdefault(source, len(sources))
            within = storage - self.starts[source]
            one.places.append((which, within) if event >= 0 else (~which, ~within))
        one.sources = list(sources)

    def _maker(self, storage: int) -> int:
        return bisect_right(self.starts, storage) - 1

    def _instance(self, source: int, one: _Slice, moved: int) -> _Instance:
        """The slice that a layer's event speaks of, as it is played beside that layer."""
        period, own = self._period(source), self.sample.period_of(one.layer)
        if period is None:
            return source, 0
        if own is None:
            own = -1 if one.layer < self.sample.start else _NUM_RUN
        if abs(period - own) > 1:
            raise IrregularError
        return self._moved(source, period, self.sample.shift if own == _NUM_RUN else moved)

    def _moved(self, source: int, period: int, moved: int) -> _Instance:
        """The slice that plays what lies `moved` layers after a slice of the middle."""
        layers = self.sample.period
        copy = period + moved // layers
        last = self.sample.num_periods - 1
        played = 0 if copy == 0 else _NUM_RUN - 1 if copy == last else 1
        if not 0 <= copy <= last:
            raise IrregularError
        mark = self.slices[source].mark
        number = self.places[mark.segment, mark.layer + (played - period) * layers]
        return number, (copy - played) * layers

    def _period(self, source: int) -> int | None:
        layer = self.slices[source].layer
        return None if layer < 0 else self.sample.period_of(layer)

    def _expanded(self, said: Sequence[int], base: dict[_Instance, int]) -> list[int]:
        """Events outside the layers, or numbers of storages: what they say of the period in the middle they say of all its copies.

        Raises:
            IrregularError: if they do not go through the periods in order.
        """
        runs = [(period, list(group)) for period, group in groupby(said, key=self._period_of_event)]
        found: list[int] = []
        for position, (period, events) in enumerate(runs):
            moves = [0] if period != _NUM_RUN - 1 else [self.sample.shift]
            if period == 1:
                around = [runs[p][0] if 0 <= p < len(runs) else None for p in (position - 1, position + 1)]
                if sorted(around, key=str) != [0, _NUM_RUN - 1]:
                    raise IrregularError
                moves = [copy * self.sample.period for copy in range(self.sample.num_periods - _NUM_RUN + 1)]
                if around[0] != 0:
                    moves.reverse()
            for moved in moves:
                for event in events:
                    storage = event if event >= 0 else ~event
                    source = self._maker(storage)
                    instance = (source, 0) if period is None else self._moved(source, period, moved)
                    place = base[instance] + storage - self.starts[source]
                    found.append(place if event >= 0 else ~place)
        return found

    def _period_of_event(self, event: int) -> int | None:
        return self._period(self._maker(event if event >= 0 else ~event))


def repeated(log: Log, kinds: Sequence[int], picked: Sample, kept: Sequence[int]) -> Program:
    """The step of the whole model.

    Args:
        log: of a step that ran the layers of the sample.
        kinds: for every storage of the log, which of the sizes it has.
        picked: the sample.
        kept: storages that stay after the step, in the order in which they go.

    Raises:
        IrregularError: if layers do not repeat.
    """
    return _Repetition(log, kinds, picked, kept).program()
