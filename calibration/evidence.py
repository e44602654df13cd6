"""Everything that predictions can be set beside, in one form: own measurements, dry runs, and the publications of others, never mixed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from calibration.accuracy import Comparison as Published
from calibration.fit import Row, terms_of
from calibration.record import Kind
from estimator.correction import conformal_radius, residual
from estimator.fitted import Term

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Nominal coverages at which intervals are judged."""


class Origin(StrEnum):
    """What a figure rests on."""

    MEASURED = "measured"  # by `vramplan calibrate` on a real card
    TRACED = "traced"  # a dry run: the same step on tensors without content, the allocator simulated
    PUBLISHED = "published"  # by others, each row with its citation


class Figure(StrEnum):
    """Which of the three numbers."""

    ALLOCATED = "allocated"
    DEVICE = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One figure beside its prediction, for the versions it was seen with [bytes]."""

    origin: Origin
    figure: Figure
    model: str
    case: str
    """Method and sizes, for people."""
    source: str
    """Card and libraries, or the citation."""
    observed_bytes: int
    predicted_bytes: int

    @property
    def error(self) -> float:
        """ln(observed / predicted): 0.01 is 1 % above the prediction."""
        return residual(self.observed_bytes, self.predicted_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TermPoint:
    """One correctable term of one row, as a share of what is modelled."""

    origin: Origin
    term: Term
    model: str
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """How often intervals of one nominal coverage hold, each made from other models."""

    nominal: float
    inside: int
    judged: int

    @property
    def reached(self) -> float:
        return self.inside / self.judged


def origin_of(row: Row) -> Origin | None:
    """What a row's figures rest on; None for what no comparison may use: others on the card, or no figures at all."""
    if row.record.kind is Kind.TRACED:
        return Origin.TRACED
    return Origin.MEASURED if row.record.is_measurement else None


def points_of(rows: Iterable[Row]) -> Iterator[Point]:
    """The figures of complete rows. Where the allocator was squeezed, device bytes say nothing of a card with room."""
    for row in rows:
        origin, figures, case = origin_of(row), row.record.figures, row.record.case
        if origin is None or figures is None or not row.is_complete:
            continue
        estimate, here = row.prediction.estimate, row.record.environment
        libraries = f"torch {here.torch}, transformers {here.transformers}" if here is not None else "unknown libraries"
        card = (here.gpu if here is not None else None) or "no card"
        seen = {
            Figure.ALLOCATED: (figures.peak_allocated_bytes, estimate.peak.allocated_bytes),
            Figure.DEVICE: (None if figures.num_allocation_retries else figures.device_bytes, estimate.device_bytes),
        }
        for figure, (observed, predicted) in seen.items():
            if observed:
                yield Point(
                    origin=origin,
                    figure=figure,
                    model=row.model,
                    case=f"{_method(row)} {case.batch_size} × {case.sequence_length}",
                    source=f"{card}, {libraries}",
                    observed_bytes=observed,
                    predicted_bytes=predicted,
                )


def _method(row: Row) -> str:
    return (row.prediction.residual_class or "generate").partition(",")[0]


def points_of_published(compared: Iterable[Published]) -> Iterator[Point]:
    """The figures of published rows that judge, each with its citation."""
    for one in compared:
        for figure in Figure:
            if one.judges(figure):
                pair = one.figures[figure]
                yield Point(
                    origin=Origin.PUBLISHED,
                    figure=figure,
                    model=one.run.model.rpartition("/")[2],
                    case=f"{one.run.method}, {one.run.gpu.id}, transformers {'.'.join(map(str, one.run.recipe.stack.transformers))}",
                    source=one.run.row.citation,
                    observed_bytes=pair.measured,
                    predicted_bytes=pair.predicted,
                )


def term_points_of(rows: Iterable[Row]) -> Iterator[TermPoint]:
    """The terms that rows show."""
    for row in rows:
        if (origin := origin_of(row)) is not None:
            for one in terms_of(row):
                yield TermPoint(origin=origin, term=one.term, model=one.model, ratio=one.ratio)


def coverage_of(points: Sequence[Point]) -> tuple[Level, ...]:
    """Nominal against reached coverage of allocated figures, each model judged by intervals that the others make."""
    allocated = [point for point in points if point.figure is Figure.ALLOCATED]
    found = []
    for nominal in LEVELS:
        inside = judged = 0
        for model in dict.fromkeys(point.model for point in allocated):
            radius = conformal_radius([point.error for point in allocated if point.model != model], nominal)
            if radius is None:
                continue
            own = [abs(point.error) <= radius for point in allocated if point.model == model]
            inside, judged = inside + sum(own), judged + len(own)
        if judged:
            found.append(Level(nominal=nominal, inside=inside, judged=judged))
    return tuple(found)


def worst_of(points: Iterable[Point], number: int) -> tuple[Point, ...]:
    """The largest errors, the largest first."""
    return tuple(sorted(points, key=lambda point: -abs(point.error))[:number])
