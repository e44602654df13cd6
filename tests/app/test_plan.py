"""Plans for one card."""

from typing import Any

import pytest

from app import examples
from app.plan import plan
from app.service import answer
from estimator.errors import RequestError


def request(**changes: Any) -> dict[str, Any]:
    training = {**examples.QLORA["training"], **changes.pop("training", {})}
    return {**examples.QLORA, "training": {k: v for k, v in training.items() if v is not None}, **changes}


def test_a_planned_micro_batch_fits_and_the_next_divisor_does_not() -> None:
    result = plan(request(global_batch_size=64, hardware={"gpu": "a100-40"}))
    found = result["plan"]
    assert result["shortfall"] is None
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 64
    assert found["estimate"]["fit"]["verdict"] == "fits"
    assert found["margin_bytes"] == found["estimate"]["fit"]["free_bytes"]
    larger = found["per_device_train_batch_size"] * 2
    training = {"per_device_train_batch_size": larger, "gradient_accumulation_steps": 64 // larger}
    assert answer(request(training=training, hardware={"gpu": "a100-40"}))["fit"]["verdict"] != "fits"


@pytest.mark.parametrize("capacity_gib", [30, 45, 60, 62, 64, 66, 68, 70, 72, 76, 80])
def test_the_planned_micro_batch_is_the_largest_divisor_that_fits(capacity_gib: float) -> None:
    full = {
        "model": "meta-llama/Llama-3.1-8B",
        "dtype": "bfloat16",
        "training": {"max_length": 1024, "optim": "adamw_8bit", "bf16": True, "gradient_checkpointing": True},
        "hardware": {"capacity_gib": capacity_gib},
    }
    fitting = []
    for size in (1, 2, 4, 8, 16):
        training = {**full["training"], "per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}  # type: ignore[dict-item]
        if answer({**full, "training": training})["fit"]["verdict"] == "fits":
            fitting.append(size)
    found = plan({**full, "global_batch_size": 16})["plan"]
    assert (found["per_device_train_batch_size"] if found else None) == max(fitting, default=None)


def test_without_a_global_batch_the_micro_batch_is_as_large_as_fits() -> None:
    found = plan(request(hardware={"gpu": "a100-80"}))["plan"]
    size = found["per_device_train_batch_size"]
    assert found["estimate"]["fit"]["verdict"] == "fits"
    assert answer(request(training={"per_device_train_batch_size": size + 1}, hardware={"gpu": "a100-80"}))["fit"]["verdict"] != "fits"


def test_alternatives_are_smaller_micro_batches_of_the_same_global_batch_with_more_margin() -> None:
    found = plan(request(global_batch_size=16, hardware={"gpu": "a100-80"}))["plan"]
    assert found["alternatives"]
    for other in found["alternatives"]:
        assert other["per_device_train_batch_size"] < found["per_device_train_batch_size"]
        assert other["per_device_train_batch_size"] * other["gradient_accumulation_steps"] == 16
        assert other["margin_bytes"] >= found["margin_bytes"]


def test_the_longest_sequence_needs_no_length_in_the_request() -> None:
    found = plan(request(training={"max_length": None, "per_device_train_batch_size": 1}, objective="longest_sequence"))["plan"]
    assert found["max_length"] % 64 == 0
    assert found["per_device_train_batch_size"] == 1
    longer = request(training={"max_length": found["max_length"] + 64, "per_device_train_batch_size": 1})
    assert answer(longer)["fit"]["verdict"] != "fits"


def test_most_margin_is_a_micro_batch_of_one() -> None:
    found = plan(request(objective="most_margin", global_batch_size=8, hardware={"gpu": "a100-80"}))["plan"]
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (1, 8)


def test_what_does_not_fit_is_a_shortfall_with_changes() -> None:
    full = {
        "model": "meta-llama/Llama-3.1-8B",
        "dtype": "bfloat16",
        "training": {"max_length": 2048, "optim": "adamw_torch_fused"},
        "hardware": {"gpu": "rtx4090"},
        "global_batch_size": 8,
    }
    result = plan(full)
    shortfall = result["shortfall"]
    assert result["plan"] is None
    assert shortfall["missing_bytes"] > 0
    assert shortfall["estimate"]["fit"]["verdict"] != "fits"
    assert shortfall["changes"]
    assert all(change["saves_bytes"] > 0 for change in shortfall["changes"])
    assert [change["fits"] for change in shortfall["changes"]] == sorted((c["fits"] for c in shortfall["changes"]), reverse=True)


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"hardware": None}, "hardware"), ({"global_batch_size": 0}, "global_batch_size"), ({"objective": "fun"}, "objective")],
)
def test_a_plan_that_cannot_be_made_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan(request(**changes))
    assert field in [error.field for error in caught.value.errors]


def test_a_plan_without_training_is_refused() -> None:
    with pytest.raises(RequestError, match="training"):
        plan(examples.INFERENCE)
