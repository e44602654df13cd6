"""Intervals: plain arithmetic on residuals."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from estimator.correction import MIN_RESIDUALS, ResidualClass, class_of, conformal_radius, interval, residual, shipped
from estimator.dtypes import DType
from estimator.engine import estimate
from estimator.gpus import Vendor
from estimator.kernels import Kernel
from estimator.recipe import Adapter, Attention, Loss, Quantization, QuantizationKind, Recipe, Training
from estimator.stack import Stack
from tests.estimator import recipes

FLASH = frozenset({Kernel.FLASH})
QLORA_ON_AMPERE = "QLoRA, 16-bit load, stock loss, flash attention, checkpointing, compute capability 8.0 or more"


def _recipe(*, quantized: bool = False, adapter: bool = True, training: bool = True) -> Recipe:
    return Recipe(
        dtype=DType.BFLOAT16,
        attention=Attention.SDPA,
        quantization=Quantization(kind=QuantizationKind.NF4) if quantized else None,
        adapter=Adapter(r=8) if adapter else None,
        training=Training(micro_batch_size=1, sequence_length=8) if training else None,
        stack=Stack(),
    )


def _classes(*, allocated: int, device: int) -> dict[str, ResidualClass]:
    name = class_of(_recipe(), FLASH)
    assert name is not None
    residuals = [0.01 * (i + 1) for i in range(max(allocated, device))]
    return {name: ResidualClass(name=name, allocated=tuple(residuals[:allocated]), device=tuple(residuals[:device]), evidence="made up")}


def test_a_class_is_never_trusted_beyond_what_all_classes_show() -> None:
    classes = _classes(allocated=9, device=9)
    (own,) = classes.values()
    tight = replace(own, allocated=(0.0,) * 9, device=(0.0,) * 9)
    wide = replace(own, name="another", allocated=(0.2,) * 20, device=(0.3,) * 20)
    found = interval(recipe=_recipe(), kernels=FLASH, allocated_bytes=1000, device_bytes=1000, classes={own.name: tight, "another": wide})
    assert found is not None
    assert (found.allocated_high_bytes, found.device_high_bytes) == (math.ceil(1000 * math.exp(0.2)), math.ceil(1000 * math.exp(0.3)))
    alone = interval(recipe=_recipe(), kernels=FLASH, allocated_bytes=1000, device_bytes=1000, classes={own.name: tight})
    assert alone is not None
    assert alone.allocated_high_bytes == 1000


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


def _kind(**changes: Any) -> str | None:
    """The class of a checkpointed QLoRA run of Llama 3.1, by what its own step runs."""
    inventory = recipes.model(changes.pop("model", "meta-llama/Llama-3.1-8B"))
    dtype, padded = changes.pop("dtype", DType.BFLOAT16), changes.pop("padded", False)
    recipe = replace(recipes.training(**changes), dtype=dtype)
    assert recipe.training is not None
    recipe = replace(recipe, training=replace(recipe.training, padded=padded))
    return class_of(recipe, estimate(inventory, recipe).kernels)


def test_a_run_of_today_and_a_published_one_can_share_a_class() -> None:
    assert _kind() == QLORA_ON_AMPERE
    assert QLORA_ON_AMPERE in shipped()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"method": "full"}, "full"),
        ({"method": "lora"}, "LoRA"),
        ({"adapter": Adapter(r=16, use_dora=True)}, "QLoRA with DoRA"),
        ({"loss": Loss.TRL_TILED}, "trl tiled loss"),
        ({"loss": Loss.LIGER}, "liger loss"),
        ({"attention": Attention.EAGER}, "eager attention"),
        ({"checkpointing": False}, "no checkpointing"),
        ({"dtype": DType.FLOAT32}, "32-bit load"),
        ({"padded": True}, "padding"),
        ({"padded": True, "attention": Attention.FLASH_ATTENTION_2}, "padding"),
        ({"compute_capability": (7, 5)}, "compute capability below 8.0"),
        ({"compute_capability": (7, 5)}, "written-out attention"),
        ({"compute_capability": (7, 5), "model": "meta-llama/Llama-2-7b-hf"}, "memory-efficient attention"),
        ({"model": "mistralai/Mixtral-8x7B-v0.1"}, "flash attention and grouped experts"),
    ],
)
def test_what_makes_another_peak_is_another_class(changes: dict[str, Any], word: str) -> None:
    name = _kind(**changes)
    assert name != QLORA_ON_AMPERE
    assert word in (name or "").split(", ")


def test_int8_is_a_class_of_its_own_and_inference_has_none() -> None:
    int8 = replace(_recipe(quantized=True), quantization=Quantization(kind=QuantizationKind.INT8))
    assert (class_of(int8, FLASH) or "").startswith("int8 LoRA, ")
    assert class_of(_recipe(training=False), FLASH) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": Loss.TRL_TILED},
        {"attention": Attention.EAGER},
        {"compute_capability": (7, 5)},
        {"checkpointing": False},
    ],
)
def test_what_no_nine_published_rows_judge_has_no_interval(changes: dict[str, Any]) -> None:
    recipe = recipes.training(**changes)
    found = estimate(recipes.model("meta-llama/Llama-3.1-8B"), recipe)
    assert interval(recipe=recipe, kernels=found.kernels, allocated_bytes=1000, device_bytes=1500) is None


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_16_bit_loads_with_the_stock_loss_have_the_rows_it_takes(method: str) -> None:
    recipe = recipes.training(method=method)
    bounds = interval(recipe=recipe, kernels=FLASH, allocated_bytes=1000, device_bytes=1500)
    assert bounds is not None


def test_an_interval_holds_the_estimate_and_names_its_evidence() -> None:
    bounds = interval(recipe=_recipe(), kernels=FLASH, allocated_bytes=1000, device_bytes=1500, classes=_classes(allocated=9, device=9))
    assert bounds is not None
    assert bounds.allocated_low_bytes < 1000 < bounds.allocated_high_bytes == math.ceil(1000 * math.exp(0.09))
    assert bounds.device_low_bytes < 1500 < bounds.device_high_bytes
    assert "made up" in bounds.basis


@pytest.mark.parametrize(("allocated", "device"), [(8, 9), (9, 8)])
def test_there_is_no_interval_with_fewer_than_nine_residuals(allocated: int, device: int) -> None:
    classes = _classes(allocated=allocated, device=device)
    assert interval(recipe=_recipe(), kernels=FLASH, allocated_bytes=1000, device_bytes=1500, classes=classes) is None


def test_a_class_without_residuals_has_no_interval() -> None:
    assert interval(recipe=_recipe(), kernels=FLASH, allocated_bytes=1000, device_bytes=1500, classes={}) is None


def test_a_residual_is_positive_when_more_was_measured_than_predicted() -> None:
    assert residual(110, 100) > 0 > residual(90, 100)


def test_an_interval_of_other_versions_says_so_in_its_basis_and_one_of_those_measured_does_not() -> None:
    (known,) = _classes(allocated=9, device=9).values()
    measured = replace(known, versions={"transformers": ((4, 39), (4, 48))})
    today = interval(recipe=_recipe(), kernels=FLASH, allocated_bytes=1000, device_bytes=1500, classes={known.name: measured})
    then = replace(_recipe(), stack=Stack(transformers=(4, 44, 2)))
    old = interval(recipe=then, kernels=FLASH, allocated_bytes=1000, device_bytes=1500, classes={known.name: measured})
    assert today is not None
    assert old is not None
    assert "transformers 4.39 to 4.48, not 5.23" in today.basis
    assert "not " not in old.basis.removeprefix(f"9 allocated and 9 device residuals of the class '{known.name}'")


@pytest.mark.parametrize(
    ("stack", "outside"),
    [
        (Stack(transformers=(4, 39, 0), bitsandbytes=(0, 43, 1)), None),
        (Stack(transformers=(4, 48, 3), bitsandbytes=(0, 43, 3)), None),
        (Stack(transformers=(4, 49, 0), bitsandbytes=(0, 43, 3)), "transformers 4.39 to 4.48, not 4.49"),
        (Stack(transformers=(4, 38, 2), bitsandbytes=(0, 43, 3)), "transformers 4.39 to 4.48, not 4.38"),
        (Stack(transformers=(4, 48, 0), bitsandbytes=(0, 45, 0)), "bitsandbytes 0.43, not 0.45"),
    ],
)
def test_a_version_outside_the_measured_ones_is_named(stack: Stack, outside: str | None) -> None:
    versions = {"transformers": ((4, 39), (4, 48)), "bitsandbytes": ((0, 43), (0, 43))}
    known = ResidualClass(name="x", allocated=(), device=(), evidence="made up", versions=versions)
    assert known.other_versions(stack) == outside


def test_what_was_measured_on_cards_of_one_vendor_says_nothing_of_another_s() -> None:
    recipe = replace(recipes.training(), compute_capability=(9, 4))
    assert interval(recipe=recipe, kernels=FLASH, allocated_bytes=1000, device_bytes=1500) is not None
    elsewhere = replace(recipe, vendor=Vendor.AMD)
    assert interval(recipe=elsewhere, kernels=FLASH, allocated_bytes=1000, device_bytes=1500) is None
    assert "AMD" in (class_of(elsewhere, FLASH) or "")
