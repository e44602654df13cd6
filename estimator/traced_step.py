"""From traced timelines at a few batches and lengths to the instants at which each phase can be largest, for every batch and length.

The program is the same at every size of one regime: allocation by allocation it only grows. So each allocation's size is a polynomial in
batch and length, and what is alive at an instant is their sum.

Legend: B micro-batch, S sequence length.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np

from estimator.phases import Item, Phase
from estimator.splice import spliced
from estimator.step import Program
from estimator.tape import POWERS, Extent, Polynomial, Size, Snapshot
from estimator.timeline import Mark, Timeline

Point = tuple[int, int]
_Integers = np.ndarray[tuple[int], np.dtype[np.int64]]
_Matrix = np.ndarray[tuple[int, int], np.dtype[np.int64]]

_STEP_PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)


class NotOneProgramError(Exception):
    """The run is not the same program at all sizes; the message says where it differs."""


def encode_program(found: Program) -> dict[str, object]:
    """As JSON values."""
    return {
        phase.value: [
            [[item.value, [list(term[:3]) for term in _terms(extent)], extent.label, number] for (item, extent), number in snapshot.held]
            for snapshot in snapshots
        ]
        for phase, snapshots in found.peaks.items()
    }


def decode_program(data: Mapping[str, Any]) -> Program:
    """The inverse of `encode_program`.

    Raises:
        ValueError, KeyError, TypeError: if the values are not of that form.
    """
    return Program(peaks={Phase(phase): tuple(_decoded(snapshot) for snapshot in snapshots) for phase, snapshots in data.items()})


def _decoded(held: Sequence[Sequence[Any]]) -> Snapshot:
    return _snapshot_of({(Item(item), Polynomial(tuple(Extent(*term) for term in terms), label)): n for item, terms, label, n in held})


def _terms(extent: Size) -> tuple[Extent, ...]:
    return extent.terms if isinstance(extent, Polynomial) else (extent,)


def points(smallest: int, largest: int) -> tuple[Point, ...]:
    """Where to trace a regime: three lengths at one batch, one length at another.

    Args:
        smallest: shortest length of the regime [tokens].
        largest: longest one [tokens].
    """
    lengths = _lengths(smallest, largest)
    return (*((2, length) for length in lengths), (3, lengths[0]))


def _lengths(smallest: int, largest: int) -> tuple[int, int, int]:
    for step in (512, 64, 8, 1):
        first = max(-(-smallest // step), 1) * step
        if first + 2 * step <= largest:
            return first, first + step, first + 2 * step
    raise NotOneProgramError(f"lengths from {smallest} to {largest} are too few to tell how memory grows")


def program(timelines: Mapping[Point, Timeline], stands_for: Sequence[int]) -> Program:
    """The step's candidates for the peak.

    Args:
        timelines: of the sampled layers, at `points`.
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
    return Program(peaks=peaks)


def _first_event(whole: Timeline) -> int:
    """Where the last micro-batch begins: what was there before is counted elsewhere."""
    return max(mark.event for mark, before in _with_previous(whole.marks) if mark.phase == Phase.FORWARD and before != Phase.FORWARD)


def _with_previous(marks: Sequence[Mark]) -> Iterator[tuple[Mark, str]]:
    before = ""
    for mark in marks:
        yield mark, before
        before = mark.phase


def _positions(whole: Timeline, phase: Phase, first: int, stands_for: Sequence[int]) -> _Integers:
    """Instants of a phase that can be its largest.

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
    ranges = [np.arange(max(mark.event - 1, first), end) for number, (mark, end) in enumerate(spans) if mark.layer < 0 or number in chosen]
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
    living: set[int] = set()
    for event in whole.events[first : position + 1]:
        if event < 0:
            living.discard(~event)
        else:
            living.add(event)
    held: Counter[tuple[Item, Size]] = Counter()
    for index in living:
        allocation = whole.allocations[index]
        held[Item(allocation.item), extents[allocation.source]._replace(label=_label(allocation.module, allocation.operator))] += 1
    return _snapshot_of(held)


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


def _extents(timelines: Mapping[Point, Timeline]) -> list[Polynomial]:
    reference = next(iter(timelines.values()))
    for point, timeline in timelines.items():
        if timeline.events != reference.events or len(timeline.allocations) != len(reference.allocations):
            raise NotOneProgramError(f"the run at batch {point[0]} and length {point[1]} makes other tensors than the others")
    (batch, *_), *_ = sizes_at = list(timelines)
    lengths = [S for B, S in sizes_at if batch == B]
    other = next(B for B, _ in sizes_at if batch != B)
    columns = [[t.allocations[i].num_bytes for t in timelines.values()] for i in range(len(reference.allocations))]
    known: dict[tuple[int, ...], Polynomial] = {}
    found = []
    for sizes in map(tuple, columns):
        if sizes not in known:
            known[sizes] = _polynomial(sizes[:-1], sizes[-1], lengths, batch, other)
        found.append(known[sizes])
    return found


def _polynomial(sizes: Sequence[int], other_size: int, lengths: Sequence[int], batch: int, other: int) -> Polynomial:
    """A size in bytes as a polynomial: quadratic in the length, and proportional to the batch or independent of it."""
    coefficients = _quadratic(lengths, sizes)
    if other_size == sizes[0]:
        power, divisor = 0, 1
    elif other_size * batch == sizes[0] * other:
        power, divisor = 1, batch
    else:
        raise NotOneProgramError(f"a tensor of {sizes[0]} bytes at batch {batch} has {other_size} at batch {other}")
    terms = []
    for exponent, coefficient in enumerate(coefficients):
        coefficient /= divisor
        if coefficient.denominator != 1:
            raise NotOneProgramError(f"a tensor of {sizes[0]}, {sizes[1]} and {sizes[2]} bytes grows by no polynomial in the length")
        if coefficient:
            terms.append(Extent(int(coefficient), power, exponent))
    return Polynomial(tuple(terms))


def _quadratic(lengths: Sequence[int], sizes: Sequence[int]) -> tuple[Fraction, Fraction, Fraction]:
    """Coefficients of the parabola through three points, constant first."""
    (x0, x1, x2), (y0, y1, y2) = lengths, sizes
    slope = Fraction(y1 - y0, x1 - x0)
    bend = (Fraction(y2 - y1, x2 - x1) - slope) / (x2 - x0)
    return y0 - slope * x0 + bend * x0 * x1, slope - bend * (x0 + x1), bend
