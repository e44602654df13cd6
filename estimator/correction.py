"""How wrong an estimate may be: intervals from the residuals of published measurements that set no constant (split conformal)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from estimator.estimate import Interval
from estimator.recipe import Recipe

_RESIDUALS = Path(__file__).with_name("data") / "residuals.json"

COVERAGE = 0.9

# Below this many residuals no finite interval covers 90 %: ceil(0.9 · (n + 1)) > n.
MIN_RESIDUALS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualClass:
    """Residuals of measurements of one kind, each ln(measured / predicted)."""

    name: str
    allocated: tuple[float, ...]
    device: tuple[float, ...]
    evidence: str
    """Where the measurements come from, for people."""


def residual(measured_bytes: int, predicted_bytes: int) -> float:
    """ln(measured / predicted): 0.01 is 1 % above the prediction."""
    return math.log(measured_bytes / predicted_bytes)


def conformal_radius(residuals: Sequence[float], coverage: float = COVERAGE) -> float | None:
    """The radius r such that |ln(measured / predicted)| of the next measurement is at most r with probability `coverage`.

    Args:
        residuals: ln(measured / predicted) of measurements exchangeable with the next one.
        coverage: between 0 and 1.

    Returns:
        The ⌈coverage · (n + 1)⌉-th smallest |residual|; None when there are too few for any finite radius.

    Source: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World (2005), inductive conformal predictors; Lei et al.,
    Distribution-Free Predictive Inference for Regression (2018), algorithm 2.
    """
    rank = math.ceil(coverage * (len(residuals) + 1))
    if rank > len(residuals):
        return None
    return sorted(map(abs, residuals))[rank - 1]


def class_of(recipe: Recipe) -> str | None:
    """The class whose residuals speak for a recipe; None for inference, of which nothing was compared yet.

    All training is one class: the published rows come from few models and one script, so that within a method they agree with each other
    far better than the next stranger's run would.
    """
    return None if recipe.training is None else "training"


def interval(
    *,
    recipe: Recipe,
    allocated_bytes: int,
    device_bytes: int,
    coverage: float = COVERAGE,
    classes: Mapping[str, ResidualClass] | None = None,
) -> Interval | None:
    """Bounds around an estimate.

    Args:
        recipe: decides the class.
        allocated_bytes: the estimated peak [bytes].
        device_bytes: what nvidia-smi would show [bytes].
        coverage: of the interval.
        classes: residuals by class; those shipped with the estimator if None.

    Returns:
        The interval, or None when the class holds fewer than nine residuals of either kind.
    """
    name = class_of(recipe)
    known = (classes if classes is not None else shipped()).get(name or "")
    if known is None:
        return None
    allocated = conformal_radius(known.allocated, coverage)
    device = conformal_radius(known.device, coverage)
    if allocated is None or device is None:
        return None
    low, high = _around(allocated_bytes, allocated)
    device_low, device_high = _around(device_bytes, device)
    return Interval(
        coverage=coverage,
        allocated_low_bytes=low,
        allocated_high_bytes=high,
        device_low_bytes=max(low, device_low),
        device_high_bytes=max(high, device_high),
        basis=f"{len(known.allocated)} allocated and {len(known.device)} device residuals of class {name}: {known.evidence}",
    )


def _around(num_bytes: int, radius: float) -> tuple[int, int]:
    return math.floor(num_bytes * math.exp(-radius)), math.ceil(num_bytes * math.exp(radius))


@cache
def shipped() -> Mapping[str, ResidualClass]:
    """Residuals that `python -m calibration.accuracy --write-intervals` wrote; empty before the first time."""
    if not _RESIDUALS.exists():
        return MappingProxyType({})
    data: dict[str, Any] = json.loads(_RESIDUALS.read_text(encoding="utf-8"))
    return MappingProxyType(
        {
            name: ResidualClass(
                name=name,
                allocated=tuple(row["residual"] for row in entry["allocated"]),
                device=tuple(row["residual"] for row in entry["device"]),
                evidence=entry["evidence"],
            )
            for name, entry in data["classes"].items()
        }
    )
