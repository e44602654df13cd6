"""The estimate of a step's time: it follows what a step does, and says what it rests on."""

from dataclasses import replace
from typing import Any

import pytest

from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.flops import step_flops
from estimator.gpus import all_gpus, find_gpu
from estimator.recipe import Attention
from estimator.throughput import StepTime, step_time, step_work
from tests.estimator.recipes import inference, model, training

NAME = "Qwen/Qwen2.5-7B"


def time(gpu: str = "a100-80", batch: int = 2, length: int = 2048, num_gpus: int = 1, **options: Any) -> StepTime:
    return step_time(model(NAME), training(batch, length, **options), find_gpu(gpu), num_gpus)


def test_no_card_is_faster_than_its_peak() -> None:
    for gpu in all_gpus():
        recipe = training(2, 2048, attention=Attention.EAGER)
        peak = max(gpu.dense_flops.values())
        assert step_time(model(NAME), recipe, gpu).seconds > step_flops(model(NAME), recipe).total / peak


@pytest.mark.parametrize(
    ("slower", "faster"), [("t4", "l4"), ("l4", "rtx4090"), ("a100-80", "h100-sxm"), ("h100-pcie", "h100-sxm"), ("rtx3090", "rtx5090")]
)
def test_a_faster_card_takes_less_time(slower: str, faster: str) -> None:
    assert time(slower).seconds > time(faster).seconds


def test_the_parts_add_up() -> None:
    step = time()
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    low, high = step.seconds_range
    assert low < step.seconds < high
    assert step.basis == "modelled"


def test_micro_batches_add_up_and_the_update_comes_once() -> None:
    one, four = time(accumulation=1), time(accumulation=4)
    assert four.tokens == 4 * one.tokens
    assert four.flops == 4 * one.flops
    assert four.parts["products"] == pytest.approx(4 * one.parts["products"])
    assert four.parts["optimizer"] == one.parts["optimizer"]


def test_checkpointing_and_unpacking_cost_time() -> None:
    assert time(checkpointing=True).seconds > time(checkpointing=False).seconds
    assert time(method="lora").parts["dequantization"] == 0 < time(method="qlora").parts["dequantization"]
    assert time(batch=1, length=128).parts["dequantization"] == time(batch=4, length=2048).parts["dequantization"]


def test_cards_side_by_side_do_more_tokens_in_the_same_time() -> None:
    one, eight = time(), time(num_gpus=8)
    assert eight.seconds == one.seconds
    assert eight.tokens_per_second == pytest.approx(8 * one.tokens_per_second)
    assert any("send each other" in said for said in eight.assumptions)


def test_cost_follows_from_price_and_speed() -> None:
    step = time()
    per_second = step.tokens_per_second
    assert step.usd_per_million_tokens(3.6) == pytest.approx(1e6 / per_second * 0.001)
    assert step.epoch_hours(10_000_000) == pytest.approx(1e7 / per_second / 3600)
    assert step.usd_per_epoch(1_000_000, 3.6) == pytest.approx(step.usd_per_million_tokens(3.6))


def test_a_card_without_units_for_a_type_computes_it_as_float32_and_says_so() -> None:
    step = time("t4")
    assert any("no matrix units for bfloat16" in said for said in step.assumptions)
    assert DType.BFLOAT16 not in find_gpu("t4").dense_flops


def test_old_cards_write_grouped_heads_out_in_float32() -> None:
    new, old = (step_work(model(NAME), training(1, 1024, compute_capability=c)) for c in ((8, 6), (7, 5)))
    assert (len(new.kernels), len(new.written_out)) == (1, 0)
    assert (len(old.kernels), len(old.written_out)) == (0, 1)
    assert old.written_out[0][2] is DType.FLOAT32


def test_cards_of_a_kind_share_the_work_of_a_step() -> None:
    recipe = training(1, 1024)
    assert step_work(model(NAME), recipe) is step_work(model(NAME), replace(recipe, compute_capability=(9, 0), num_multiprocessors=132))


def test_padding_is_attended_to_in_full() -> None:
    recipe = training(1, 1024)
    assert recipe.training is not None
    padded = replace(recipe, training=replace(recipe.training, padded=True))
    assert step_work(model(NAME), padded).kernels[0][0] == 2 * step_work(model(NAME), recipe).kernels[0][0]


def test_a_short_batch_of_a_mixture_waits_for_the_weights_of_its_experts() -> None:
    name, card = "Qwen/Qwen3-30B-A3B", find_gpu("h200-sxm")
    step = step_time(model(name), training(1, 128, method="lora"), card)
    weights = 2 * 28.9e9  # of the experts: 48 layers × 128 × 3 × 2048 × 768, 2 bytes each
    assert step.parts["products"] > 3 * weights / 4.8e12  # forward, again, and for the gradients of its inputs


def test_the_range_is_wider_on_cards_of_which_no_run_was_published() -> None:
    judged, other = time("a100-80"), time("h100-sxm")
    assert judged.seconds_range[1] / judged.seconds < other.seconds_range[1] / other.seconds
    assert any("no published run" in said for said in other.assumptions)
    assert not any("no published run" in said for said in judged.assumptions)


def test_a_card_whose_best_product_was_published_is_scaled_by_it() -> None:
    for gpu in all_gpus():
        assert (gpu.matmul_share is None) == (gpu.matmul_share_source == "")
    assert any("70%" in said for said in time("h100-sxm").assumptions)  # 0.75 × 80.1 / 85.9


def test_what_trains_nothing_has_no_step() -> None:
    with pytest.raises(RequestError, match="training"):
        step_time(model(NAME), inference(), find_gpu("a100-80"))


def test_a_card_of_unknown_speed_is_refused() -> None:
    with pytest.raises(RequestError, match="speed of a100-80 is not known"):
        step_time(model(NAME), training(), replace(find_gpu("a100-80"), memory_bandwidth=None))
