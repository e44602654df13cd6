"""Checks: one verdict for scripts, and the smallest change that makes a run fit."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from app import examples
from app.check import check
from app.cli import cli
from app.plan import plan
from app.service import answer
from app.settings import applied
from app.wording import verdict_sentence
from estimator.errors import RequestError

SMALL = {**examples.QLORA, "hardware": {"gpu": "a100-80"}}


@pytest.mark.parametrize("gpu", ["rtx4060", "rtx4090", "a6000", "a100-80"])
def test_a_check_says_what_the_estimate_says(gpu: str) -> None:
    request = {**examples.QLORA, "hardware": {"gpu": gpu}}
    found, full = check(request), answer(request)
    assert found["verdict"] == full["fit"]["verdict"]
    assert found["device_bytes"] == full["peak"]["device_bytes"]
    assert found["device_bytes"] + full["fit"]["free_bytes"] == found["usable_bytes"]
    assert found["missing_bytes"] == max(0, found["required_bytes"] - found["usable_bytes"])
    assert (found["missing_bytes"] == 0) == (found["verdict"] == "fits")
    assert found["warnings"] == [warning["code"] for warning in full["warnings"]]


@pytest.mark.parametrize("gpu", ["rtx4060", "rtx4090", "t4"])
def test_the_change_of_a_check_makes_the_run_fit(gpu: str) -> None:
    request = {**examples.QLORA, "hardware": {"gpu": gpu}}
    change = check(request)["change"]
    assert answer(applied(request, change["set"]))["fit"]["verdict"] == "fits"


def test_a_smaller_micro_batch_keeps_the_global_batch() -> None:
    training = {**examples.QLORA["training"], "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    change = check({**examples.QLORA, "hardware": {"gpu": "rtx4090"}, "trainer": "trl", "training": training})["change"]
    assert change["set"] == {"training.per_device_train_batch_size": 4, "training.gradient_accumulation_steps": 4}


def test_smaller_micro_batches_are_named_before_another_trainer() -> None:
    """Both are enough on 24 GB: two samples at a time need no other code."""
    request = {**examples.QLORA, "hardware": {"gpu": "rtx4090"}}
    assert answer({**request, "trainer": "trl"})["fit"]["verdict"] == "fits"
    change = check(request)["change"]
    assert change["set"] == {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 8}


@pytest.mark.parametrize("gpu", ["rtx4090", "rtx3060-12"])
def test_the_change_of_a_check_is_the_first_of_all_that_a_plan_would_list(gpu: str) -> None:
    request = {**examples.QLORA, "hardware": {"gpu": gpu}, "training": {**examples.QLORA["training"], "per_device_train_batch_size": 1}}
    listed = plan({**request, "global_batch_size": 4})["shortfall"]
    if listed is None:
        assert check(request)["change"] is None
        return
    first = listed["changes"][0]
    assert check(request)["change"] == {name: first[name] for name in ("set", "saves_bytes", "costs")}


@pytest.mark.parametrize(
    ("request_", "options", "code"),
    [
        pytest.param(SMALL, [], 0, id="fits"),
        pytest.param(examples.QLORA, [], 3, id="does not fit"),
        pytest.param(examples.INFERENCE, ["--gpu", "rtx3090"], 0, id="inference"),
        pytest.param({**examples.QLORA, "hardware": None}, [], 1, id="no card"),
    ],
)
def test_the_exit_code_is_the_verdict(request_: dict[str, Any], options: list[str], code: int) -> None:
    result = CliRunner().invoke(cli, ["check", "--request", "-", *options], input=json.dumps(request_))
    assert result.exit_code == code or isinstance(result.exception, RequestError), result.output
    if code != 1:
        assert len(result.output.strip().splitlines()) == 1


def test_strict_counts_what_is_tight_as_not_fitting() -> None:
    found = check(SMALL)
    tight = {**SMALL, "hardware": {"capacity_gib": (found["device_bytes"] + 2**29) / 2**30}}
    assert check(tight)["verdict"] == "tight"
    sentence = verdict_sentence(answer(tight))
    assert "less than its margin for errors" in sentence
    assert "to spare" not in sentence
    for options, code in (([], 0), (["--strict"], 3)):
        assert CliRunner().invoke(cli, ["check", "--request", "-", *options], input=json.dumps(tight)).exit_code == code


def test_a_check_needs_a_card_and_a_run() -> None:
    with pytest.raises(RequestError, match="needs a card"):
        check({**examples.QLORA, "hardware": None})
    with pytest.raises(RequestError, match="training or inference"):
        check({"model": "meta-llama/Llama-3.1-8B", "hardware": {"gpu": "t4"}})


def test_what_the_card_refuses_whatever_its_memory_is_said_beside_the_verdict() -> None:
    small = {**SMALL, "training": {**SMALL["training"], "per_device_train_batch_size": 1, "max_length": 256}}
    told = {gpu: check({**small, "attn_implementation": "flash_attention_2", "hardware": {"gpu": gpu}}) for gpu in ("t4", "a100-80")}
    assert [found["verdict"] for found in told.values()] == ["fits", "fits"]
    assert not told["a100-80"]["refused"]
    assert any("flash_attention_2 needs compute capability 8.0" in message for message in told["t4"]["refused"])
    assert any("bfloat16 needs 8.0" in message for message in told["t4"]["refused"])
