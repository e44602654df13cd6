"""Records beside predictions: errors before and after a fit, in sample and left out, and what no fit may hide."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median

from calibration.fit import MIN_MEASUREMENTS, MIN_MODELS, Bug, Error, Row, bugs, contradicted, coverage, errors, fit, left_out, usable
from calibration.prediction import Predict
from calibration.record import Record
from estimator.correction import COVERAGE
from estimator.errors import VramplanError
from estimator.fitted import Corrections


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpredicted:
    """A record that nothing can be set beside."""

    record: Record
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Errors of one kind, as shares: 0.01 is 1 % above the prediction."""

    name: str
    median: float
    """Of the absolute errors."""
    share_within_3_percent: float
    worst_under: float
    """The largest by which a measurement lay above its prediction; negative where all lay below."""
    worst_over: float
    """The largest by which one lay below, as a negative share."""
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a set of records says."""

    rows: tuple[Row, ...]
    unpredicted: tuple[Unpredicted, ...]
    corrections: Corrections
    as_modelled: tuple[Error, ...]
    in_sample: tuple[Error, ...]
    without_model: tuple[Error, ...]
    """Each row against a fit that has not seen its model."""
    without_length: tuple[Error, ...]
    """Each row against a fit that has not seen its length."""
    bugs: tuple[Bug, ...]
    contradicted: tuple[Row, ...]
    """Out of memory where the corrected prediction lies within the card."""

    @property
    def num_shared(self) -> int:
        """Records of a card that others were using: they are neither compared nor fitted."""
        return sum(record.contaminated for record in (*(row.record for row in self.rows), *(one.record for one in self.unpredicted)))

    @property
    def coverage(self) -> float | None:
        """Share of rows inside the 90 % intervals made from other models."""
        return coverage(self.without_model, COVERAGE)

    @property
    def spreads(self) -> tuple[Spread, ...]:
        """All errors, allocated and device, from the plain prediction to the fits that have not seen the row."""
        sets = {
            "as modelled": self.as_modelled,
            "fitted, in sample": self.in_sample,
            "fitted, model left out": self.without_model,
            "fitted, length left out": self.without_length,
        }
        found = [spread(f"allocated, {name}", [error.allocated for error in errors_]) for name, errors_ in sets.items()]
        found += [spread(f"device, {name}", [e.device for e in errors_ if e.device is not None]) for name, errors_ in sets.items()]
        return tuple(one for one in found if one is not None)

    @property
    def why_nothing(self) -> str:
        """What keeps these records from determining any factor."""
        used = usable(self.rows)
        if not used:
            return f"none of {len(self.rows) + len(self.unpredicted)} records is a measurement on a card of its own"
        models = {row.model for row in used}
        return (
            f"{len(used)} measurements of {len(models)} models determine no factor; a term takes at least {MIN_MEASUREMENTS} of "
            f"{MIN_MODELS} models that show it"
        )


def rows_of(records: Iterable[Record], predict: Predict) -> tuple[tuple[Row, ...], tuple[Unpredicted, ...]]:
    """Each record with its prediction, or the reason why there is none."""
    rows: list[Row] = []
    without: list[Unpredicted] = []
    for record in records:
        if record.figures is None:
            without.append(Unpredicted(record=record, reason=record.error or f"{record.kind} has no figures"))
            continue
        try:
            rows.append(Row(record=record, prediction=predict(record.case, record.environment)))
        except VramplanError as error:
            without.append(Unpredicted(record=record, reason=error.message))
    return tuple(rows), tuple(without)


def compare(rows: Sequence[Row], unpredicted: Sequence[Unpredicted] = (), *, date: str | None = None) -> Comparison:
    """Everything that rows say."""
    corrections = fit(rows, date=date or datetime.now(UTC).date().isoformat())
    return Comparison(
        rows=tuple(rows),
        unpredicted=tuple(unpredicted),
        corrections=corrections,
        as_modelled=tuple(errors(rows, None)),
        in_sample=tuple(errors(rows, corrections)),
        without_model=left_out(rows, lambda row: row.model),
        without_length=left_out(rows, lambda row: row.length),
        bugs=tuple(bugs(rows)),
        contradicted=tuple(contradicted(rows, corrections)),
    )


def spread(name: str, residuals: Sequence[float]) -> Spread | None:
    """How errors lie; None without any.

    Args:
        name: of the set.
        residuals: ln(measured / predicted).
    """
    if not residuals:
        return None
    return Spread(
        name=name,
        median=median(map(abs, residuals)),
        share_within_3_percent=sum(abs(r) <= 0.03 for r in residuals) / len(residuals),
        worst_under=max(residuals),
        worst_over=min(residuals),
        num_rows=len(residuals),
    )
