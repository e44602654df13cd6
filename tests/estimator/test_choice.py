"""Which cards hold a run: every card of the catalogue, against its own single estimates."""

from dataclasses import replace

import pytest

from estimator.choice import Machine, choices, kernel_class
from estimator.device import context_bytes
from estimator.engine import estimate
from estimator.gpus import Gpu, all_gpus
from estimator.grid import ClosedForms, Evaluator
from estimator.planner import Goal, PlanObjective, divisors
from estimator.recipe import Recipe
from estimator.units import MIB
from tests.estimator.recipes import model, training
from tests.estimator.test_grid import alone, at

LLAMA = "meta-llama/Llama-3.1-8B"


def on(gpu: Gpu, recipe: Recipe) -> Recipe:
    return replace(recipe, compute_capability=gpu.compute_capability, num_multiprocessors=gpu.num_sms)


def machines() -> list[Machine]:
    return [Machine(gpu=gpu, num_gpus=1, usable_bytes=gpu.capacity_bytes - 256 * MIB) for gpu in all_gpus()]


def goal(objective: PlanObjective, total: int | None) -> Goal:
    return Goal(
        objective=objective,
        micro_batch_size=1,
        gradient_accumulation_steps=2,
        sequence_length=1024,
        global_batch_size=total,
        batch_limit=4096,
        length_limit=131_072,
    )


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_cards_of_one_class_take_the_same_but_for_their_context(method: str) -> None:
    classes: dict[tuple[bool, int], int] = {}
    for gpu in all_gpus():
        found = estimate(model(LLAMA), on(gpu, training(2, 1024, method=method)))
        beside = found.quick_device_bytes - context_bytes(gpu.num_sms)
        assert classes.setdefault(kernel_class(gpu), beside) == beside
    assert len(classes) == 3


@pytest.mark.parametrize("total", [16, 24])
def test_the_batch_of_every_card_is_the_largest_divisor_that_its_own_estimates_let_fit(total: int) -> None:
    recipe = training()

    def answered(machine: Machine) -> tuple[Evaluator, Goal]:
        return ClosedForms(inventory=model(LLAMA), recipe=on(machine.gpu, recipe)), goal(PlanObjective.LARGEST_MICRO_BATCH, total)

    found = list(choices(machines(), answered))
    assert {choice.machine.gpu.id for choice in found} == {gpu.id for gpu in all_gpus()}
    for choice in found:
        fitting = [
            size
            for size in divisors(total)
            if alone(LLAMA, at(on(choice.machine.gpu, recipe), size, 1024, total // size))[2] <= choice.machine.usable_bytes
        ]
        assert choice.fits == bool(fitting)
        assert choice.micro_batch_size == max(fitting, default=1)
        assert choice.micro_batch_size * choice.gradient_accumulation_steps == total
        own = alone(LLAMA, at(on(choice.machine.gpu, recipe), choice.micro_batch_size, 1024, choice.gradient_accumulation_steps))
        assert (choice.device_bytes, choice.required_bytes) == own[1:]
        assert choice.verdict == ("fits" if fitting else "tight" if own[1] <= choice.machine.usable_bytes else "does_not_fit")


@pytest.mark.parametrize("objective", [PlanObjective.LARGEST_MICRO_BATCH, PlanObjective.LONGEST_SEQUENCE])
def test_one_size_more_than_chosen_does_not_fit(objective: PlanObjective) -> None:
    recipe = training()

    def answered(machine: Machine) -> tuple[Evaluator, Goal]:
        return ClosedForms(inventory=model(LLAMA), recipe=on(machine.gpu, recipe)), goal(objective, None)

    for choice in choices(machines(), answered):
        if not choice.fits:
            continue
        batch, length = choice.micro_batch_size, choice.sequence_length
        more = (batch + 1, length) if objective is PlanObjective.LARGEST_MICRO_BATCH else (batch, length + 64)
        for size, fits in (((batch, length), True), (more, False)):
            needed = alone(LLAMA, at(on(choice.machine.gpu, recipe), *size, 2))[2]
            assert (needed <= choice.machine.usable_bytes) == (fits or more[1] > 131_072)
