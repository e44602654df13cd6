"""How the sizes of a case are answered for, many at a time."""

from app.answer import is_modelled
from app.service import Case
from estimator.device import context_bytes
from estimator.errors import RequestError
from estimator.estimate import Engine, Estimate
from estimator.grid import STRATEGIES, ClosedForms, Evaluator, OneByOne
from estimator.recipe import Recipe


def evaluator_of(case: Case, recipe: Recipe, estimate: Estimate) -> Evaluator:
    """Arrays where closed forms answer, else one estimate after the other.

    Args:
        recipe: of the case, or one like it.
        estimate: of that recipe.

    Raises:
        RequestError: if its step is not modelled.
    """
    if not is_modelled(estimate):
        raise RequestError(
            f"model: the training step of {case.inventory.model_class} is not modelled, so nothing can be planned", field="model"
        )
    if estimate.engine is Engine.ANALYTIC and recipe.parallel.strategy in STRATEGIES:
        return ClosedForms(inventory=case.inventory, recipe=recipe)
    return OneByOne(
        inventory=case.inventory,
        recipe=recipe,
        estimate=case.answerer.estimate,
        context_bytes=context_bytes(recipe.num_multiprocessors),
    )
