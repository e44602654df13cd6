"""Memory over the events of a run: a few hundred columns with what is alive in each, and the same as an SVG of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from estimator.phases import Item
from estimator.timeline import Timeline
from estimator.units import gib

NUM_COLUMNS = 480
WIDTH, HEIGHT = 1000, 300
_LEFT, _TOP = 64, 22
_LEGEND_KEY, _LEGEND_CHARACTER = 30, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """The largest instant of a stretch of events."""

    phase: str
    event: int
    allocated_bytes: int
    items: Mapping[str, int]
    """Bytes by item [bytes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """One item over the whole run, stacked on those before it."""

    name: str
    points: str
    """Of an SVG polygon."""
    legend_x: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Neighbouring columns of one phase."""

    phase: str
    x: float
    width: float
    is_shaded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineChart:
    """Everything the template draws."""

    bands: tuple[Band, ...]
    stretches: tuple[Stretch, ...]
    ticks: tuple[tuple[float, str], ...]
    """(y, label)."""
    peak_x: float
    peak_y: float
    peak_label: str
    peak_lines: tuple[str, ...]
    reserved: str
    """Points of the line of reserved memory; empty without one."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    top: int = _TOP


def columns_of(timeline: Timeline, number: int = NUM_COLUMNS) -> tuple[Column, ...]:
    """The run cut into stretches of equally many events, none across a border of phases."""
    step = max(1, len(timeline.events) // number)
    sizes = [a.allocated_bytes for a in timeline.allocations]
    live: dict[str, int] = {}
    total = 0
    columns: list[Column] = []
    for mark, end in timeline.spans():
        best: tuple[int, int, dict[str, int]] = (-1, mark.event, {})
        for position in range(mark.event, end):
            event = timeline.events[position]
            index = event if event >= 0 else ~event
            item = timeline.allocations[index].item
            change = sizes[index] if event >= 0 else -sizes[index]
            total += change
            live[item] = live.get(item, 0) + change
            if total > best[0]:
                best = total, position, dict(live)
            if (position - mark.event) % step == step - 1:
                columns.append(Column(phase=mark.phase, event=best[1], allocated_bytes=best[0], items=best[2]))
                best = -1, position, {}
        if best[0] >= 0 and (end - mark.event >= step or _is_new_phase(columns, mark.phase)):
            columns.append(Column(phase=mark.phase, event=best[1], allocated_bytes=best[0], items=best[2]))
        elif best[0] >= 0:
            # a short span joins the column before it
            last = columns[-1]
            if best[0] > last.allocated_bytes:
                columns[-1] = Column(phase=last.phase, event=best[1], allocated_bytes=best[0], items=best[2])
    return tuple(columns)


def _is_new_phase(columns: Sequence[Column], phase: str) -> bool:
    return not columns or columns[-1].phase != phase


def chart(columns: Sequence[Column], *, peak_lines: Sequence[str], reserved: Sequence[int] = ()) -> TimelineChart:
    """The picture.

    Args:
        columns: of the run.
        peak_lines: what is alive at the peak, largest first.
        reserved: bytes held by the allocator at each column [bytes].
    """
    peak = max(columns, key=lambda c: c.allocated_bytes)
    top = max(peak.allocated_bytes, *reserved, 1)
    scale = HEIGHT / top
    x_step = WIDTH / len(columns)
    names = [item.value for item in Item if any(column.items.get(item.value) for column in columns)]
    floors = [0] * len(columns)
    bands = []
    legend_x = 0.0
    for name in names:
        tops = [floor + column.items.get(name, 0) for floor, column in zip(floors, columns, strict=True)]
        upper = [(n * x_step, HEIGHT - y * scale) for n, y in enumerate(tops)]
        lower = [(n * x_step, HEIGHT - y * scale) for n, y in enumerate(floors)]
        bands.append(Band(name=name, points=_points([*upper, *reversed(lower)]), legend_x=round(legend_x, 1)))
        legend_x += _LEGEND_KEY + _LEGEND_CHARACTER * len(name)
        floors = tops
    at = columns.index(peak)
    return TimelineChart(
        bands=tuple(bands),
        stretches=tuple(_stretches(columns, x_step)),
        ticks=tuple((round(HEIGHT - share * HEIGHT, 1), gib(int(top * share))) for share in (0.25, 0.5, 0.75, 1.0)),
        peak_x=round(at * x_step, 1),
        peak_y=round(HEIGHT - peak.allocated_bytes * scale, 1),
        peak_label=f"peak {gib(peak.allocated_bytes)} in {peak.phase}",
        peak_lines=tuple(peak_lines),
        reserved=_points([(n * x_step, HEIGHT - y * scale) for n, y in enumerate(reserved)]),
    )


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


def _stretches(columns: Sequence[Column], x_step: float) -> Sequence[Stretch]:
    found = []
    start = 0
    for number, (phase, group) in enumerate(groupby(columns, key=lambda c: c.phase)):
        length = len(list(group))
        found.append(Stretch(phase=phase, x=round(start * x_step, 1), width=round(length * x_step, 1), is_shaded=number % 2 == 1))
        start += length
    return found
