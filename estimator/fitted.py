"""Fitted corrections: factors for what is not exact, each with the evidence it rests on. Exact terms are never touched.

A correction belongs to a group of measurements: a GPU architecture and a generation of libraries. Where a group has too few, its parents
speak: the same architecture under any libraries, then all measurements.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from estimator.errors import RequestError
from estimator.estimate import Deferred, Estimate, Holding, LineItem, PhaseEstimate
from estimator.phases import Basis, Item, Phase
from estimator.recipe import Recipe
from estimator.units import MIB

FORMAT = 1
_SEGMENT_BYTES = 2 * MIB


class Term(StrEnum):
    """What may be fitted."""

    FORWARD_TEMPORARIES = "forward_temporaries"  # of the layers, at the peak of the forward pass
    BACKWARD_TEMPORARIES = "backward_temporaries"  # of the layers and their recomputation, at the peak of the backward pass
    WORKSPACE = "workspace"  # cuBLAS's buffers
    SLACK = "slack"  # reserved beyond what is allocated
    CONTEXT = "context"  # CUDA context and libraries


_PHASE_OF = {Phase.FORWARD: Term.FORWARD_TEMPORARIES, Phase.BACKWARD: Term.BACKWARD_TEMPORARIES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Measurements that share what the terms depend on; None stands for any."""

    compute_capability: tuple[int, int] | None = None
    transformers: int | None = None
    """Major version."""

    @property
    def parents(self) -> tuple["Group", ...]:
        """This group and those that hold it, the narrowest first."""
        found = (self, replace(self, transformers=None), Group())
        return tuple(dict.fromkeys(found))

    @property
    def name(self) -> str:
        card = "any card" if self.compute_capability is None else "compute capability {}.{}".format(*self.compute_capability)
        libraries = "any transformers" if self.transformers is None else f"transformers {self.transformers}"
        return f"{card}, {libraries}"


def group_of(recipe: Recipe) -> Group:
    """The group that a run belongs to."""
    return Group(compute_capability=recipe.compute_capability, transformers=recipe.stack.transformers[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """One term's factor, with its evidence."""

    term: Term
    factor: float
    """Of the modelled bytes."""
    num_measurements: int
    num_models: int
    worst_error: float
    """Largest |measured / corrected − 1| of the term over its measurements."""
    smallest_bytes: int
    """The modelled bytes it was seen on, from [bytes]"""
    largest_bytes: int
    """to [bytes]."""

    def covers(self, modelled_bytes: int) -> bool:
        """Whether it was seen on as much, within a factor of two."""
        return self.smallest_bytes // 2 <= modelled_bytes <= 2 * self.largest_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrections:
    """What one calibration found."""

    version: str
    """Names this file: date and a hash of the records."""
    date: str
    evidence: str
    """What was measured, for people."""
    groups: Mapping[Group, Mapping[Term, Correction]]
    residuals: Mapping[str, Mapping[str, tuple[float, ...]]]
    """By class of runs: `allocated` and `device`, ln(measured / corrected prediction), each of a model that was left out of its fit."""

    def find(self, group: Group, term: Term) -> Correction | None:
        """The correction of a group, or of the nearest parent that has one."""
        for candidate in group.parents:
            if (found := self.groups.get(candidate, {}).get(term)) is not None:
                return found
        return None


def corrected(estimate: Estimate, recipe: Recipe, corrections: Corrections) -> tuple[Estimate, tuple[Term, ...]]:
    """The estimate with its correctable terms scaled.

    Args:
        estimate: of the run.
        recipe: that it is of.
        corrections: to apply.

    Returns:
        The corrected estimate, and the terms for which it lies outside the range that was measured.
    """
    if estimate.steady_state_bytes is None:
        return estimate, ()
    holding = estimate.holding.get()
    scale = _Scale(corrections=corrections, group=group_of(recipe), outside=[])
    phases = tuple(_phase(phase, scale) for phase in estimate.phases)
    before, after = estimate.peak.allocated_bytes, max(phase.allocated_bytes for phase in phases)
    slack = holding.reserved_bytes - before
    if recipe.training is not None:  # of generation slack is modelled in another way than where its factor was seen
        slack = scale.bytes(Term.SLACK, slack)
    reserved = -(-(after + slack) // _SEGMENT_BYTES) * _SEGMENT_BYTES
    context = scale.bytes(Term.CONTEXT, holding.device_bytes - holding.reserved_bytes - estimate.paged_bytes)
    workspace = max((bytes_of(phase, Item.WORKSPACE) for phase in estimate.phases), default=0)
    found = replace(
        estimate,
        phases=phases,
        steady_state_bytes=estimate.steady_state_bytes - workspace + scale.bytes(Term.WORKSPACE, workspace),
        holding=Deferred.of(
            Holding(
                reserved_bytes=reserved,
                device_bytes=reserved + context + estimate.paged_bytes,
                basis=Basis.FITTED,
                without_pressure_bytes=holding.without_pressure_bytes + reserved - holding.reserved_bytes,
            )
        ),
        quick_device_bytes=reserved + context + estimate.paged_bytes,
        least_device_bytes=after + context + estimate.paged_bytes,
    )
    return found, tuple(dict.fromkeys(scale.outside))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    corrections: Corrections
    group: Group
    outside: list[Term]

    def bytes(self, term: Term, modelled_bytes: int) -> int:
        found = self.corrections.find(self.group, term)
        if found is None or modelled_bytes <= 0:
            return modelled_bytes
        if not found.covers(modelled_bytes):
            self.outside.append(term)
        return round(found.factor * modelled_bytes)


def _phase(phase: PhaseEstimate, scale: _Scale) -> PhaseEstimate:
    return replace(phase, items=tuple(_item(item, phase, scale) for item in phase.items))


def _item(item: LineItem, phase: PhaseEstimate, scale: _Scale) -> LineItem:
    if not is_correctable(item, phase):
        return item
    term = Term.WORKSPACE if item.item is Item.WORKSPACE else _PHASE_OF[phase.phase]
    if scale.corrections.find(scale.group, term) is None:
        return item
    return LineItem(item.item, scale.bytes(term, item.num_bytes), Basis.FITTED)


def is_correctable(item: LineItem, phase: PhaseEstimate) -> bool:
    """Whether a term scales the item: workspaces, and the temporaries of layers. While logits are alive they are the loss's, and exact."""
    if item.basis is Basis.EXACT:
        return False
    if item.item is Item.WORKSPACE:
        return True
    return item.item is Item.TEMPORARY and phase.phase in _PHASE_OF and not bytes_of(phase, Item.LOGITS)


def bytes_of(phase: PhaseEstimate, wanted: Item) -> int:
    """What an item takes in a phase [bytes]."""
    return sum(item.num_bytes for item in phase.items if item.item is wanted)


def dumped(corrections: Corrections) -> str:
    """The file's text."""
    return json.dumps(
        {
            "format": FORMAT,
            "version": corrections.version,
            "date": corrections.date,
            "evidence": corrections.evidence,
            "groups": [
                {
                    "compute_capability": group.compute_capability,
                    "transformers": group.transformers,
                    "terms": {
                        term.value: {
                            "factor": found.factor,
                            "num_measurements": found.num_measurements,
                            "num_models": found.num_models,
                            "worst_error": found.worst_error,
                            "smallest_bytes": found.smallest_bytes,
                            "largest_bytes": found.largest_bytes,
                        }
                        for term, found in terms.items()
                    },
                }
                for group, terms in corrections.groups.items()
            ],
            "residuals": {name: {kind: list(values) for kind, values in kinds.items()} for name, kinds in corrections.residuals.items()},
        },
        indent=1,
    )


def parsed(text: str) -> Corrections:
    """The corrections in a file's text.

    Raises:
        RequestError: if it is no such file, or of another format.
    """
    try:
        data: dict[str, Any] = json.loads(text)
        if data["format"] != FORMAT:
            raise RequestError(f"corrections: format {data['format']!r} is not accepted; accepted: {FORMAT}", field="corrections")
        return Corrections(
            version=str(data["version"]),
            date=str(data["date"]),
            evidence=str(data["evidence"]),
            groups={
                _group(entry): {Term(name): _correction(name, found) for name, found in entry["terms"].items()} for entry in data["groups"]
            },
            residuals={
                name: {kind: tuple(float(value) for value in values) for kind, values in kinds.items()}
                for name, kinds in data["residuals"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"corrections: not a file of `vramplan calibrate fit`: {error!r}", field="corrections") from error


def _group(entry: Mapping[str, Any]) -> Group:
    capability = entry["compute_capability"]
    return Group(
        compute_capability=None if capability is None else (int(capability[0]), int(capability[1])), transformers=entry["transformers"]
    )


def _correction(name: str, found: Mapping[str, Any]) -> Correction:
    factor = float(found["factor"])
    if not 0 <= factor < math.inf:
        raise ValueError(f"{name}.factor: {factor} is neither zero nor positive and finite")
    return Correction(
        term=Term(name),
        factor=factor,
        num_measurements=int(found["num_measurements"]),
        num_models=int(found["num_models"]),
        worst_error=float(found["worst_error"]),
        smallest_bytes=int(found["smallest_bytes"]),
        largest_bytes=int(found["largest_bytes"]),
    )
