"""How wrong an estimate may be: intervals from the residuals of published measurements that set no constant (split conformal)."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from estimator.estimate import Interval
from estimator.kernels import Kernel
from estimator.recipe import ObjectiveKind, Recipe

_RESIDUALS = Path(__file__).with_name("data") / "residuals.json"

COVERAGE = 0.9

# Without an interval, "fits" asks for this much above the estimate (a plain choice, not a fit); below it the verdict is "tight".
MARGIN_WITHOUT_INTERVAL = 0.10

# Below this many residuals no finite interval covers 90 %: ceil(0.9 · (n + 1)) > n.
MIN_RESIDUALS = 9

# From here on cards have bfloat16 and the flash kernels.
_NEWER_KERNELS = (8, 0)


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


def class_of(recipe: Recipe, kernels: Collection[Kernel]) -> str | None:
    """The class whose residuals speak for a recipe; None for inference, of which nothing was compared yet.

    Runs of one class share what decides which formulas make their peak: the method, the width of the weights, how logits become a loss, the
    kernels that ran, whether layers are checkpointed, whether batches carry padding, and whether the card has compute capability 8.0.

    Args:
        recipe: of the run.
        kernels: that its step runs.
    """
    training = recipe.training
    if training is None:
        return None
    return ", ".join(
        (
            _method(recipe),
            "16-bit load" if recipe.dtype.is_half else "32-bit load",
            f"{training.loss.value.replace('_', ' ')} loss",
            *([" and ".join(sorted(kernel.value for kernel in kernels))] if kernels else ["no kernels that stand apart"]),
            "checkpointing" if training.gradient_checkpointing else "no checkpointing",
            *(("padding",) if training.padded else ()),
            f"compute capability {'8.0 or more' if recipe.compute_capability >= _NEWER_KERNELS else 'below 8.0'}",
        )
    )


def _method(recipe: Recipe) -> str:
    if recipe.adapter is None:
        return "full"
    quantization = recipe.quantization
    kind = "LoRA" if quantization is None else "QLoRA" if quantization.kind.is_4bit else "int8 LoRA"
    return f"{kind} with DoRA" if recipe.adapter.use_dora else kind


def interval(
    *,
    recipe: Recipe,
    kernels: Collection[Kernel],
    allocated_bytes: int,
    device_bytes: int,
    coverage: float = COVERAGE,
    classes: Mapping[str, ResidualClass] | None = None,
) -> Interval | None:
    """Bounds around an estimate.

    Args:
        recipe: decides the class, together with
        kernels: that its step runs.
        allocated_bytes: the estimated peak [bytes].
        device_bytes: what nvidia-smi would show [bytes].
        coverage: of the interval.
        classes: residuals by class; those shipped with the estimator if None.

    Returns:
        The interval, or None when the class holds fewer than nine residuals of either kind.
    """
    found = radii(recipe, kernels, coverage=coverage, classes=classes)
    if found is None:
        return None
    known, allocated, device = found
    low, high = _around(allocated_bytes, allocated)
    device_low, device_high = _around(device_bytes, device)
    return Interval(
        coverage=coverage,
        allocated_low_bytes=low,
        allocated_high_bytes=high,
        device_low_bytes=max(low, device_low),
        device_high_bytes=max(high, device_high),
        basis=f"{len(known.allocated)} allocated and {len(known.device)} device residuals of the class '{known.name}': {known.evidence}",
    )


def radii(
    recipe: Recipe, kernels: Collection[Kernel], *, coverage: float = COVERAGE, classes: Mapping[str, ResidualClass] | None = None
) -> tuple[ResidualClass, float, float] | None:
    """The class of a run, and how far its allocated and its device bytes may be off.

    Returns:
        Class and radii of ln(measured / predicted); None when the class holds fewer than nine residuals of either kind, and for
        objectives beside next tokens and for several cards, of which nothing was compared yet.
    """
    if recipe.training is None or recipe.training.objective.kind is not ObjectiveKind.SFT or recipe.parallel.is_spread:
        return None
    known = (classes if classes is not None else shipped()).get(class_of(recipe, kernels) or "")
    if known is None:
        return None
    allocated = conformal_radius(known.allocated, coverage)
    device = conformal_radius(known.device, coverage)
    return None if allocated is None or device is None else (known, allocated, device)


def required_bytes(device_bytes: int, device_high_bytes: int | None) -> int:
    """What must be usable for a verdict of `fits`: the interval's upper end, or the estimate and a margin [bytes]."""
    return device_high_bytes if device_high_bytes is not None else round(device_bytes * (1 + MARGIN_WITHOUT_INTERVAL))


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
