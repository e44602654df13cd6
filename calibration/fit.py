"""From records and predictions to corrections: one robust factor a term, only where the measurements determine it.

Each term is read where it stands alone: workspaces between steps, temporaries as what a phase adds to that, slack as reserved less
allocated, context as device less reserved. So no term can hide another's error. A factor is the weighted median of measured over modelled
bytes, with one row of prior weight at 1: half the rows may be wrong without moving it far.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from calibration.prediction import Prediction
from calibration.record import Outcome, Record
from estimator.correction import conformal_radius, residual
from estimator.fitted import Correction, Corrections, Group, Term, corrected, group_of
from estimator.phases import Phase
from estimator.units import MIB

# Fewer rows, or fewer models, than this do not determine a factor.
MIN_MEASUREMENTS = 5
MIN_MODELS = 2
# A term that is less than this share of what is allocated drowns in what lies around it.
_VISIBLE_SHARE = 0.01
# Blocks whose remainder was not split off count in full: a large tensor may show up to 1 MiB more than it asked for.
_UNSPLIT_SHARE, _UNSPLIT_BYTES = 0.005, 4 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A record with its prediction."""

    record: Record
    prediction: Prediction

    @property
    def model(self) -> str:
        """What rows of one model share, however many layers of it were run."""
        return self.record.case.model or hashlib.sha256(repr(sorted(self.record.case.config.items())).encode()).hexdigest()[:12]

    @property
    def length(self) -> int:
        return self.record.case.sequence_length

    @property
    def is_complete(self) -> bool:
        """Whether the run came to its end: one that ran out of memory only tells that the peak is above the card."""
        return self.record.outcome is Outcome.OK


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One term of one row [bytes]."""

    term: Term
    group: Group
    model: str
    modelled_bytes: int
    measured_bytes: int

    @property
    def ratio(self) -> float:
        return self.measured_bytes / self.modelled_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """An exact term that a measurement contradicts: never fitted, always told."""

    record_hash: str
    model: str
    term: str
    measured_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """A corrected prediction beside its measurement, as ln(measured / predicted)."""

    row: Row
    allocated: float
    device: float | None


def usable(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows that a fit may use: measured, alone on the card, without a squeezed allocator.

    Traced and dry records are refused here, whatever they say.
    """
    return tuple(row for row in rows if row.record.is_measurement)


def observations(rows: Iterable[Row]) -> Iterator[Observation]:
    """What complete rows that a fit may use show of each term."""
    for row in usable(rows):
        yield from terms_of(row)


def terms_of(row: Row) -> Iterator[Observation]:
    """What a row shows of each term, whatever it rests on; nothing of a run that did not come to its end."""
    if not row.is_complete:
        return
    for term, measured in _measured(row).items():
        modelled = row.prediction.modelled_bytes(term)
        if modelled > 0 and measured is not None and measured >= 0:
            yield Observation(
                term=term, group=group_of(row.prediction.recipe), model=row.model, modelled_bytes=modelled, measured_bytes=measured
            )


def _measured(row: Row) -> dict[Term, int | None]:
    figures, prediction = row.record.figures, row.prediction
    if figures is None or figures.steady_state_bytes is None:
        return {}
    allocated, reserved, device = figures.peak_allocated_bytes, figures.peak_reserved_bytes, figures.device_bytes
    squeezed = bool(figures.num_allocation_retries)
    # segments given back under pressure are missing from what is held at the end
    context = None if squeezed or device is None or reserved is None else device - reserved - prediction.estimate.paged_bytes
    if not row.record.case.is_training:
        return {Term.CONTEXT: context}  # of generation temporaries and slack are modelled in another way
    return {
        Term.WORKSPACE: figures.steady_state_bytes - (prediction.steady_state_bytes - prediction.workspace_bytes),
        Term.FORWARD_TEMPORARIES: _temporaries(row, Phase.FORWARD, Term.FORWARD_TEMPORARIES),
        Term.BACKWARD_TEMPORARIES: _temporaries(row, Phase.BACKWARD, Term.BACKWARD_TEMPORARIES),
        Term.SLACK: None if squeezed or allocated is None or reserved is None else reserved - allocated,
        Term.CONTEXT: context,
    }


def _temporaries(row: Row, phase: Phase, term: Term) -> int | None:
    """Temporaries of layers as measured: what the phase adds to the steady state, less what is exact in it [bytes]."""
    figures, prediction = row.record.figures, row.prediction
    predicted = prediction.phase(phase)
    seen = figures.phases.get(phase.value) if figures is not None else None
    if figures is None or figures.steady_state_bytes is None or predicted is None or seen is None:
        return None
    head, layers = figures.backward_head_bytes, figures.backward_layers_bytes
    if phase is Phase.BACKWARD and head is not None and layers is not None and head > layers:
        return None  # the peak was the loss's, and the layers stood lower
    modelled = prediction.modelled_bytes(term)
    if modelled < _VISIBLE_SHARE * predicted.allocated_bytes:
        return None
    exact = predicted.allocated_bytes - prediction.steady_state_bytes - modelled
    return seen.allocated_bytes - figures.steady_state_bytes - exact


def bugs(rows: Iterable[Row]) -> Iterator[Bug]:
    """Exact terms that measurements contradict: less than must be there, or more than unsplit blocks account for."""
    for row in usable(rows):
        figures = row.record.figures
        if figures is None:
            continue
        exact_steady = row.prediction.steady_state_bytes - row.prediction.workspace_bytes
        for term, measured, predicted, bounded in (
            ("loaded", figures.loaded_bytes, row.prediction.loaded_bytes, True),
            ("steady_state without workspace", figures.steady_state_bytes, exact_steady, False),
        ):
            if measured is None or (term != "loaded" and not row.record.case.is_training):
                continue
            tolerated = max(_UNSPLIT_BYTES, round(_UNSPLIT_SHARE * predicted))
            if measured < predicted or (bounded and measured > predicted + tolerated):
                yield Bug(record_hash=row.record.case_hash, model=row.model, term=term, measured_bytes=measured, predicted_bytes=predicted)


def fit(rows: Sequence[Row], *, date: str) -> Corrections:
    """The corrections that the rows determine.

    Args:
        rows: records with predictions for their own versions and card.
        date: of the fit, ISO 8601.

    Returns:
        For each group and each of its parents the terms with at least five rows of two models; other terms stay as they are modelled.
    """
    used = usable(rows)
    digest = hashlib.sha256("".join(sorted(row.record.model_dump_json() for row in used)).encode()).hexdigest()[:12]
    models = sorted({row.model for row in used})
    return Corrections(
        version=f"{date}-{digest}",
        date=date,
        evidence=f"{len(used)} measurements of {len(models)} models ({', '.join(models[:6])}{', …' if len(models) > 6 else ''})",
        groups=factors_of(tuple(observations(rows))),
        residuals=_residuals(left_out(rows, lambda row: row.model)),
    )


def factors_of(seen: Sequence[Observation]) -> Mapping[Group, Mapping[Term, Correction]]:
    """Of each group and each of its parents the terms that are determined."""
    groups: dict[Group, dict[Term, Correction]] = {}
    for group in dict.fromkeys(parent for one in seen for parent in one.group.parents):
        inside = [one for one in seen if group in one.group.parents]
        terms = {term: found for term in Term if (found := _factor(term, [o for o in inside if o.term is term])) is not None}
        if terms:
            groups[group] = terms
    return groups


def _factor(term: Term, rows: Sequence[Observation]) -> Correction | None:
    models = {row.model for row in rows}
    if len(rows) < MIN_MEASUREMENTS or len(models) < MIN_MODELS:
        return None
    # models count alike, however many rows each has
    weight = {model: 1 / sum(row.model == model for row in rows) for model in models}
    per_row = len(models) / len(rows)
    factor = weighted_median([*((row.ratio, weight[row.model]) for row in rows), (1.0, per_row)])
    return Correction(
        term=term,
        factor=factor,
        num_measurements=len(rows),
        num_models=len(models),
        worst_error=max(abs(row.ratio / factor - 1) if factor else math.inf for row in rows),
        smallest_bytes=min(row.modelled_bytes for row in rows),
        largest_bytes=max(row.modelled_bytes for row in rows),
    )


def weighted_median(values: Sequence[tuple[float, float]]) -> float:
    """The value at which half the weight lies below.

    Args:
        values: each with its weight.
    """
    half = sum(weight for _, weight in values) / 2
    reached = 0.0
    for value, weight in sorted(values):
        reached += weight
        if reached >= half:
            return value
    raise ValueError("no values")


def left_out(rows: Sequence[Row], key: Callable[[Row], object]) -> tuple[Error, ...]:
    """Each complete row against a fit that has seen none of its kind: leave one model, or one length, out.

    Args:
        rows: all of them.
        key: what is left out together.
    """
    kinds: dict[object, list[Row]] = {}
    for row in usable(rows):
        kinds.setdefault(key(row), []).append(row)
    seen = {kind: tuple(observations(own)) for kind, own in kinds.items()}
    found: list[Error] = []
    for kind, own in kinds.items():
        others = tuple(one for other, terms in seen.items() if other != kind for one in terms)
        found += errors(own, Corrections(version="", date="", evidence="", groups=factors_of(others), residuals={}))
    return tuple(found)


def errors(rows: Iterable[Row], corrections: Corrections | None) -> Iterator[Error]:
    """Complete rows against predictions, corrected where corrections are given."""
    for row in usable(rows):
        figures = row.record.figures
        if not row.is_complete or figures is None or figures.peak_allocated_bytes is None:
            continue
        estimate = row.prediction.estimate
        if corrections is not None:
            estimate, _ = corrected(estimate, row.prediction.recipe, corrections)
        # a squeezed allocator holds less than the prediction for a card with room
        device = None if figures.num_allocation_retries else figures.device_bytes
        yield Error(
            row=row,
            allocated=residual(figures.peak_allocated_bytes, estimate.peak.allocated_bytes),
            device=residual(device, estimate.device_bytes) if device else None,
        )


def _residuals(found: Iterable[Error]) -> Mapping[str, Mapping[str, tuple[float, ...]]]:
    classes: dict[str, dict[str, list[float]]] = {}
    for error in found:
        name = error.row.prediction.residual_class
        if name is None:
            continue
        kinds = classes.setdefault(name, {"allocated": [], "device": []})
        kinds["allocated"].append(error.allocated)
        if error.device is not None:
            kinds["device"].append(error.device)
    return {name: {kind: tuple(values) for kind, values in kinds.items()} for name, kinds in classes.items()}


def coverage(found: Sequence[Error], nominal: float) -> float | None:
    """Share of rows inside an interval made from the residuals of all other models; None where there are too few for any."""
    inside = total = 0
    for error in found:
        others = [other.allocated for other in found if other.row.model != error.row.model]
        radius = conformal_radius(others, nominal)
        if radius is not None:
            total += 1
            inside += abs(error.allocated) <= radius
    return inside / total if total else None


def contradicted(rows: Iterable[Row], corrections: Corrections | None) -> Iterator[Row]:
    """Runs that went out of memory although the prediction lies within the card: censored rows, which no factor can use."""
    for row in usable(rows):
        environment = row.record.environment
        if row.record.outcome is not Outcome.OOM or environment is None or environment.total_bytes is None:
            continue
        estimate = row.prediction.estimate
        if corrections is not None:
            estimate, _ = corrected(estimate, row.prediction.recipe, corrections)
        if estimate.device_bytes <= min(environment.total_bytes, row.record.case.cap_bytes or environment.total_bytes):
            yield row
