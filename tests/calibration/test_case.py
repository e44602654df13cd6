from typing import Any

import pytest

from calibration.case import Case
from estimator.errors import RequestError
from tests.calibration.cases import LLAMA, QLORA, case


def test_the_hash_does_not_depend_on_key_order_nulls_or_the_name_of_the_model() -> None:
    turned = dict(reversed(LLAMA.items()))
    renamed = Case.from_request({"model": "some/model", **QLORA, "attn_implementation": None}, {**turned, "pad_token_id": None})
    assert renamed.hash == case().hash


def test_the_hash_survives_being_written_and_read() -> None:
    assert Case.model_validate_json(case().model_dump_json()).hash == case().hash


def test_hardware_and_engine_do_not_change_what_is_run() -> None:
    assert case(hardware={"gpu": "t4"}, engine="trace").hash == case().hash


@pytest.mark.parametrize(
    "change", [{"dtype": "float16"}, {"peft": None}, {"padded": True}, {"training": {**QLORA["training"], "optim": "sgd"}}]
)
def test_whatever_decides_the_run_changes_the_hash(change: dict[str, object]) -> None:
    assert case(**change).hash != case().hash


def test_another_batch_or_length_is_another_case() -> None:
    larger = case().at(batch_size=4, sequence_length=32)
    assert (larger.batch_size, larger.sequence_length) == (4, 32)
    assert larger.hash != case().hash
    assert larger.at(batch_size=2, sequence_length=16).hash == case().hash


def test_a_cap_is_part_of_what_is_run_and_outlives_another_batch() -> None:
    capped = case().at(cap_bytes=2**33)
    assert capped.hash != case().hash
    assert capped.at(batch_size=9).cap_bytes == 2**33
    assert Case.model_validate_json(case().model_dump_json(exclude_none=True)).hash == case().hash


def test_weights_from_the_hub_are_another_case_and_need_a_name_there() -> None:
    named = case().model_copy(update={"model": "meta-llama/Llama-3.1-8B"})
    assert named.hash == case().hash
    assert named.with_hub_weights().checkpoint == "meta-llama/Llama-3.1-8B"
    assert named.with_hub_weights("abc").checkpoint == "meta-llama/Llama-3.1-8B@abc"
    assert len({named.hash, named.with_hub_weights().hash, named.with_hub_weights("abc").hash}) == 3
    with pytest.raises(RequestError, match="id there"):
        case().with_hub_weights()


@pytest.mark.parametrize("revision", [3, True, ["main"], "", "a b", "../x", "x@y", "v" * 129])
def test_a_revision_that_is_none_is_refused_by_name_and_value(revision: Any) -> None:
    named = case().model_copy(update={"model": "meta-llama/Llama-3.1-8B"})
    with pytest.raises(RequestError, match=r"^revision: .*branch, tag or commit") as refused:
        named.with_hub_weights(revision)
    assert repr(revision)[:100] in refused.value.message


def test_weights_with_a_longer_name_than_a_case_may_hold_are_refused() -> None:
    with pytest.raises(RequestError, match=r"^checkpoint: .*200 characters; got 'xxx"):
        case().model_copy(update={"model": "x" * 96 + "/" + "x" * 96}).with_hub_weights("v" * 40)


GENERATION = {"batch_size": 2, "prompt_length": 16, "max_new_tokens": 4}


def test_generation_is_a_case_with_sizes_of_its_own() -> None:
    one = case(training=None, inference=GENERATION)
    assert (one.is_training, one.batch_size, one.sequence_length) == (False, 2, 20)
    longer = one.at(batch_size=1, sequence_length=32)
    assert (longer.batch_size, longer.sequence_length) == (1, 36)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": None}, "training"),
        ({"inference": GENERATION}, "either training or inference"),
        ({"training": None, "inference": {**GENERATION, "max_new_tokens": None}}, "max_new_tokens"),
        ({"training": {"max_length": 16}}, "per_device_train_batch_size"),
        ({"training": {"per_device_train_batch_size": 0, "max_length": 16}}, "per_device_train_batch_size"),
        ({"training": {"per_device_train_batch_size": 1, "max_length": True}}, "max_length"),
        ({"trainer": "axolotl"}, "trainer"),
        ({"quantisation": {}}, "quantisation"),
    ],
)
def test_a_request_without_one_run_in_it_is_refused_by_field(changes: dict[str, object], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        case(**changes)
