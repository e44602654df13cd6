"""How the sizes of a case are answered for, many at a time."""

from app.answer import is_modelled
from app.service import Case
from estimator.device import context_bytes
from estimator.errors import RequestError
from estimator.grid import STRATEGIES, ClosedForms, Evaluator, OneByOne
from estimator.recipe import Recipe


def evaluator_of(case: Case, recipe: Recipe) -> Evaluator:
    """Arrays where closed forms answer, else one estimate after the other.

    Args:
        recipe: of the case, or one like it.

    Raises:
        RequestError: if its step is not modelled, or the libraries would refuse it.
    """
    if recipe.parallel.strategy in STRATEGIES and case.answerer.has_closed_forms(recipe):
        return ClosedForms(inventory=case.inventory, recipe=recipe)
    if not is_modelled(case.answerer.estimate(recipe)):
        raise RequestError(
            f"model: the training step of {case.inventory.model_class} is not modelled, so nothing can be planned", field="model"
        )
    return OneByOne(
        inventory=case.inventory,
        recipe=recipe,
        estimate=case.answerer.estimate,
        context_bytes=context_bytes(recipe.num_multiprocessors),
    )
