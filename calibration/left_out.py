"""Errors on rows that had no say: leave one model, one stack, one method, one source out, refit on the rest, judge the group."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from estimator.correction import COVERAGE, conformal_radius

Groups = Mapping[str, str]
"""Dimension (`model`, `transformers`, `bitsandbytes`, `method`, `source`) → the row's group of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleRow:
    """A row from which the idle share of cached segments can be had, and which it can predict [bytes]."""

    groups: Groups
    measured_peak: int
    measured_resting: int
    measured_device: int
    predicted_peak: int
    predicted_resting: int
    outside_allocator: int
    """Context and libraries."""

    @property
    def share(self) -> float:
        """Idle bytes as a share of what comes and goes within a step."""
        idle = self.measured_device - self.outside_allocator - self.measured_peak
        return idle / (self.measured_peak - self.measured_resting)

    def error(self, share: float) -> float:
        """Of the device figure that a share gives: (predicted − measured) / measured."""
        predicted = self.predicted_peak + share * (self.predicted_peak - self.predicted_resting) + self.outside_allocator
        return (predicted - self.measured_device) / self.measured_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """A constant set without one group, and how it does there."""

    dimension: str
    group: str
    constant: float | None
    """None when nothing is left to set it by."""
    errors: tuple[float, ...]
    """Of the group's rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """A residual, ln(measured / predicted), with its class."""

    groups: Groups
    residual_class: str
    residual: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Intervals made without one group, and how many of its rows lie inside."""

    dimension: str
    group: str
    inside: int
    outside: int
    without_interval: int
    """Rows whose class keeps too few residuals."""

    @property
    def share(self) -> float | None:
        judged = self.inside + self.outside
        return self.inside / judged if judged else None


Member = TypeVar("Member", IdleRow, Tagged)


def split(rows: Sequence[Member]) -> Iterator[tuple[str, str, list[Member], list[Member]]]:
    """Every group of every dimension: dimension, group, its rows, all others. Rows without a dimension stay among the others."""
    dimensions = dict.fromkeys(dimension for row in rows for dimension in row.groups)
    for dimension in dimensions:
        for group in sorted({row.groups[dimension] for row in rows if dimension in row.groups}):
            inside = [row for row in rows if row.groups.get(dimension) == group]
            yield dimension, group, inside, [row for row in rows if row.groups.get(dimension) != group]


def refits(rows: Sequence[IdleRow], fit: Callable[[Sequence[float]], float] = statistics.median) -> list[Refit]:
    """The idle share set on all rows but a group's, group by group."""
    found = []
    for dimension, group, inside, rest in split(rows):
        share = fit([row.share for row in rest]) if rest else None
        errors = tuple(row.error(share) for row in inside) if share is not None else ()
        found.append(Refit(dimension=dimension, group=group, constant=share, errors=errors))
    return found


def coverages(residuals: Sequence[Tagged], coverage: float = COVERAGE) -> list[Coverage]:
    """Coverage that intervals reach on a group when their radii come from the other rows of the same class."""
    found = []
    for dimension, group, inside, rest in split(residuals):
        radii = [conformal_radius([r.residual for r in rest if r.residual_class == one.residual_class], coverage) for one in inside]
        hits = [abs(one.residual) <= radius for one, radius in zip(inside, radii, strict=True) if radius is not None]
        found.append(
            Coverage(
                dimension=dimension, group=group, inside=sum(hits), outside=len(hits) - sum(hits), without_interval=len(inside) - len(hits)
            )
        )
    return found


def one_sided(residuals: Sequence[float], coverage: float = COVERAGE) -> float | None:
    """The bound below which the next residual lies with probability `coverage`: the ⌈coverage · (n + 1)⌉-th smallest, if there is one.

    Source: as `conformal_radius`, with the signed residual as its score.
    """
    rank = math.ceil(coverage * (len(residuals) + 1))
    return sorted(residuals)[rank - 1] if rank <= len(residuals) else None
