"""A few layers, repeated, beside the step of every layer."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest

from estimator import step
from estimator.extent import Extent
from estimator.log import Log
from estimator.recipe import Adapter, Attention, Loss, Recipe
from estimator.repetition import IrregularError, Program, Sample, repeated, sample
from estimator.schedule import MicroBatch, Schedule
from estimator.static_memory import static_memory
from estimator.step import regime_of, schedule_step
from tests.estimator.recipes import model, training
from tests.estimator.test_order import OF_EACH_FAMILY

METHODS = ("full", "lora", "qlora")


def _schedule(name: str, recipe: Recipe) -> Schedule:
    inventory = model(name)
    return schedule_step(inventory, recipe, static_memory(inventory, recipe).tensors, regime_of(recipe, inventory))


def _unfolded(part: MicroBatch) -> tuple[object, ...]:
    """What makes a difference to an allocator: not the order of releases between which nothing is made."""
    runs = groupby(part.events, key=lambda event: event < 0)
    events = [event for is_release, run in runs for event in (sorted(run) if is_release else run)]
    return [part.sizes[kind] for kind in part.kinds], events, part.backward, part.kept


def _reentrant(recipe: Recipe) -> Recipe:
    assert recipe.training is not None
    return replace(recipe, training=replace(recipe.training, use_reentrant=True))


def _assert_as_in_full(name: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = []

    def spied(*given: Any) -> Program:
        answered.append(repeated(*given))
        return answered[-1]

    with monkeypatch.context() as patch:
        patch.setattr(step, "repeated", spied)
        few = _schedule(name, recipe)
        patch.setattr(step, "sample", lambda kinds: None)
        in_full = _schedule(name, recipe)
    assert answered
    assert _unfolded(few.first) == _unfolded(in_full.first)
    assert _unfolded(few.later) == _unfolded(in_full.later)


# Few layers each, and one of every way in which layers follow each other: alike, in turns, and the first ones of another kind.
ALIKE, IN_TURNS, FIRST_DENSE = "meta-llama/Llama-3.2-1B", "google/gemma-2-2b", "deepseek-ai/DeepSeek-V2-Lite"
VARIANTS = {
    "without checkpoints": training(2, 640, checkpointing=False),
    "every second layer checkpointed": training(2, 640, every_n_layers=2),
    "eager": training(2, 640, attention=Attention.EAGER, checkpointing=False),
    "flash": training(2, 640, attention=Attention.FLASH_ATTENTION_2),
    "tiled loss": training(2, 640, loss=Loss.TRL_TILED),
    "dropout": training(2, 640, adapter=Adapter(r=8, target_modules=("o_proj",), dropout=0.1), checkpointing=False),
    "DoRA": training(2, 640, adapter=Adapter(r=8, target_modules=("o_proj",), use_dora=True)),
    "reentrant": _reentrant(training(2, 640, accumulation=2)),
    "reentrant, full": _reentrant(training(2, 640, method="full")),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [ALIKE, IN_TURNS, FIRST_DENSE])
def test_repeated_layers_make_and_release_what_every_layer_does(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _assert_as_in_full(name, VARIANTS[variant], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_in_every_family(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _assert_as_in_full(name, training(2, 640, method=method, accumulation=2), monkeypatch)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        # One layer on either side of those that repeat, of which three are run.
        ("aaaaaaaaaa", Sample(num_layers=10, start=1, period=1, num_periods=8)),
        # One period on either side: a b | a b, a b, a b, a b | a b.
        ("abababababab", Sample(num_layers=12, start=2, period=2, num_periods=4)),
        ("ddaaaaaaaaz", Sample(num_layers=11, start=3, period=1, num_periods=6)),
        # As many would have to be run.
        ("aaaaa", None),
        ("abcdefgh", None),
        ("", None),
    ],
)
def test_the_fewest_layers_stand_for_all(kinds: Sequence[Hashable], expected: Sample | None) -> None:
    assert sample(kinds) == expected


def test_those_before_the_middle_three_periods_and_those_after_it_are_run() -> None:
    assert Sample(num_layers=12, start=2, period=2, num_periods=4).layers == (0, 1, 2, 3, 4, 5, 6, 7, 10, 11)


def test_layers_that_reach_far_are_run_one_by_one() -> None:
    """A layer that releases what the layer two before it made has no neighbours that repeat."""
    log, picked = Log(), sample("a" * 10)
    assert picked is not None
    made = []
    for layer in picked.layers:
        log.enter_layer(layer, 0)
        made.append(log.make(Extent(1)))
        if len(made) > 2:
            log.release(made[-3])
    log.leave_layers(0)
    with pytest.raises(IrregularError):
        repeated(log, [0] * len(log.sizes), picked, [])
