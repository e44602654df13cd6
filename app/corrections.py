"""Fitted corrections in use: those of one command, else those of the setting, else those in force in the service that answers, else none.

`VRAMPLAN_CORRECTIONS` names a file of `vramplan calibrate fit`. Exact terms are never touched; estimates of lists of cards and of sweeps,
which are made many at a time, stay as they are modelled. An answer says what was applied.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from app.answer import Json, is_modelled
from estimator.correction import ResidualClass
from estimator.errors import RequestError, SourceUnavailableError
from estimator.estimate import Estimate, Notice
from estimator.phases import Basis
from estimator.recipe import ObjectiveKind, Recipe
from estimator.units import gib

# Imported where there are corrections, which mostly there are none.
if TYPE_CHECKING:
    from estimator.fitted import Corrections, Term

VARIABLE = "VRAMPLAN_CORRECTIONS"
_MAX_FILE_BYTES = 4 * 2**20

_OF_A_COMMAND: ContextVar["Corrections | None"] = ContextVar("corrections of a command", default=None)
_OF_A_SERVICE: ContextVar["Corrections | None"] = ContextVar("corrections in force in a service", default=None)
_IN_A_SERVICE: ContextVar[bool] = ContextVar("whether a service answers", default=False)
_LOGGED: dict[str, str] = {}
"""What was last logged of a file that cannot be read, by its path."""


def current() -> "Corrections | None":
    """The corrections to apply: a command's own, else those of the setting, else those of the service that answers.

    Raises:
        RequestError: if the setting's file cannot be read.
        SourceUnavailableError: the same in a service, whose callers can do nothing about it, and are not told where the file is.
    """
    own = _OF_A_COMMAND.get()
    if own is not None:
        return own
    named = os.environ.get(VARIABLE)
    if not named:
        return _OF_A_SERVICE.get()
    try:
        found = read(Path(named))
    except RequestError as error:
        if not _IN_A_SERVICE.get():
            raise
        if _LOGGED.get(named) != error.message:  # once, not for every request, until it can be read or fails otherwise
            from app.logs import LOGGER

            _LOGGED[named] = error.message
            LOGGER.error("%s: %s", VARIABLE, error.message)
        raise SourceUnavailableError("the corrections that this service answers by cannot be read; try again later") from None
    _LOGGED.pop(named, None)
    return found


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Applies the corrections of a file to what is answered inside.

    Raises:
        RequestError: if it cannot be read.
    """
    token = _OF_A_COMMAND.set(read(path))
    try:
        yield
    finally:
        _OF_A_COMMAND.reset(token)


@contextmanager
def in_force(corrections: "Corrections | None") -> Iterator[None]:
    """Applies the corrections of a service to what is answered inside: one request is answered by the same ones throughout."""
    token, served = _OF_A_SERVICE.set(corrections), _IN_A_SERVICE.set(True)
    try:
        yield
    finally:
        _OF_A_SERVICE.reset(token)
        _IN_A_SERVICE.reset(served)


def read(path: Path) -> "Corrections":
    """The corrections of a file; a file that has not changed is read once.

    Raises:
        RequestError: if it cannot be read, or is none of `vramplan calibrate fit`.
    """
    try:
        found = path.stat()
        return _read(path, found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise RequestError(f"corrections: {str(path)!r} cannot be read: {error.strerror}", field="corrections") from None


@lru_cache(maxsize=4)
def _read(path: Path, _changed: int, size: int) -> "Corrections":
    from estimator.fitted import parsed

    if size > _MAX_FILE_BYTES:
        raise RequestError(f"corrections: {str(path)!r} has more than {_MAX_FILE_BYTES:,} bytes", field="corrections")
    return parsed(path.read_text(encoding="utf-8", errors="replace"))


def applied(estimate: Estimate, recipe: Recipe, corrections: "Corrections | None") -> Estimate:
    """The estimate with its correctable terms scaled, and a notice where it lies outside what was measured.

    Several cards, objectives beside next tokens, and steps that are not modelled stay as they are: nothing of them was measured.
    """
    if corrections is None or _why_not(estimate, recipe) is not None:
        return estimate
    from estimator.fitted import corrected

    found, outside = corrected(estimate, recipe, corrections)
    if not outside:
        return found
    told = "; ".join(_range(term, recipe, corrections) for term in outside)
    notice = Notice(
        code="outside_measured_range",
        message=f"this run lies outside the range on which the corrections {corrections.version} were measured, so that they may not hold: "
        f"{told}.",
    )
    return replace(found, notices=(*found.notices, notice))


def _range(term: "Term", recipe: Recipe, corrections: "Corrections") -> str:
    from estimator.fitted import group_of

    seen = corrections.find(group_of(recipe), term)
    assert seen is not None  # it was applied
    return f"{term.value.replace('_', ' ')} was seen on {gib(seen.smallest_bytes)} to {gib(seen.largest_bytes)}"


def _why_not(estimate: Estimate, recipe: Recipe) -> str | None:
    if not is_modelled(estimate):
        return "the step is not modelled"
    if recipe.parallel.is_spread:
        return "runs over several cards were not measured"
    if recipe.training is not None and recipe.training.objective.kind is not ObjectiveKind.SFT:
        return f"objective {recipe.training.objective.kind.value!r} was not measured"
    return None


def residual_classes(corrections: "Corrections") -> dict[str, ResidualClass]:
    """What intervals around corrected estimates are made of: errors on models that had no say in the fit that judged them."""
    evidence = f"{corrections.evidence}, {corrections.date}, each model left out of the fit that it judges"
    return {
        name: ResidualClass(name=name, allocated=kinds.get("allocated", ()), device=kinds.get("device", ()), evidence=evidence)
        for name, kinds in corrections.residuals.items()
    }


def described(estimate: Estimate, recipe: Recipe, corrections: "Corrections") -> Json:
    """What an answer says of the corrections behind it."""
    from estimator.fitted import group_of

    reason = _why_not(estimate, recipe)
    terms = () if reason is not None else tuple(_terms(estimate, recipe))
    group = group_of(recipe)
    rows = [(term, found) for term in terms if (found := corrections.find(group, term)) is not None]
    return {
        "version": corrections.version,
        "date": corrections.date,
        "evidence": corrections.evidence,
        "not_applied": reason or (None if rows else f"nothing was measured on {group.name}, nor anything that stands for it"),
        "terms": [
            {
                "term": term.value,
                "factor": found.factor,
                "group": next(parent.name for parent in group.parents if term in corrections.groups.get(parent, {})),
                "num_measurements": found.num_measurements,
                "num_models": found.num_models,
                "worst_error": found.worst_error,
                "seen_bytes": [found.smallest_bytes, found.largest_bytes],
            }
            for term, found in rows
        ],
    }


def _terms(estimate: Estimate, recipe: Recipe) -> Iterator["Term"]:
    """The terms that a run shows."""
    from estimator.fitted import Term

    for term in Term:
        if term is Term.SLACK and recipe.training is None:
            continue
        if term in (Term.FORWARD_TEMPORARIES, Term.BACKWARD_TEMPORARIES):
            phase = term.value.removesuffix("_temporaries")
            found = (item for one in estimate.phases if one.phase.value == phase for item in one.items)
            if not any(item.basis is Basis.FITTED and item.item.value == "temporary" for item in found):
                continue
        yield term
