"""Published rows judged by what other rows taught: one model, one stack, one method or one source left out at a time.

A constant that rows set is set anew from the rest. Where none is, the estimate of a row does not depend on the others, and what is left to
judge is the interval: its radius comes from the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from calibration.accuracy import Comparison
from calibration.published import Run
from estimator.correction import COVERAGE, conformal_radius, residual


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """One group of rows against all others."""

    axis: str
    group: str
    num_rows: int
    worst: float
    """The error of the group's rows that is largest, as (predicted − measured) / measured."""
    radius: float | None
    """Of an interval made from the other groups' rows; None where they are too few."""
    num_inside: int | None
    """How many of the group's rows that interval holds."""


def axes_of(run: Run) -> Mapping[str, str]:
    """What a row shares with others, by axis."""
    stack = run.recipe.stack
    versions = ".".join(map(str, stack.transformers[:2])), ".".join(map(str, stack.bitsandbytes[:2]))
    return {
        "model": run.model,
        "stack": "transformers {}, bitsandbytes {}".format(*versions),
        "method": run.method,
        "source": run.row.source,
    }


def left_out(compared: Sequence[Comparison], figure: str) -> Iterator[LeftOut]:
    """Every group of every axis, for rows that may judge the figure.

    Args:
        compared: all rows.
        figure: `resting`, `allocated` or `device`.
    """
    judging = [found for found in compared if found.judges(figure)]
    for axis in ("model", "stack", "method", "source"):
        for group in sorted({axes_of(found.run)[axis] for found in judging}):
            members = [found.figures[figure] for found in judging if axes_of(found.run)[axis] == group]
            others = [found.figures[figure] for found in judging if axes_of(found.run)[axis] != group]
            radius = conformal_radius([residual(pair.measured, pair.predicted) for pair in others], COVERAGE)
            inside = None if radius is None else sum(abs(residual(pair.measured, pair.predicted)) <= radius for pair in members)
            yield LeftOut(
                axis=axis,
                group=group,
                num_rows=len(members),
                worst=max((pair.error for pair in members), key=abs),
                radius=radius,
                num_inside=inside,
            )


def told(found: LeftOut) -> str:
    """A line of the table."""
    interval = (
        "too few others for an interval"
        if found.radius is None
        else f"±{found.radius:.2%} from the others holds {found.num_inside} of {found.num_rows}"
    )
    return f"{found.axis:<8} {found.group:<40} {found.num_rows:4} rows   worst {found.worst:+8.2%}   {interval}"
