"""What a posted measurement has to satisfy before it counts, and how much of what counts one contributor may bring.

A record comes from a stranger. What contradicts physics or itself is set aside with a reason, never corrected and never thrown away.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from calibration.comparison import Comparison
from calibration.fit import Row, bugs
from calibration.record import Figures, Outcome, Record
from estimator.gpus import all_gpus
from estimator.units import GIB

FAR = 2.0
"""A peak that is this many times above or below its prediction is set aside: either is wrong, and a person has to look.

The errors of published rows stay below 13 %.
"""
# What CUDA reports as total differs from the catalogue by the driver's share, and between boards of one name.
_MORE_THAN_ANY_CARD = 1.02
# Of the models that others have shown, as many may rest on one contributor alone: a quarter of all, which no median follows.
UNTRUSTED_SHARE = 1 / 3


def reasons(record: Record, row: Row | None) -> tuple[str, ...]:
    """Why a record does not count; empty if it does.

    Args:
        record: as posted.
        row: the record with its prediction; None where there is none.
    """
    return tuple(_reasons(record, row))


def _reasons(record: Record, row: Row | None) -> Iterator[str]:
    figures, environment = record.figures, record.environment
    if not record.is_measurement:
        yield "not measured on a card that nobody else was using"
        return
    if figures is None or environment is None or environment.total_bytes is None or environment.gpu is None:
        yield "without figures, or without the card's name and total"
        return
    largest = max(gpu.capacity_bytes for gpu in all_gpus())
    if not GIB <= environment.total_bytes <= _MORE_THAN_ANY_CARD * largest:
        yield f"a card of {environment.total_bytes} bytes does not exist"
    yield from _contradictions(figures, environment.total_bytes)
    if row is None:
        yield "cannot be predicted, so nothing can be set beside it"
        return
    for bug in bugs([row]):
        yield f"{bug.term} is exact: {bug.predicted_bytes} bytes, and {bug.measured_bytes} were measured"
    if record.outcome is Outcome.OK and figures.peak_allocated_bytes is not None:
        ratio = figures.peak_allocated_bytes / row.prediction.estimate.peak.allocated_bytes
        if not 1 / FAR <= ratio <= FAR:
            yield f"the peak is {ratio:.2f} times its prediction"


def _contradictions(figures: Figures, total_bytes: int) -> Iterator[str]:
    """Figures in ascending order that are not: what is smaller has to be smaller."""
    ordered = (
        ("loaded", figures.loaded_bytes, "steady state", figures.steady_state_bytes),
        ("steady state", figures.steady_state_bytes, "allocated peak", figures.peak_allocated_bytes),
        ("allocated peak", figures.peak_allocated_bytes, "reserved peak", figures.peak_reserved_bytes),
        ("allocated peak", figures.peak_allocated_bytes, "allocated peak of the run", figures.run_allocated_bytes),
        ("reserved peak", figures.peak_reserved_bytes, "card", total_bytes),
        ("context", figures.context_bytes, "card", total_bytes),
        *((f"peak of {name}", peak.allocated_bytes, "its reserved peak", peak.reserved_bytes) for name, peak in figures.phases.items()),
        *((f"peak of {name}", peak.reserved_bytes, "card", total_bytes) for name, peak in figures.phases.items()),
    )
    for small_name, small, large_name, large in ordered:
        if small is not None and large is not None and small > large:
            yield f"{small_name} ({small}) above {large_name} ({large})"
    if figures.peak_allocated_bytes == 0 or figures.loaded_bytes == 0:
        yield "a run that takes nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A row and whose it is."""

    row: Row
    contributor: str
    is_trusted: bool
    """Whether the operator of the service answers for it."""


def within_influence(contributions: Sequence[Contribution]) -> tuple[Row, ...]:
    """The rows that a fit may use: of untrusted contributors, models up to a third of those that trusted ones show; the earliest first.

    In a fit models count alike. However many keys a liar has, a quarter of the weight is then the most that untrusted rows can have, and a
    weighted median stays among the honest rows.
    """
    trusted = [one for one in contributions if one.is_trusted]
    models = {one.row.model for one in trusted}
    allowed = int(len(models) * UNTRUSTED_SHARE)
    used: list[Row] = [one.row for one in trusted]
    others: set[str] = set()
    for one in contributions:
        if one.is_trusted or one.row.model in models:  # a model that trusted rows show needs no stranger's
            continue
        if one.row.model in others or len(others) < allowed:
            others.add(one.row.model)
            used.append(one.row)
    return tuple(used)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a fit may be put in force."""

    is_accepted: bool
    reason: str


MAX_FACTOR = 5.0
_WORSE = 1.02


def judge(new: Comparison, *, in_force: Iterable[float] | None = None) -> Verdict:
    """Whether corrections may be put in force: they have to predict models they have not seen better than what is there now.

    Args:
        new: the rows with the corrections they determine.
        in_force: absolute errors of the allocated peak of the same rows under the corrections in force; as modelled if None.
    """
    groups = new.corrections.groups
    if not groups:
        return Verdict(is_accepted=False, reason=new.why_nothing)
    for group, terms in groups.items():
        for term, correction in terms.items():
            if not 1 / MAX_FACTOR <= correction.factor <= MAX_FACTOR:
                return Verdict(is_accepted=False, reason=f"{term.value} of {group.name} would be multiplied by {correction.factor:.3g}")
    before = sorted(in_force) if in_force is not None else sorted(abs(error.allocated) for error in new.as_modelled)
    after = sorted(abs(error.allocated) for error in new.without_model)
    if not after or not before:
        return Verdict(is_accepted=False, reason="no model is left to try the corrections on")
    for name, share in (("median", 0.5), ("ninth decile", 0.9)):
        old, found = _quantile(before, share), _quantile(after, share)
        if found > _WORSE * old + 1e-4:
            return Verdict(is_accepted=False, reason=f"the {name} error on models not seen would rise from {old:.2%} to {found:.2%}")
    return Verdict(
        is_accepted=True, reason=f"median error on models not seen {_quantile(after, 0.5):.2%}, before {_quantile(before, 0.5):.2%}"
    )


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]
