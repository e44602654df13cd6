"""Intervals: plain arithmetic on residuals."""

import math
import random

import pytest

from estimator.correction import MIN_RESIDUALS, ResidualClass, class_of, conformal_radius, interval, residual
from estimator.dtypes import DType
from estimator.recipe import Adapter, Attention, Quantization, QuantizationKind, Recipe, Training
from estimator.stack import Stack


def _recipe(*, quantized: bool = False, adapter: bool = True, training: bool = True) -> Recipe:
    return Recipe(
        dtype=DType.BFLOAT16,
        attention=Attention.SDPA,
        quantization=Quantization(kind=QuantizationKind.NF4) if quantized else None,
        adapter=Adapter(r=8) if adapter else None,
        training=Training(micro_batch_size=1, sequence_length=8) if training else None,
        stack=Stack(),
    )


def _classes(name: str, *, allocated: int, device: int) -> dict[str, ResidualClass]:
    residuals = [0.01 * (i + 1) for i in range(max(allocated, device))]
    return {name: ResidualClass(name=name, allocated=tuple(residuals[:allocated]), device=tuple(residuals[:device]), evidence="made up")}


def test_nine_residuals_are_the_fewest_that_cover_90_percent() -> None:
    assert conformal_radius([0.1] * (MIN_RESIDUALS - 1)) is None
    assert conformal_radius([0.1] * MIN_RESIDUALS) == 0.1


def test_the_radius_is_the_order_statistic_of_split_conformal_prediction() -> None:
    assert conformal_radius([0.01 * i for i in range(1, 20)], 0.9) == pytest.approx(0.18)


def test_the_sign_of_a_residual_does_not_matter_to_the_radius() -> None:
    values = [0.01 * i for i in range(1, 20)]
    assert conformal_radius(values) == conformal_radius([-v for v in values])


def test_intervals_reach_their_coverage_on_simulated_calibrations() -> None:
    draw = random.Random(7)
    hits = 0
    for _ in range(2000):
        radius = conformal_radius([draw.gauss(0, 0.02) for _ in range(29)])
        assert radius is not None
        hits += abs(draw.gauss(0, 0.02)) <= radius
    assert hits / 2000 == pytest.approx(0.9, abs=0.02)


def test_classes_follow_method_and_quantization() -> None:
    for recipe in (_recipe(adapter=False), _recipe(), _recipe(quantized=True)):
        assert class_of(recipe) == "training"
    assert class_of(_recipe(training=False)) is None


def test_an_interval_holds_the_estimate_and_names_its_evidence() -> None:
    bounds = interval(recipe=_recipe(), allocated_bytes=1000, device_bytes=1500, classes=_classes("training", allocated=9, device=9))
    assert bounds is not None
    assert bounds.allocated_low_bytes < 1000 < bounds.allocated_high_bytes == math.ceil(1000 * math.exp(0.09))
    assert bounds.device_low_bytes < 1500 < bounds.device_high_bytes
    assert "made up" in bounds.basis


@pytest.mark.parametrize(("allocated", "device"), [(8, 9), (9, 8)])
def test_there_is_no_interval_with_fewer_than_nine_residuals(allocated: int, device: int) -> None:
    classes = _classes("training", allocated=allocated, device=device)
    assert interval(recipe=_recipe(), allocated_bytes=1000, device_bytes=1500, classes=classes) is None


def test_a_class_without_residuals_has_no_interval() -> None:
    assert interval(recipe=_recipe(), allocated_bytes=1000, device_bytes=1500, classes={}) is None


def test_a_residual_is_positive_when_more_was_measured_than_predicted() -> None:
    assert residual(110, 100) > 0 > residual(90, 100)
