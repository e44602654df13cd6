"""How wrong an estimate may be: intervals from the residuals of published measurements that set no constant (split conformal)."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from estimator.estimate import Interval
from estimator.gpus import Vendor
from estimator.kernels import Kernel
from estimator.recipe import ObjectiveKind, Recipe
from estimator.stack import Stack, Version

_RESIDUALS = Path(__file__).with_name("data") / "residuals.json"

COVERAGE = 0.9


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
    versions: Mapping[str, tuple[Version, Version]] = field(default_factory=dict)
    """Oldest and newest major and minor version measured, by library."""

    def other_versions(self, stack: Stack) -> str | None:
        """What of a stack lies outside the versions measured, for people; None where nothing does."""
        outside = []
        for library, (oldest, newest) in self.versions.items():
            asked: Version = getattr(stack, library)
            if not oldest <= asked[:2] <= newest:
                measured = _shown(oldest) if oldest == newest else f"{_shown(oldest)} to {_shown(newest)}"
                outside.append(f"{library} {measured}, not {_shown(asked[:2])}")
        return " and ".join(outside) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """What "fits" asks for above an estimate that has no interval."""

    share: float
    """Of the estimate."""
    coverage: float
    num_rows: int
    evidence: str

    @property
    def basis(self) -> str:
        """For people."""
        return (
            f"In {100 * self.coverage:.0f} % of the published runs, of whatever kind, nvidia-smi showed no more than that: {self.num_rows} "
            f"{self.evidence}"
        )


def _shown(version: Version) -> str:
    return ".".join(map(str, version))


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
    """The class whose residuals speak for a recipe; None for inference, of whose device memory nothing was compared yet.

    Runs of one class share what decides which formulas make their peak: the method, the width of the weights, how logits become a loss, the
    kernels that ran, whether layers are checkpointed, whether batches carry padding, whose card it is, and whether NVIDIA's has compute
    capability 8.0.

    Library versions are not part of it. They do change the formulas (bytes per logit, keys and values repeated or not), minor by minor,
    and every such change is a rule of `stack` with its source; a residual is what is left after the rules of its own version. With versions
    in the name, a class would hold the rows of one minor at most, and no recipe of today would ever have an interval. That residuals carry
    over to a version never measured is a conjecture, though, which no quantile covers: so a class knows its versions, and an interval of
    another one says so in its basis, and a warning beside it (`other_stack`).

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
            _card(recipe),
        )
    )


def _card(recipe: Recipe) -> str:
    """No class reaches across vendors: allocator, libraries and kernels are others."""
    if recipe.vendor is not Vendor.NVIDIA:
        return f"cards of {recipe.vendor.value.upper()}"
    return f"compute capability {'8.0 or more' if recipe.compute_capability >= _NEWER_KERNELS else 'below 8.0'}"


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
    other = known.other_versions(recipe.stack)
    caveat = f"; measured with {other}: {carried()}" if other is not None else ""
    low, high = _around(allocated_bytes, allocated)
    device_low, device_high = _around(device_bytes, device)
    return Interval(
        coverage=coverage,
        allocated_low_bytes=low,
        allocated_high_bytes=high,
        device_low_bytes=max(low, device_low),
        device_high_bytes=max(high, device_high),
        basis=f"{len(known.allocated)} allocated and {len(known.device)} device residuals of the class '{known.name}', and no narrower "
        f"than all classes together: {known.evidence}{caveat}",
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
    of = classes if classes is not None else shipped()
    known = of.get(class_of(recipe, kernels) or "")
    if known is None:
        return None
    allocated = _radius(known.allocated, (other.allocated for other in of.values()), coverage)
    device = _radius(known.device, (other.device for other in of.values()), coverage)
    return None if allocated is None or device is None else (known, allocated, device)


def _radius(own: Sequence[float], all_classes: Iterable[Sequence[float]], coverage: float) -> float | None:
    """The class's radius, or that of all classes together where it is larger.

    Rows of one model and one script lie closer to each other than to a stranger's run: a class is never trusted beyond what all rows show.
    """
    radius = conformal_radius(own, coverage)
    pooled = conformal_radius([residual for residuals in all_classes for residual in residuals], coverage)
    return None if radius is None or pooled is None else max(radius, pooled)


def required_bytes(device_bytes: int, device_high_bytes: int | None) -> int:
    """What must be usable for a verdict of `fits`: the interval's upper end, or the estimate and a margin [bytes]."""
    return device_high_bytes if device_high_bytes is not None else round(device_bytes * (1 + margin_without_interval().share))


def _around(num_bytes: int, radius: float) -> tuple[int, int]:
    return math.floor(num_bytes * math.exp(-radius)), math.ceil(num_bytes * math.exp(radius))


def other_stack(recipe: Recipe, kernels: Collection[Kernel]) -> str | None:
    """What of a recipe's versions lies outside those that its class was measured with, for people; None without such a class."""
    known = shipped().get(class_of(recipe, kernels) or "")
    return known.other_versions(recipe.stack) if known is not None else None


@cache
def shipped() -> Mapping[str, ResidualClass]:
    """Residuals that `python -m calibration.accuracy --write-intervals` wrote; empty before the first time."""
    if not _RESIDUALS.exists():
        return MappingProxyType({})
    return MappingProxyType(
        {
            name: ResidualClass(
                name=name,
                allocated=tuple(row["residual"] for row in entry["allocated"]),
                device=tuple(row["residual"] for row in entry["device"]),
                evidence=entry["evidence"],
                versions=MappingProxyType({library: (tuple(old), tuple(new)) for library, (old, new) in entry["versions"].items()}),
            )
            for name, entry in _written()["classes"].items()
        }
    )


@cache
def carried() -> str:
    """How intervals did on versions of transformers that had no say in them, for people."""
    figures = (f"{inside} of {judged} {figure}" for figure, (inside, judged) in _written()["carried"].items())
    return f"intervals made without a version of transformers held {' and '.join(figures)} figures of it"


@cache
def margin_without_interval() -> Margin:
    """The one-sided quantile over every published device figure that set no constant, written by the same command."""
    return Margin(**_written()["margin"])


@cache
def _written() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(_RESIDUALS.read_text(encoding="utf-8"))
    return data
