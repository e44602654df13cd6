"""The estimator's word on a case of `calibrate`, for the versions and the card of a record."""

import re
from dataclasses import replace

from app.answer import is_modelled
from app.reading import read_estimate
from app.service import prepare
from calibration.case import Case
from calibration.prediction import Prediction
from calibration.record import Environment
from estimator.errors import RequestError
from estimator.recipe import Recipe
from estimator.sources import catalogue

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


def predict(case: Case, environment: Environment | None, *, engine: str = "auto") -> Prediction:
    """The prediction for one case, as it is modelled: corrections in use are what it is to be judged with.

    Args:
        case: what was run, or is to be.
        environment: where; None for the installed versions and no card in particular.
        engine: `auto`, `analytic` or `trace`.

    Raises:
        VramplanError: if the case cannot be answered for.
        RequestError: if its step is not modelled.
    """
    answered = prepare(read_estimate(payload_of(case, environment, engine=engine)))
    recipe = _on(environment, answered.recipe)
    estimate = answered.answerer.as_modelled(recipe)
    if not is_modelled(estimate):
        raise RequestError(f"model: the step of {answered.inventory.model_class} is not modelled", field="model")
    return Prediction(recipe=recipe, estimate=estimate)


def payload_of(case: Case, environment: Environment | None = None, *, engine: str = "auto") -> dict[str, object]:
    """The request that a case came from, for the versions of a record."""
    payload: dict[str, object] = {**case.request, "model": _model(case), "engine": engine}
    if environment is not None:
        versions = {name: getattr(environment, name) for name in _LIBRARIES}
        payload["stack"] = {name: version for name, version in versions.items() if version}
    return payload


def _model(case: Case) -> object:
    """The catalogue's name where the case has that very model, since its inventory is at hand."""
    entry = catalogue.find(case.model) if case.model is not None else None
    if entry is not None and dict(catalogue.load(entry.file).config) == case.config:
        return entry.id
    return {"config": case.config}


def _on(environment: Environment | None, recipe: Recipe) -> Recipe:
    """The recipe on the record's card, which need not be in the catalogue."""
    if environment is None or environment.compute_capability is None or environment.num_multiprocessors is None:
        return recipe
    major, minor = re.findall(r"\d+", environment.compute_capability)[:2]
    return replace(recipe, compute_capability=(int(major), int(minor)), num_multiprocessors=environment.num_multiprocessors)
