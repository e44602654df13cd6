"""Arrays of sizes, against the engine's answer for each of them alone."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from estimator.correction import interval, required_bytes
from estimator.device import context_bytes
from estimator.engine import estimate
from estimator.grid import LARGEST_BYTES, ClosedForms, OneByOne, Sizes, program_codes
from estimator.parallelism.options import Fsdp, Parallel, Strategy
from estimator.recipe import Attention, Loss, Recipe
from estimator.step import regime_of
from estimator.sweep import sweep
from tests.estimator.recipes import model, training

LLAMA, MISTRAL, GEMMA, SMALL = (
    "meta-llama/Llama-3.1-8B",
    "mistralai/Mistral-7B-v0.1",
    "google/gemma-2-9b",
    "HuggingFaceTB/SmolLM2-1.7B",
)
RECIPES: dict[str, tuple[str, Recipe]] = {
    "QLoRA": (LLAMA, training()),
    "LoRA without checkpointing": (LLAMA, training(method="lora", checkpointing=False)),
    "full": (SMALL, training(method="full", optimizer="adamw_8bit")),
    "padded, beyond a window": (MISTRAL, replace(training(), training=replace(training().training, padded=True))),  # type: ignore[type-var]
    "a window": (MISTRAL, training()),
    "eager": (GEMMA, training(attention=Attention.EAGER)),
    "tiled": (LLAMA, training(loss=Loss.TRL_TILED)),
    "chunked": (SMALL, training(loss=Loss.TRL_CHUNKED)),
    "Liger": (LLAMA, training(loss=Loss.LIGER)),
    "flattened": (
        MISTRAL,
        replace(training(loss=Loss.TRL_TILED), training=replace(training(loss=Loss.TRL_TILED).training, flattened=True)),
    ),  # type: ignore[type-var]
    "shifted logits": (LLAMA, replace(training(), stack=replace(training().stack, transformers=(4, 48)))),
    "a falcon": ("tiiuae/falcon-7b", training()),
    "an old card": (LLAMA, training(compute_capability=(7, 5))),
    "DDP": (LLAMA, replace(training(), parallel=Parallel(strategy=Strategy.DDP, num_gpus=4))),
    "full, DDP": (SMALL, replace(training(method="full"), parallel=Parallel(strategy=Strategy.DDP, num_gpus=2))),
    **{
        f"full, {strategy.value}": (SMALL, replace(training(method="full"), parallel=Parallel(strategy=strategy, num_gpus=2)))
        for strategy in (Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3)
    },
    "full, FSDP2": (
        SMALL,
        replace(training(method="full", optimizer="sgd"), parallel=Parallel(strategy=Strategy.FSDP, num_gpus=8)),
    ),
    "full, FSDP1": (
        SMALL,
        replace(training(method="full", optimizer="sgd"), parallel=Parallel(strategy=Strategy.FSDP, num_gpus=8, fsdp=Fsdp(version=1))),
    ),
    "LoRA, FSDP1, reentrant": (
        LLAMA,
        replace(
            training(method="lora"),
            training=replace(training().training, use_reentrant=True),  # type: ignore[type-var]
            stack=replace(training().stack, transformers=(4, 48)),
            parallel=Parallel(strategy=Strategy.FSDP, num_gpus=2, fsdp=Fsdp(version=1)),
        ),
    ),
    "LoRA, zero3": (LLAMA, replace(training(method="lora"), parallel=Parallel(strategy=Strategy.ZERO3, num_gpus=8))),
    "large workspaces": (LLAMA, training(compute_capability=(9, 0))),
}
POINTS = st.lists(st.tuples(st.one_of(st.just(1), st.integers(1, 300)), st.integers(1, 20_000), st.integers(1, 9)), min_size=1, max_size=12)


def at(recipe: Recipe, batch: int, length: int, steps: int) -> Recipe:
    assert recipe.training is not None
    sized = replace(recipe.training, micro_batch_size=batch, sequence_length=length, gradient_accumulation_steps=steps)
    return replace(recipe, training=sized)


def alone(name: str, recipe: Recipe) -> tuple[int, int, int]:
    """Allocated, device and required bytes as a single estimate gives them."""
    found = estimate(model(name), recipe)
    bounds = interval(
        recipe=recipe, kernels=found.kernels, allocated_bytes=found.peak.allocated_bytes, device_bytes=found.quick_device_bytes
    )
    return (
        found.peak.allocated_bytes,
        found.quick_device_bytes,
        required_bytes(found.quick_device_bytes, None if bounds is None else bounds.device_high_bytes),
    )


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(points=POINTS)
def test_every_point_of_a_grid_is_the_single_estimate_to_the_byte(name: str, points: list[tuple[int, int, int]]) -> None:
    bundled, recipe = RECIPES[name]
    context = context_bytes(recipe.num_multiprocessors)
    found = ClosedForms(inventory=model(bundled), recipe=recipe).memory(Sizes.of(*zip(*points, strict=True)))
    rows = zip(found.allocated_bytes.tolist(), found.device_bytes(context).tolist(), found.required_bytes(context).tolist(), strict=True)
    assert list(rows) == [alone(bundled, at(recipe, *point)) for point in points]


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=25, deadline=None)
@given(points=POINTS)
def test_points_with_one_code_run_one_program(name: str, points: list[tuple[int, int, int]]) -> None:
    bundled, recipe = RECIPES[name]
    codes = program_codes(model(bundled), recipe, Sizes.of(*zip(*points, strict=True))).tolist()
    programs: dict[int, tuple[object, bool]] = {}
    for code, point in zip(codes, points, strict=True):
        program = regime_of(at(recipe, *point), model(bundled)), point[2] > 1
        assert programs.setdefault(code, program) == program


@pytest.mark.parametrize("name", RECIPES)
def test_within_a_program_more_tokens_take_no_less_but_for_rounding(name: str) -> None:
    """What the searches rest on: `planner.ROUNDING_BYTES`."""
    bundled, recipe = RECIPES[name]
    evaluator = ClosedForms(inventory=model(bundled), recipe=recipe)
    for sizes in (Sizes.of(np.arange(1, 400), 512, 2), Sizes.of(2, np.arange(64, 64 * 400, 64), 1)):
        required = evaluator.memory(sizes).required_bytes(0)
        for program in np.unique(codes := evaluator.programs(sizes)):
            run = required[codes == program]
            assert (np.maximum.accumulate(run) - run).max() < 8 * 2**20


def test_one_estimate_after_the_other_gives_the_same() -> None:
    recipe = training()
    context = context_bytes(recipe.num_multiprocessors)
    slow = OneByOne(inventory=model(LLAMA), recipe=recipe, estimate=lambda r: estimate(model(LLAMA), r), context_bytes=context)
    sizes = Sizes.of([1, 2, 3, 50], 1024, [1, 2, 1, 1])
    quick = ClosedForms(inventory=model(LLAMA), recipe=recipe)
    for free in (0, 100, context):
        assert slow.memory(sizes).required_bytes(free).tolist() == quick.memory(sizes).required_bytes(free).tolist()


def test_what_int64_cannot_hold_is_larger_than_any_card_and_not_negative() -> None:
    recipe = training(attention=Attention.EAGER)
    found = ClosedForms(inventory=model(GEMMA), recipe=recipe).memory(Sizes.of([1, 65_536], [64, 2**24], 2**20))
    assert found.allocated_bytes[1] > LARGEST_BYTES
    assert found.required_bytes(0)[1] > found.device_bytes(0)[1] > LARGEST_BYTES


def test_a_sweep_lays_out_one_row_for_each_batch_and_finds_its_border() -> None:
    recipe = training()
    context = context_bytes(recipe.num_multiprocessors)
    batches, lengths = [1, 2, 4, 8], [256, 512, 2048]
    found = sweep(ClosedForms(inventory=model(LLAMA), recipe=recipe), batches, lengths, steps=1, context_bytes=context)
    expected = [[alone(LLAMA, at(recipe, batch, length, 1)) for length in lengths] for batch in batches]
    assert found.allocated_bytes.tolist() == [[point[0] for point in row] for row in expected]
    usable = expected[1][2][2]  # two samples of 2,048 tokens fit exactly
    fitting = [max((b for b, row in zip(batches, expected, strict=True) if row[n][2] <= usable), default=None) for n in range(3)]
    assert found.frontier(usable) == fitting
    assert fitting[2] == 2
    assert found.frontier(0) == [None] * 3
    assert found.verdicts(usable)[1][2] == "fits"
    assert found.verdicts(usable - 1)[1][2] == "tight"
    assert found.verdicts(expected[1][2][1] - 1)[1][2] == "does_not_fit"


@pytest.mark.parametrize("name", ["QLoRA", "full, FSDP1", "full, zero3"])
def test_a_hundred_times_as_many_points_of_one_program_take_no_more_steps_of_python(name: str) -> None:
    model_name, recipe = RECIPES[name]
    evaluator = ClosedForms(inventory=model(model_name), recipe=recipe)

    def calls(side: int) -> int:
        points = Sizes.of(np.repeat(np.arange(64, 64 + side), side), np.tile(np.arange(2048, 2048 + side), side), 1)
        evaluator.memory(points)
        counted = 0

        def count(*_: object) -> None:
            nonlocal counted
            counted += 1

        sys.setprofile(count)
        try:
            evaluator.memory(points)
        finally:
            sys.setprofile(None)
        return counted

    assert calls(50) == calls(5)
