"""A sweep as a picture: micro-batch over length, coloured by what the card must hold, with the border of what fits."""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from estimator.sweep import Sweep
from estimator.units import gib

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 640, 320, 70, 56, 70
_NUM_LABELS = 8
# From light to dark as a card fills up; what does not fit is grey, so that the picture needs no colours to be read.
_FITS = ("#e8f5e9", "#c8e6c9", "#a5d6a7", "#81c784", "#66bb6a", "#4caf50", "#43a047", "#2e7d32")
_INK, _PAPER = ' color="#000000"', '<rect width="100%" height="100%" fill="#ffffff"/>'
_TIGHT, _TOO_LARGE = "#ffb300", "#bdbdbd"


def draw(title: str, grids: Sequence[tuple[int | None, Sweep]], usable_bytes: int | None, *, standalone: bool = True) -> str:
    """An SVG document.

    Args:
        title: of the picture, any text.
        grids: a rank, if there is one, and the grid for it.
        usable_bytes: of the card; None when there is none, and the largest point is as dark as it gets [bytes].
        standalone: whether it carries its own paper and ink, as a file does; a page, light or dark, has its own.
    """
    height = _TOP + len(grids) * (_HEIGHT + _GAP)
    width = _LEFT + _WIDTH + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img" fill="currentColor"{_INK if standalone else ""}>',
        f"<title>{escape(title)}</title>",
        *([_PAPER] if standalone else []),
        f'<text x="{_LEFT}" y="20" font-size="15">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="38">{escape(_legend(usable_bytes))}</text>',
    ]
    for place, (rank, grid) in enumerate(grids):
        parts += _field(grid, usable_bytes, _TOP + place * (_HEIGHT + _GAP), "" if rank is None or len(grids) == 1 else f"r = {rank}")
    return "\n".join([*parts, "</svg>", ""])


def _legend(usable_bytes: int | None) -> str:
    if usable_bytes is None:
        return "the darker, the more the card must hold"
    return f"green fits {gib(usable_bytes)}, the darker the fuller; amber is tight, grey does not fit; line: largest batch that fits"


def _field(grid: Sweep, usable_bytes: int | None, top: int, caption: str) -> list[str]:
    across, up = _WIDTH / len(grid.lengths), _HEIGHT / len(grid.batches)
    limit = usable_bytes or int(grid.device_bytes.max())
    verdicts = grid.verdicts(limit) if usable_bytes is not None else None
    parts = []
    for row in range(len(grid.batches)):
        colours = [
            _colour(size, limit, "fits" if verdicts is None else verdicts[row][column])
            for column, size in enumerate(grid.device_bytes[row].tolist())
        ]
        y, column = top + _HEIGHT - (row + 1) * up, 0
        for colour, same in groupby(colours):
            number = len(list(same))
            parts.append(
                f'<rect x="{_LEFT + column * across:.2f}" y="{y:.2f}" width="{number * across:.2f}" height="{up:.2f}" fill="{colour}"/>'
            )
            column += number
    parts += _axes(grid, top, across, up)
    if usable_bytes is not None:
        parts.append(_border(grid, usable_bytes, top, across, up))
    if caption:
        parts.append(f'<text x="{_LEFT + 6}" y="{top + 16}">{escape(caption)}</text>')
    return parts


def _colour(num_bytes: int, limit: int, verdict: str) -> str:
    if verdict == "fits":
        return _FITS[min(len(_FITS) - 1, num_bytes * len(_FITS) // limit)]
    return _TIGHT if verdict == "tight" else _TOO_LARGE


def _axes(grid: Sweep, top: int, across: float, up: float) -> list[str]:
    bottom = top + _HEIGHT
    parts = [
        f'<text x="{_LEFT + (column + 0.5) * across:.2f}" y="{bottom + 16}" text-anchor="middle">{grid.lengths[column]}</text>'
        for column in _labelled(len(grid.lengths))
    ]
    parts += [
        f'<text x="{_LEFT - 8}" y="{bottom - (row + 0.5) * up + 4:.2f}" text-anchor="end">{grid.batches[row]}</text>'
        for row in _labelled(len(grid.batches))
    ]
    return [
        *parts,
        f'<text x="{_LEFT + _WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">max_length</text>',
        f'<text transform="translate(16 {top + _HEIGHT / 2}) rotate(-90)" text-anchor="middle">per_device_train_batch_size</text>',
    ]


def _labelled(number: int) -> list[int]:
    every = -(-number // _NUM_LABELS)
    return list(range(0, number, every))


def _border(grid: Sweep, usable_bytes: int, top: int, across: float, up: float) -> str:
    rows = {batch: row + 1 for row, batch in enumerate(grid.batches)}
    points = []
    for column, batch in enumerate(grid.frontier(usable_bytes)):
        y = top + _HEIGHT - (rows[batch] if batch is not None else 0) * up
        points += [f"{_LEFT + column * across:.2f},{y:.2f}", f"{_LEFT + (column + 1) * across:.2f},{y:.2f}"]
    return f'<polyline points="{" ".join(points)}" fill="none" stroke="currentColor" stroke-width="2"/>'
