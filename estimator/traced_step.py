"""From traced timelines at a few batches and lengths to the instants at which each phase can be largest, for every batch and length.

The program is the same at every size of one regime: allocation by allocation it only grows. So each allocation's size is a polynomial in
batch and length, and what is alive at an instant is their sum.

Legend: B micro-batch, S sequence length.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, pairwise
from math import ceil
from typing import Any

import numpy as np

from estimator.extent import POWERS, Extent, Polynomial, Size, Snapshot
from estimator.kernels import Kernel
from estimator.phases import Item, Phase
from estimator.schedule import MicroBatch, Schedule, decode_schedule, encode_schedule
from estimator.splice import spliced
from estimator.step import Program
from estimator.timeline import Mark, Timeline

Point = tuple[int, int]
_Integers = np.ndarray[tuple[int], np.dtype[np.int64]]
_Matrix = np.ndarray[tuple[int, int], np.dtype[np.int64]]

_STEP_PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)


class NotOneProgramError(Exception):
    """The run is not the same program at all sizes; the message says where it differs."""


def encode_program(found: Program) -> dict[str, object]:
    """As JSON values."""
    peaks = {
        phase.value: [
            [[item.value, [list(term[:3]) for term in _terms(extent)], extent.label, number] for (item, extent), number in snapshot.held]
            for snapshot in snapshots
        ]
        for phase, snapshots in found.peaks.items()
    }
    schedule = None if found.schedule is None else encode_schedule(found.schedule)
    return {"peaks": peaks, "kernels": sorted(found.kernels), "schedule": schedule}


def decode_program(data: Mapping[str, Any]) -> Program:
    """The inverse of `encode_program`.

    Raises:
        ValueError, KeyError, TypeError: if the values are not of that form.
    """
    peaks = {Phase(phase): tuple(_decoded(snapshot) for snapshot in snapshots) for phase, snapshots in data["peaks"].items()}
    schedule = None if data["schedule"] is None else decode_schedule(data["schedule"])
    return Program(peaks=peaks, kernels=frozenset(map(Kernel, data["kernels"])), schedule=schedule)


def _decoded(held: Sequence[Sequence[Any]]) -> Snapshot:
    return _snapshot_of({(Item(item), Polynomial(tuple(Extent(*term) for term in terms), label)): n for item, terms, label, n in held})


def _terms(extent: Size) -> tuple[Extent, ...]:
    return extent.terms if isinstance(extent, Polynomial) else (extent,)


ALIGNMENTS = (8, 64, 256)
"""Lengths are padded inside a step: masks to 8 for the memory-efficient kernel, scans to whole chunks of 64 or up to 256. What holds for
multiples of 8 is taken to hold for every length."""


def points(smallest: int, largest: int, alignment: int = ALIGNMENTS[0], *, one_sequence: bool = False) -> tuple[Point, ...]:
    """Where to trace a regime: three lengths at one batch, and at another a length that tells what goes in steps.

    Args:
        smallest: shortest length of the regime [tokens].
        largest: longest one [tokens].
        alignment: of the lengths that the program is to hold for [tokens].
        one_sequence: whether at a batch of one, for which alone the program then holds.
    """
    batch, other = (1, 1) if one_sequence else (2, 3)
    first, step = _lengths(smallest, largest)
    checked = first + (_odd(step, alignment) or 3 * step)
    return (*((batch, first + n * step) for n in range(3)), (other, checked if checked <= largest else first))


def _odd(step: int, alignment: int) -> int:
    """An odd multiple of the alignment short of the step; 0 where there is no room."""
    return (step // 4 + alignment) // alignment * alignment if alignment < step else 0


def _lengths(smallest: int, largest: int) -> tuple[int, int]:
    for step in (512, 64, 8, 1):
        first = max(-(-smallest // step), 1) * step
        if first + 2 * step <= largest:
            return first, step
    raise NotOneProgramError(f"lengths from {smallest} to {largest} are too few to tell how memory grows")


def program(timelines: Mapping[Point, Timeline], stands_for: Sequence[int]) -> Program:
    """The step's candidates for the peak.

    Args:
        timelines: of the sampled layers, at `points`; or at two batches of one length, or at one size. It holds for no more than that.
        stands_for: see `splice.spliced`.

    Raises:
        NotOneProgramError: if the runs do not match, or a size is no polynomial.
    """
    reference = next(iter(timelines.values()))
    extents = _extents(timelines)
    whole = spliced(reference, stands_for)
    first = _first_event(whole)
    owners = np.array([a.source for a in whole.allocations], dtype=np.int64)
    totals = np.array([extent.totals() for extent in extents], dtype=np.int64)
    events = np.array(whole.events, dtype=np.int64)
    signs = np.where(events < 0, -1, 1)
    indices = np.where(events < 0, ~events, events)
    counted = np.zeros(len(whole.allocations), dtype=bool)
    counted[[e for e in whole.events[first:] if e >= 0]] = True
    deltas = totals[owners[indices]] * (signs * counted[indices])[:, None]
    live = np.cumsum(deltas, axis=0)
    peaks: dict[Phase, tuple[Snapshot, ...]] = {}
    for phase in _STEP_PHASES:
        positions = _positions(whole, phase, first, stands_for)
        if positions.size:
            front = _front(live, positions)
            peaks[phase] = tuple(_snapshot(whole, int(position), first, extents) for position in front)
    return Program(peaks=peaks, schedule=_schedule(whole, extents))


def outline_points(*, one_sequence: bool = False) -> tuple[Point, ...]:
    """Where a loop over tokens is traced: three lengths at two batches, and last a size at which the outcome is checked.

    Args:
        one_sequence: whether for a batch of one, in which some copies are left off: then at no other.
    """
    batches, check = ((1,), (1, 80)) if one_sequence else ((2, 3), (4, 80))
    return (*((B, S) for B in batches for S in (32, 48, 64)), check)


_OUTLINE_ERROR = 1e-3


def outline(timelines: Mapping[Point, Timeline], stands_for: Sequence[int]) -> Program:
    """The candidates of a program that makes other tensors at every length, as a loop over tokens does.

    Tensors cannot be matched then, so what each pass of a layer holds at its worst is fitted, item by item: up to quadratic in the length,
    linear in the batch. The allocator's rounding is left out.

    Args:
        timelines: of the sampled layers, at `outline_points`; it holds for a batch of one if those are of one.
        stands_for: see `splice.spliced`.

    Raises:
        NotOneProgramError: if the last point is not met within 0.1 %.
    """
    *fitted, check = timelines
    worst = {point: _worst_of_passes(spliced(timeline, stands_for), stands_for) for point, timeline in timelines.items()}
    peaks = {}
    for phase in _STEP_PHASES:
        if len({len(passes[phase]) for passes in worst.values()}) > 1:
            raise NotOneProgramError(f"the {phase.value} pass has other parts at other lengths")
        numbers = range(len(worst[check][phase]))
        peaks[phase] = tuple(_fitted({point: worst[point][phase][number] for point in fitted}) for number in numbers)
        told = max((snapshot.at(*check) for snapshot in peaks[phase]), default=0)
        seen = max((sum(held.values()) for held in worst[check][phase]), default=0)
        if abs(told - seen) > _OUTLINE_ERROR * seen:
            raise NotOneProgramError(f"the {phase.value} pass takes {seen} bytes at {check}, and {told} by its growth up to there")
    return Program(peaks={phase: snapshots for phase, snapshots in peaks.items() if snapshots})


def _worst_of_passes(whole: Timeline, stands_for: Sequence[int]) -> dict[Phase, list[Counter[Item]]]:
    """Bytes by item at the worst instant of each pass [bytes]."""
    first = _first_event(whole)
    there = {event for event in whole.events[:first] if event >= 0}
    events = np.array(whole.events, dtype=np.int64)
    indices = np.where(events < 0, ~events, events)
    sizes = np.array([0 if index in there else a.num_bytes for index, a in enumerate(whole.allocations)], dtype=np.int64)
    live = np.cumsum(np.where(events < 0, -1, 1) * sizes[indices])
    found: dict[Phase, list[Counter[Item]]] = {}
    for phase in _STEP_PHASES:
        found[phase] = []
        for instants in _ranges(whole, phase, first, stands_for):
            sums: Counter[Item] = Counter()
            for index in _living(whole, instants.start + int(np.argmax(live[instants.start : instants.stop])), first):
                sums[Item(whole.allocations[index].item)] += whole.allocations[index].num_bytes
            found[phase].append(sums)
    return found


def _fitted(seen: Mapping[Point, Counter[Item]]) -> Snapshot:
    lengths, batches = sorted({S for _, S in seen}), sorted({B for B, _ in seen})
    small, large = batches[0], batches[-1]
    held: dict[tuple[Item, Size], int] = {}
    for item in sorted({item for sums in seen.values() for item in sums}):
        one, two = ([Fraction(seen[B, S][item]) for S in lengths] for B in (small, large))
        per_batch = _quadratic(lengths, [(b - a) / max(large - small, 1) for a, b in zip(one, two, strict=True)])
        fixed = _quadratic(lengths, [a - small * (b - a) / max(large - small, 1) for a, b in zip(one, two, strict=True)])
        terms = [Extent(ceil(c), batch, n) for batch, parts in enumerate((fixed, per_batch)) for n, c in enumerate(parts) if c]
        held[item, Polynomial(tuple(terms))] = 1
    return _snapshot_of(held)


def _first_event(whole: Timeline) -> int:
    """Where the last micro-batch begins: what was there before is counted elsewhere."""
    return _beginnings(whole)[-1]


def _beginnings(whole: Timeline) -> list[int]:
    """The first event of each micro-batch."""
    return [mark.event for mark, before in _with_previous(whole.marks) if mark.phase == Phase.FORWARD and before != Phase.FORWARD]


def _schedule(whole: Timeline, extents: Sequence[Polynomial]) -> Schedule:
    update = next((mark.event for mark in whole.marks if mark.phase == Phase.OPTIMIZER_STEP), len(whole.events))
    bounds = pairwise([*_beginnings(whole), update])
    parts = [_micro_batch(whole, extents, range(start, end)) for start, end in bounds]
    return Schedule(first=parts[0], later=parts[-1])


def _micro_batch(whole: Timeline, extents: Sequence[Polynomial], events: range) -> MicroBatch:
    """What the events of one micro-batch make, and when it goes; what was there before is not theirs."""
    backward = next(mark.event for mark in whole.marks if mark.phase == Phase.BACKWARD and mark.event in events)
    numbers: dict[int, int] = {}
    alive: dict[int, None] = {}
    own: list[int] = []
    num_before = 0
    for position in events:
        if position == backward:
            num_before = len(own)
        event = whole.events[position]
        if event >= 0:
            number = numbers[event] = len(numbers)
            alive[event] = None
            own.append(number)
        elif (known := numbers.get(~event)) is not None:
            del alive[~event]
            own.append(~known)
    return MicroBatch.of(
        (extents[whole.allocations[index].source] for index in numbers),
        own,
        backward=num_before,
        kept=[numbers[index] for index in alive if whole.allocations[index].item == Item.GRADIENTS],
    )


def _with_previous(marks: Sequence[Mark]) -> Iterator[tuple[Mark, str]]:
    before = ""
    for mark in marks:
        yield mark, before
        before = mark.phase


def _ranges(whole: Timeline, phase: Phase, first: int, stands_for: Sequence[int]) -> list[range]:
    """Instants of a phase that can be its largest, passes of layers apart.

    From one copy of a layer to the next what is alive changes by a constant: the first and the last copy decide.
    """
    spans = [(mark, end) for mark, end in whole.spans() if mark.phase == phase and mark.event >= first]
    ends: dict[int, tuple[int, int]] = {}
    for number, (mark, _) in enumerate(spans):
        if mark.layer >= 0:
            played = stands_for[mark.layer]
            ends[played] = (ends.get(played, (number, 0))[0], number)
    chosen = {number for pair in ends.values() for number in pair}
    # A span begins with what the one before left.
    return [range(max(mark.event - 1, first), end) for number, (mark, end) in enumerate(spans) if mark.layer < 0 or number in chosen]


def _positions(whole: Timeline, phase: Phase, first: int, stands_for: Sequence[int]) -> _Integers:
    ranges = [np.arange(r.start, r.stop) for r in _ranges(whole, phase, first, stands_for)]
    return np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)


# Sets of powers that hold with each power all that are never smaller, for B and S from 1 on. Every size that never falls with B and S is a
# sum of such sets with weights of at least zero.
_UPPER_SETS = [
    upper
    for size in range(1, len(POWERS) + 1)
    for upper in combinations(range(len(POWERS)), size)
    if all(
        other in upper
        for power in upper
        for other in range(len(POWERS))
        if POWERS[other][0] >= POWERS[power][0] and POWERS[other][1] >= POWERS[power][1]
    )
]


def _front(live: _Matrix, positions: _Integers) -> list[int]:
    """Instants that no other beats at every batch and length."""
    rows, kept = np.unique(live[positions], axis=0, return_index=True)
    sums = np.stack([rows[:, list(upper)].sum(axis=1) for upper in _UPPER_SETS], axis=1)
    front: list[int] = []
    for candidate in np.argsort(-sums.sum(axis=1).astype(float), kind="stable"):
        if not front or not bool(np.any(np.all(sums[front] >= sums[candidate], axis=1))):
            front.append(int(candidate))
    return [int(positions[kept[candidate]]) for candidate in front]


def _snapshot(whole: Timeline, position: int, first: int, extents: Sequence[Polynomial]) -> Snapshot:
    held: Counter[tuple[Item, Size]] = Counter()
    for index in _living(whole, position, first):
        allocation = whole.allocations[index]
        held[Item(allocation.item), extents[allocation.source]._replace(label=_label(allocation.module, allocation.operator))] += 1
    return _snapshot_of(held)


def _living(whole: Timeline, position: int, first: int) -> set[int]:
    """Allocations made since `first` and alive after the event at `position`."""
    living: set[int] = set()
    for event in whole.events[first : position + 1]:
        if event < 0:
            living.discard(~event)
        else:
            living.add(event)
    return living


def _snapshot_of(held: Mapping[tuple[Item, Size], int]) -> Snapshot:
    sums = [0] * len(POWERS)
    for (_, extent), number in held.items():
        for power, coefficient in enumerate(extent.totals()):
            sums[power] += number * coefficient
    return Snapshot(tuple(sums), tuple(held.items()))


def _label(module: str, operator: str) -> str:
    """`self_attn.q_proj mm` of `model.layers.7.self_attn.q_proj`: alike for all layers."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return f"{'.'.join(parts[numbers[0] + 1 :] if numbers else parts)} {operator}".strip()


# -- sizes ------------------------------------------------------------------------------------------------------------------------------


def check_growth(timelines: Mapping[Point, Timeline]) -> None:
    """Refuses runs of one batch, up to three lengths, that no other run makes one program of.

    Raises:
        NotOneProgramError: if one makes or releases other tensors than the first, or a tensor grows by no polynomial.
    """
    if len(timelines) == 3:
        _extents(timelines)
    else:
        _check_alike(timelines)


def _check_alike(timelines: Mapping[Point, Timeline]) -> None:
    reference = next(iter(timelines.values()))
    for (batch, length), timeline in timelines.items():
        if timeline.events != reference.events or len(timeline.allocations) != len(reference.allocations):
            raise NotOneProgramError(f"the run at batch {batch} and length {length} makes other tensors than the others")


def _extents(timelines: Mapping[Point, Timeline]) -> list[Polynomial]:
    _check_alike(timelines)
    known: dict[tuple[int, ...], Polynomial] = {}
    found = []
    for sizes in zip(*([a.num_bytes for a in t.allocations] for t in timelines.values()), strict=True):
        if sizes not in known:
            known[sizes] = _polynomial(tuple(timelines), sizes)
        found.append(known[sizes])
    return found


def _polynomial(at: Sequence[Point], sizes: Sequence[int]) -> Polynomial:
    """A size in bytes as a polynomial: up to quadratic in the length, and proportional to the batch or independent of it.

    Args:
        at: where it was seen: some lengths at one batch, then any length, at another one if the size is to be told for others.
        sizes: what was seen [bytes].
    """
    batch = at[0][0]
    lengths = [S for B, S in at if batch == B][:3]
    coefficients = _parabola(lengths, sizes)
    for power in (0, 1):
        if all(_value(coefficients, S) * B**power == size * batch**power for (B, S), size in zip(at, sizes, strict=True)):
            break
    else:
        raise NotOneProgramError(f"a tensor of {sizes[0]} bytes at {at[0]} has {sizes[-1]} at {at[-1]}")
    terms = []
    for exponent, coefficient in enumerate(coefficients):
        share = coefficient / batch**power
        if share.denominator != 1:
            raise NotOneProgramError(f"a tensor of {', '.join(map(str, sizes))} bytes grows by no polynomial in the length")
        if share:
            terms.append(Extent(int(share), power, exponent))
    return Polynomial(tuple(terms))


def _value(coefficients: Sequence[Fraction], length: int) -> Fraction:
    return sum((c * length**n for n, c in enumerate(coefficients)), Fraction(0))


def _parabola(lengths: Sequence[int], sizes: Sequence[int]) -> tuple[Fraction, ...]:
    """Coefficients of the parabola through three points, constant first; of one point, the constant."""
    return _quadratic(lengths, sizes) if len(lengths) == 3 else (Fraction(sizes[0]),)


def _quadratic(lengths: Sequence[int], sizes: Sequence[int | Fraction]) -> tuple[Fraction, Fraction, Fraction]:
    """Coefficients of the parabola through three points, constant first."""
    (x0, x1, x2), (y0, y1, y2) = lengths, sizes[:3]
    slope = Fraction(y1 - y0, x1 - x0)
    bend = (Fraction(y2 - y1, x2 - x1) - slope) / (x2 - x0)
    return y0 - slope * x0 + bend * x0 * x1, slope - bend * (x0 + x1), bend
