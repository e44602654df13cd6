"""Several cards as requests name them."""

from typing import Any

import pytest

from app import examples
from app.service import answer
from estimator.errors import RequestError
from tests.app.test_service import AnswerJson, codes


def ask(hardware: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return answer({**examples.QLORA, **changes, "hardware": {"gpu": "rtx4090", "num_gpus": 2, **hardware}})


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp", "device_map"])
def test_every_strategy_is_answered_in_the_form_of_the_contract(strategy: str) -> None:
    result = ask({"strategy": strategy})
    AnswerJson.model_validate(result)
    assert (result["recipe"]["num_gpus"], result["recipe"]["strategy"]) == (2, strategy)
    assert len(result["ranks"]) == (2 if strategy == "device_map" else 0)
    for phase in result["phases"]:
        assert all(item["formula"] and item["source"] for item in phase["items"]), phase


def test_libraries_own_options_are_read() -> None:
    small = ask(
        {"strategy": "zero2", "deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "bf16": {"enabled": True}}}
    )
    automatic = ask({"strategy": "zero2", "deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}})
    default = ask({"strategy": "zero2"})
    peaks = [result["peak"]["allocated_bytes"] for result in (small, automatic, default)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[1] < peaks[2]
    offloaded = ask({"strategy": "zero3", "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}})
    assert offloaded["host_bytes"] > 0
    assert "fsdp_keeps_4bit_weights_whole" in codes(ask({"strategy": "fsdp", "fsdp_config": {"version": 2}}))


@pytest.mark.parametrize(
    ("hardware", "field"),
    [
        ({"strategy": "single"}, "hardware.strategy"),
        ({"strategy": "zero2", "deepspeed": {"zero_optimization": {"stage": 3}}}, "hardware.deepspeed.zero_optimization.stage"),
        ({"strategy": "fsdp", "fsdp_config": {"version": 1}}, "quantization.bnb_4bit_quant_storage"),
        ({"strategy": "fsdp", "fsdp_config": {"version": 1}, "num_gpus": 1}, "hardware.num_gpus"),
    ],
)
def test_what_does_not_go_together_is_refused(hardware: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as refusal:
        ask(hardware)
    assert [error.field for error in refusal.value.errors] == [field]


def test_data_parallel_strategies_are_for_training() -> None:
    with pytest.raises(RequestError, match="device_map"):
        ask({"strategy": "ddp"}, training=None, peft=None, inference={})
