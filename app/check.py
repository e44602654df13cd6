"""`check`: whether a run fits a card, for scripts; if not, how much is missing and the smallest change that makes it fit."""

from collections.abc import Mapping
from typing import Any

from app.answer import REFUSALS, SCHEMA_VERSION, Json, device_bytes, is_modelled
from app.reading import read_estimate
from app.service import prepare, render
from app.shortfall import Shortage, missing_bytes, required_bytes, smallest_change
from estimator.errors import RequestError


def check(payload: Mapping[str, Any]) -> Json:
    """The answer to `check`.

    Raises:
        VramplanError: if the request or the model cannot be answered for.
    """
    case = prepare(read_estimate(payload))
    card, training = case.card, case.recipe.training
    if card is None:
        raise RequestError("hardware: a check needs a card; give gpu or capacity_gib", field="hardware")
    if training is None and case.recipe.inference is None:
        raise RequestError("training: a check needs training or inference", field="training")
    estimate = case.answerer.estimate(case.recipe)
    missing = missing_bytes(case.recipe, card, estimate)
    needed = device_bytes(estimate)
    if not is_modelled(estimate) and needed <= card.usable_bytes:
        raise RequestError(f"model: the step of {case.inventory.model_class} is not modelled; loading alone would fit", field="model")
    best: Json | None = None
    if missing > 0 and training is not None and is_modelled(estimate):
        global_batch = training.micro_batch_size * training.gradient_accumulation_steps
        best = smallest_change(Shortage(case=case, estimate=estimate, payload=dict(payload), global_batch=global_batch))
    warnings = render(case, estimate)["warnings"]
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": "fits" if missing <= 0 else "tight" if needed <= card.usable_bytes else "does_not_fit",
        "gpu": card.id,
        "phase": estimate.peak.phase.value,
        "device_bytes": needed,
        "required_bytes": required_bytes(case.recipe, card, estimate),
        "usable_bytes": card.usable_bytes,
        "missing_bytes": max(0, missing),
        "warnings": [warning["code"] for warning in warnings],
        "refused": [warning["message"] for warning in warnings if warning["code"] in REFUSALS],
        "change": None if best is None else {name: best[name] for name in ("set", "saves_bytes", "costs")},
    }
