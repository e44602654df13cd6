"""The best size for a card, against asking for every candidate alone."""

import random
from dataclasses import replace

import pytest

from estimator.device import context_bytes
from estimator.engine import estimate
from estimator.grid import ClosedForms, Evaluator, OneByOne
from estimator.planner import Goal, PlanObjective, search
from estimator.recipe import Recipe
from estimator.units import MIB
from tests.estimator.recipes import model
from tests.estimator.test_grid import RECIPES, alone, at

JOBS = 520
FEW = 24


def goals(number: int, seed: int) -> list[tuple[str, Goal, int]]:
    """A recipe, what to find, and how much of a card may be used."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        objective = draw.choice(list(PlanObjective))
        total = draw.choice((None, None, 1, 6, 8, 12, 16, 36, 64))
        gpus = draw.choice([n for n in (1, 1, 2, 4) if total is None or total % n == 0])
        goal = Goal(
            objective=objective,
            micro_batch_size=1,
            gradient_accumulation_steps=draw.choice((1, 1, 4)),
            sequence_length=draw.choice((64, 256, 1000, 1024, 2048, 5000)),
            global_batch_size=total,
            num_gpus=gpus,
            batch_limit=40,
            length_limit=draw.choice((40, 1000, 8192)),
        )
        found.append((draw.choice(list(RECIPES)), goal, draw.randrange(4000, 90_000) * MIB))
    return found


def everything(goal: Goal) -> list[tuple[int, int, int]]:
    """Every candidate, written out: micro-batch, length, steps."""
    if goal.objective is PlanObjective.LONGEST_SEQUENCE:
        steps = goal.gradient_accumulation_steps if goal.global_batch_size is None else goal.global_batch_size // goal.num_gpus
        step = min(64, goal.length_limit)
        return [(1, length, steps) for length in range(step, goal.length_limit + 1, step)]
    if goal.global_batch_size is None:
        return [(batch, goal.sequence_length, goal.gradient_accumulation_steps) for batch in range(1, goal.batch_limit + 1)]
    own = goal.global_batch_size // goal.num_gpus
    return [(batch, goal.sequence_length, own // batch) for batch in range(1, min(own, goal.batch_limit) + 1) if own % batch == 0]


@pytest.mark.parametrize(("number", "quick"), [(JOBS, True), (FEW, False)])
def test_what_is_found_is_the_best_of_all_candidates(number: int, quick: bool) -> None:
    with_plan = 0
    for name, goal, usable in goals(number, seed=5):
        bundled, recipe = RECIPES[name]
        context = context_bytes(recipe.num_multiprocessors)
        found = search(_evaluator(bundled, recipe, context, quick), goal, usable, context)
        candidates = everything(goal)
        needs = {point: alone(bundled, at(recipe, *point)) for point in candidates}
        fitting = [point for point in candidates if needs[point][2] <= usable]
        if not fitting:
            assert found is None, (name, goal)
            continue
        with_plan += 1
        assert found is not None, (name, goal)
        point = int(found.batch[0]), int(found.length[0]), int(found.steps[0])
        if goal.objective is PlanObjective.MOST_MARGIN:
            assert needs[point][1] == min(needs[other][1] for other in fitting)
        else:
            assert point == fitting[-1]
        if goal.global_batch_size is not None:
            assert point[0] * point[2] * goal.num_gpus == goal.global_batch_size
    assert number // 4 < with_plan < number


def _evaluator(name: str, recipe: Recipe, context: int, quick: bool) -> Evaluator:
    if quick:
        return ClosedForms(inventory=model(name), recipe=recipe)
    return OneByOne(inventory=model(name), recipe=recipe, estimate=lambda r: estimate(model(name), r), context_bytes=context)


def test_the_whole_batch_at_once_is_found_where_smaller_ones_do_not_fit() -> None:
    """Without accumulation no gradients wait during the forward pass: a divisor below the whole can take more."""
    name, recipe = RECIPES["full"]
    context = context_bytes(recipe.num_multiprocessors)
    whole, half = (alone(name, at(recipe, batch, 64, 2 // batch))[2] for batch in (2, 1))
    assert whole < half
    goal = Goal(
        objective=PlanObjective.LARGEST_MICRO_BATCH,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        sequence_length=64,
        global_batch_size=2,
        batch_limit=64,
        length_limit=64,
    )
    evaluator = ClosedForms(inventory=model(name), recipe=recipe)
    found = search(evaluator, goal, whole, context)
    assert found is not None
    assert found.batch.tolist() == [2]
    margin = search(evaluator, replace(goal, objective=PlanObjective.MOST_MARGIN), whole, context)
    assert margin is not None
    assert margin.batch.tolist() == [2]
