"""The report of a calibration: one HTML page that carries everything, pictures included."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from app import scatter
from app.answer import Json
from calibration.accuracy import Comparison as Published
from calibration.caps import Proof, proofs, sentences
from calibration.comparison import Comparison
from calibration.evidence import (
    Figure,
    Origin,
    Point,
    coverage_of,
    origin_of,
    points_of,
    points_of_published,
    term_points_of,
    worst_of,
)
from calibration.published import NotModelled
from calibration.record import Kind, Outcome, Record, package_version
from estimator.units import gib

_HERE = Path(__file__).parent
_NUM_WORST = 20
_CAP_KINDS = (Kind.MEASURED, Kind.TRACED)
MEASURE_ALL = "vramplan calibrate all --folder calibrated"
"""What to run on a machine with an NVIDIA card to have everything measured; where it is interrupted, running it again goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The page and its pictures."""

    html: str
    pictures: Mapping[str, str]
    """SVG documents by name."""


def report(
    comparison: Comparison, records: Sequence[Record], published: Sequence[Published], not_modelled: Sequence[NotModelled], *, date: str
) -> Report:
    """The report.

    Args:
        comparison: of own records.
        records: all of them.
        published: rows of others beside their predictions.
        not_modelled: rows of others that are not compared.
        date: of the report, ISO 8601.
    """
    points = (*points_of(comparison.rows), *points_of_published(published))
    pictures = _pictures(points, comparison)
    measured = [point for point in points if point.origin is Origin.MEASURED]
    html = (
        _templates()
        .get_template("calibration.html")
        .render(
            style=Markup((_HERE / "static" / "style.css").read_text(encoding="utf-8")),  # our own file
            version=package_version("vramplan") or "",
            date=date,
            num_measured=len(measured),
            measure_all=MEASURE_ALL,
            standing=standing(comparison, points),
            spreads=[_spread(points, origin, figure) for origin in Origin for figure in Figure if _of(points, origin, figure)],
            pictures=[(name, Markup(svg)) for name, svg in pictures.items()],  # escaped where they are drawn
            missing=_missing(pictures),
            fitted=comparison.spreads if measured else (),
            caps_told=[
                told
                for kind in _CAP_KINDS
                if kind is Kind.MEASURED or _has(records, kind)
                for told in sentences(proofs(_of_kind(records, kind)), kind)
            ],
            caps=[_cap(proof, kind) for kind in _CAP_KINDS for proof in proofs(_of_kind(records, kind))],
            worst=[_worst(point) for point in worst_of(points, _NUM_WORST)],
            problems=list(_problems(comparison)),
            left_out=_left_out(comparison, not_modelled),
        )
    )
    return Report(html=html, pictures=pictures)


def standing(comparison: Comparison, points: Sequence[Point]) -> str:
    """What the report rests on, in words that cannot be misread."""
    rows = Counter(origin for row in comparison.rows if (origin := origin_of(row)) is not None)
    cards = sorted({row.record.environment.gpu or "?" for row in comparison.rows if row.record.is_measurement and row.record.environment})
    quoted = sum(point.origin is Origin.PUBLISHED and point.figure is Figure.ALLOCATED for point in points)
    own = (
        f"{rows[Origin.MEASURED]} own measurements on {', '.join(cards)}"
        if rows[Origin.MEASURED]
        else "No measurement of our own: no record here was made on a real card that nobody else used"
    )
    beside = f"; {rows[Origin.TRACED]} dry runs, which measure nothing" if rows[Origin.TRACED] else ""
    others = f"; {quoted} rows published by others" if quoted else ""
    return f"{own}{beside}{others}."


def _pictures(points: Sequence[Point], comparison: Comparison) -> Mapping[str, str]:
    found = {}
    for figure in Figure:
        if own := [point for point in points if point.figure is figure]:
            found[f"scatter-{figure}"] = scatter.scatter(f"{figure} bytes, predicted over observed", own)
    if terms := tuple(term_points_of(comparison.rows)):
        found["terms"] = scatter.terms("correctable terms", terms)
    levels = {origin: coverage_of([point for point in points if point.origin is origin]) for origin in Origin}
    if reached := {origin: own for origin, own in levels.items() if own}:
        found["coverage"] = scatter.coverage("coverage of intervals made without the model judged", reached)
    return found


def _missing(pictures: Mapping[str, str]) -> list[str]:
    told = {
        "terms": "Terms by themselves: no record shows any; published rows give whole peaks only.",
        "coverage": "Coverage: too few rows of other models for any interval.",
    }
    return [line for name, line in told.items() if name not in pictures]


def _of(points: Iterable[Point], origin: Origin, figure: Figure) -> list[Point]:
    return [point for point in points if point.origin is origin and point.figure is figure]


def _spread(points: Sequence[Point], origin: Origin, figure: Figure) -> Json:
    own = _of(points, origin, figure)
    errors = [point.error for point in own]
    return {
        "origin": origin.value,
        "figure": figure.value,
        "rows": len(own),
        "models": len({point.model for point in own}),
        "median": f"{median(map(abs, errors)):.3%}",
        "within": f"{sum(abs(error) <= 0.03 for error in errors) / len(errors):.0%}",
        "above": f"{max(errors):+.2%}",
        "below": f"{min(errors):+.2%}",
    }


def _worst(point: Point) -> Json:
    return {
        "origin": point.origin.value,
        "figure": point.figure.value,
        "model": point.model,
        "case": point.case,
        "observed": gib(point.observed_bytes),
        "predicted": gib(point.predicted_bytes),
        "error": f"{point.error:+.2%}",
        "source": point.source,
    }


def _of_kind(records: Iterable[Record], kind: Kind) -> list[Record]:
    return [record for record in records if record.kind is kind]


def _has(records: Iterable[Record], kind: Kind) -> bool:
    return any(record.kind is kind and record.case.cap_bytes is not None for record in records)


def _cap(proof: Proof, kind: Kind) -> Json:
    return {
        "kind": kind.value,
        "card": proof.card,
        "case": f"{proof.case.model or proof.case.config.get('model_type')} × {proof.case.sequence_length}",
        "policy": proof.policy,
        "planned": proof.planned or "none fits",
        "ran": ", ".join(map(str, proof.runs.ran)) or "none",
        "gave_back": ", ".join(map(str, proof.runs.retried)) or "none",
        "ran_out": ", ".join(map(str, proof.runs.ran_out)) or "none",
        "tightness": "" if proof.tightness is None else f"{proof.tightness:.0%}",
        "verdict": proof.verdict.value,
    }


def _problems(comparison: Comparison) -> Iterable[str]:
    for bug in comparison.bugs:
        yield (
            f"{bug.model}: {bug.term} is exact, but {bug.measured_bytes:,} bytes were measured and {bug.predicted_bytes:,} predicted "
            f"(case {bug.record_hash})"
        )
    for row in comparison.contradicted:
        case = row.record.case
        yield f"{row.model} {case.batch_size} × {case.sequence_length}: ran out of memory where the prediction fits (case {case.hash})"


def _left_out(comparison: Comparison, not_modelled: Sequence[NotModelled]) -> list[Json]:
    reasons: Counter[tuple[str, str]] = Counter(("published", one.reason) for one in not_modelled)
    reasons.update((one.record.kind.value, one.reason[:200]) for one in comparison.unpredicted)
    for row in comparison.rows:
        if row.record.kind is Kind.MEASURED and row.record.contaminated:
            reasons["measured", "others used the card"] += 1
        elif row.record.outcome is Outcome.OOM:
            reasons[row.record.kind.value, "ran out of memory: only a bound"] += 1
        elif row.record.outcome is not Outcome.OK:
            reasons[row.record.kind.value, row.record.outcome.value] += 1
    return [{"number": number, "of": of, "reason": reason} for (of, reason), number in reasons.most_common()]


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
