"""Stacked bars, one per phase and one for the card: plain numbers for inline SVGs."""

from collections.abc import Iterable
from dataclasses import dataclass

from app.answer import Json
from estimator.units import gib

WIDTH = 1000
"""Of the scale that all bars share."""
CACHED, OUTSIDE = "cached", "outside"
"""What the card holds beside live tensors: blocks the allocator keeps, the CUDA context and libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One item of one bar."""

    name: str
    x: float
    width: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One phase, or the card at the peak."""

    name: str
    segments: tuple[Segment, ...]
    total: str
    is_peak: bool

    @property
    def spoken(self) -> str:
        """The bar in words."""
        return f"{self.name}: {self.total}. " + "; ".join(segment.label for segment in self.segments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """All bars on one scale, and where the usable part of the card ends on it."""

    bars: tuple[Bar, ...]
    usable_x: float | None
    """None without a card, or where the run is far smaller than it."""
    usable: str | None
    names: tuple[str, ...]


def usable_bytes(answer: Json) -> int | None:
    """What the run may take of the card: capacity less headroom and what others hold; None without a card [bytes]."""
    fit = answer["fit"]
    return None if fit is None else int(fit["capacity_bytes"] - fit["headroom_bytes"] - fit.get("occupied_bytes", 0))


def chart_of(answer: Json, *, at_least: int = 0) -> Chart:
    """The bars of an answer.

    Args:
        at_least: what the scale must reach, so that charts beside each other have the same one [bytes].
    """
    phases = answer["phases"]
    peak = max(phase["allocated_bytes"] for phase in phases)
    rows = [
        (phase["phase"], [(item["name"], item["bytes"]) for item in phase["items"]], phase["allocated_bytes"] == peak) for phase in phases
    ]
    held = _held(answer)
    if held:
        rows.append(("on the card", held, False))
    usable = usable_bytes(answer)
    longest = largest_bytes(answer)
    # A card far larger than the run would squeeze the bars: then its end is not drawn.
    shown = usable is not None and usable <= 3 * max(longest, at_least)
    scale = WIDTH / (1.02 * max(longest, at_least, usable if shown and usable is not None else 0, 1))
    return Chart(
        bars=tuple(_bar(name, parts, scale, is_peak=is_peak) for name, parts, is_peak in rows),
        usable_x=round(usable * scale, 1) if shown and usable is not None else None,
        usable=None if usable is None else gib(usable),
        names=tuple(dict.fromkeys(name for _, parts, _ in rows for name, size in parts if size)),
    )


def largest_bytes(answer: Json) -> int:
    """The longest bar of an answer [bytes]."""
    held = sum(size for _, size in _held(answer))
    return max([held, *(int(phase["allocated_bytes"]) for phase in answer["phases"])])


def _held(answer: Json) -> list[tuple[str, int]]:
    """What the card holds at the peak: live tensors, cached blocks, and what is outside the allocator."""
    peak = answer["peak"]
    if peak is None or peak["device_bytes"] is None:
        return []
    (phase,) = [phase for phase in answer["phases"] if phase["phase"] == peak["phase"]]
    reserved = peak["reserved_bytes"] or peak["allocated_bytes"]
    return [
        *((item["name"], item["bytes"]) for item in phase["items"]),
        (CACHED, max(0, reserved - peak["allocated_bytes"])),
        (OUTSIDE, max(0, peak["device_bytes"] - max(reserved, peak["allocated_bytes"]))),
    ]


def _bar(name: str, parts: list[tuple[str, int]], scale: float, *, is_peak: bool) -> Bar:
    return Bar(name=name, segments=tuple(_segments(parts, scale)), total=gib(sum(size for _, size in parts)), is_peak=is_peak)


def _segments(parts: Iterable[tuple[str, int]], scale: float) -> Iterable[Segment]:
    x = 0.0
    for name, size in parts:
        width = size * scale
        if width > 0:
            yield Segment(name=name, x=round(x, 1), width=round(width, 1), label=f"{name} {gib(size)}")
        x += width
