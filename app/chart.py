"""Stacked bars, one per phase: plain numbers for an inline SVG."""

from collections.abc import Iterable
from dataclasses import dataclass

from app.answer import Json
from estimator.units import gib

WIDTH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One item of one phase."""

    name: str
    x: float
    width: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One phase."""

    phase: str
    segments: tuple[Segment, ...]
    total: str
    is_peak: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """All phases on one scale, and where the card ends on it."""

    bars: tuple[Bar, ...]
    capacity_x: float | None
    names: tuple[str, ...]


def chart_of(answer: Json) -> Chart:
    """The bars of an answer."""
    phases = answer["phases"]
    peak = max(phase["allocated_bytes"] for phase in phases)
    capacity = answer["fit"]["capacity_bytes"] if answer["fit"] else None
    # A card far larger than the run would squeeze the bars: then its end is not drawn.
    shown = capacity is not None and capacity <= 3 * peak
    scale = WIDTH / max(peak, capacity if shown and capacity is not None else 0, 1)
    return Chart(
        bars=tuple(
            Bar(
                phase=phase["phase"],
                segments=tuple(_segments(phase["items"], scale)),
                total=gib(phase["allocated_bytes"]),
                is_peak=phase["allocated_bytes"] == peak,
            )
            for phase in phases
        ),
        capacity_x=round(capacity * scale, 1) if shown and capacity is not None else None,
        names=tuple(dict.fromkeys(item["name"] for phase in phases for item in phase["items"] if item["bytes"])),
    )


def _segments(items: Iterable[Json], scale: float) -> Iterable[Segment]:
    x = 0.0
    for item in items:
        width = item["bytes"] * scale
        if width > 0:
            yield Segment(name=item["name"], x=round(x, 1), width=round(width, 1), label=f"{item['name']}: {gib(item['bytes'])}")
        x += width
