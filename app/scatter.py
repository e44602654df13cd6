"""Pictures of errors as SVG documents: points by what they rest on, told apart by shape as well as by colour."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from calibration.evidence import Level, Origin, Point, TermPoint
from estimator.fitted import Term
from estimator.units import GIB, gib

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 560, 420, 76, 44, 52, 24
_COLOURS = {Origin.MEASURED: "#1a7f4b", Origin.TRACED: "#a86400", Origin.PUBLISHED: "#2456c8"}
_INK, _SOFT, _LINE = "#1b2330", "#5c6777", "#c3cad5"
_DECADE = (1, 2, 5)


def scatter(title: str, points: Sequence[Point]) -> str:
    """Predicted over observed bytes on logarithmic axes, with the line on which both agree.

    Args:
        title: of the picture, any text.
        points: at least one.
    """
    values = [value / GIB for point in points for value in (point.observed_bytes, point.predicted_bytes)]
    low, high = min(values) / 1.2, max(values) * 1.2
    across, up = _scale(low, high, _LEFT, _LEFT + _WIDTH), _scale(low, high, _TOP + _HEIGHT, _TOP)
    ticks = list(_ticks(low, high))
    parts = [_frame()]
    for tick in ticks:
        parts.append(_line(across(tick), _TOP, across(tick), _TOP + _HEIGHT))
        parts.append(_line(_LEFT, up(tick), _LEFT + _WIDTH, up(tick)))
        parts.append(_text(across(tick), _TOP + _HEIGHT + 16, f"{tick:g}", "middle"))
        parts.append(_text(_LEFT - 8, up(tick) + 4, f"{tick:g}", "end"))
    parts.append(f'<line x1="{_LEFT}" y1="{_TOP + _HEIGHT}" x2="{_LEFT + _WIDTH}" y2="{_TOP}" stroke="{_INK}" stroke-dasharray="4 3"/>')
    parts.append(_text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 36, "observed [GiB]", "middle"))
    parts.append(_upright("predicted [GiB]"))
    for point in points:
        told = f"{point.origin}: {point.model}, {point.case}: observed {gib(point.observed_bytes)}, {point.error:+.2%} of the prediction"
        parts.append(_mark(point.origin, across(point.observed_bytes / GIB), up(point.predicted_bytes / GIB), told))
    return _document(title, parts, dict.fromkeys(point.origin for point in points))


def terms(title: str, points: Sequence[TermPoint]) -> str:
    """Observed over modelled bytes of each correctable term, one row a term, on a logarithmic axis around 1.

    Args:
        title: of the picture, any text.
        points: at least one.
    """
    ratios = [max(point.ratio, 1e-3) for point in points]
    low, high = min(0.5, *ratios) / 1.1, max(2.0, *ratios) * 1.1
    across = _scale(low, high, _LEFT + 90, _LEFT + _WIDTH)
    row = _HEIGHT / len(Term)
    parts = [_frame()]
    for tick in _ticks(low, high):
        parts.append(_line(across(tick), _TOP, across(tick), _TOP + _HEIGHT))
        parts.append(_text(across(tick), _TOP + _HEIGHT + 16, f"{tick:g}", "middle"))
    parts.append(
        f'<line x1="{across(1):.1f}" y1="{_TOP}" x2="{across(1):.1f}" y2="{_TOP + _HEIGHT}" stroke="{_INK}" stroke-dasharray="4 3"/>'
    )
    for place, term in enumerate(Term):
        own = [point for point in points if point.term is term]
        y = _TOP + (place + 0.5) * row
        parts.append(_text(8, y + 4, f"{term.replace('_', ' ')} ({len(own)})", "start"))
        for number, point in enumerate(own):
            spread = row * 0.6 * ((number * 0.618) % 1 - 0.5)
            told = f"{point.origin}: {point.model}: {point.ratio:.3f} of what is modelled"
            parts.append(_mark(point.origin, across(max(point.ratio, 1e-3)), y + spread, told))
    parts.append(_text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 36, "observed / modelled bytes of the term", "middle"))
    return _document(title, parts, dict.fromkeys(point.origin for point in points))


def coverage(title: str, levels: Mapping[Origin, Sequence[Level]]) -> str:
    """Reached over nominal coverage, each origin by itself.

    Args:
        title: of the picture, any text.
        levels: at least one of one origin.
    """
    across, up = _linear(0.4, 1.0, _LEFT, _LEFT + _WIDTH), _linear(0.0, 1.0, _TOP + _HEIGHT, _TOP)
    parts = [_frame()]
    for tick in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        parts.append(_text(across(tick), _TOP + _HEIGHT + 16, f"{tick:.0%}", "middle"))
    for tick in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(_line(_LEFT, up(tick), _LEFT + _WIDTH, up(tick)))
        parts.append(_text(_LEFT - 8, up(tick) + 4, f"{tick:.0%}", "end"))
    parts.append(
        f'<line x1="{across(0.4):.1f}" y1="{up(0.4):.1f}" x2="{across(1):.1f}" y2="{up(1):.1f}" stroke="{_INK}" stroke-dasharray="4 3"/>'
    )
    for origin, found in levels.items():
        line = " ".join(f"{across(level.nominal):.1f},{up(level.reached):.1f}" for level in found)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{_COLOURS[origin]}"/>')
        for level in found:
            told = f"{origin}: {level.inside} of {level.judged} inside intervals of {level.nominal:.0%}"
            parts.append(_mark(origin, across(level.nominal), up(level.reached), told))
    parts.append(_text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 36, "nominal coverage", "middle"))
    parts.append(_upright("reached on models left out"))
    return _document(title, parts, levels)


class _Axis:
    """From values to places, logarithmically or not."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)


def _linear(low: float, high: float, start: float, end: float) -> _Axis:
    return _Axis(low, high, start, end)


class _LogAxis(_Axis):
    def __call__(self, value: float) -> float:
        return super().__call__(math.log(value))


def _scale(low: float, high: float, start: float, end: float) -> _LogAxis:
    return _LogAxis(math.log(low), math.log(high), start, end)


def _ticks(low: float, high: float) -> Iterable[float]:
    """Round numbers between two values."""
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in _DECADE:
            if low <= (tick := digit * 10.0**power) <= high:
                yield tick


def _mark(origin: Origin, x: float, y: float, told: str) -> str:
    colour = _COLOURS[origin]
    match origin:
        case Origin.MEASURED:
            shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.7">'
        case Origin.TRACED:
            shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="none" stroke="{colour}" stroke-width="1.5">'
        case Origin.PUBLISHED:
            arms = f"M{x - 3:.1f} {y - 3:.1f}l6 6M{x - 3:.1f} {y + 3:.1f}l6 -6"
            shape = f'<path d="{arms}" fill="none" stroke="{colour}" stroke-width="1.5">'
    name = "path" if origin is Origin.PUBLISHED else "circle"
    return f"{shape}<title>{escape(told)}</title></{name}>"


def _frame() -> str:
    return f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="{_LINE}"/>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_LINE}" stroke-width="0.6"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_SOFT}">{escape(text)}</text>'


def _upright(text: str) -> str:
    return f'<text transform="translate(18 {_TOP + _HEIGHT / 2}) rotate(-90)" text-anchor="middle" fill="{_SOFT}">{escape(text)}</text>'


def _document(title: str, parts: Sequence[str], origins: Iterable[Origin]) -> str:
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    legend, x = [], float(_LEFT)
    for origin in origins:
        legend += [_mark(origin, x + 5, 32, origin.value), _text(x + 14, 36, origin.value, "start")]
        x += 100
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12" role="img">',
            f"<title>{escape(title)}</title>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            f'<text x="{_LEFT}" y="18" font-size="15" fill="{_INK}">{escape(title)}</text>',
            *legend,
            *parts,
            "</svg>",
            "",
        ]
    )
