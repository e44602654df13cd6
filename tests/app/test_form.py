"""The form of the page: it stands for a request, and every request has one."""

from typing import Any

import pytest

from app import examples, presets
from app.form import MAX_ADDRESS, Form, fields, global_batch, groups
from app.options import all_options
from app.pasted import canonical
from estimator.errors import RequestError

REQUESTS = {name: shown["value"] for table in (examples.ESTIMATE, examples.PLAN) for name, shown in table.items()}
LORA: dict[str, Any] = {"model": "x", "peft": {"r": 8, "target_modules": ["q_proj", "v_proj"]}, "training": {"max_length": 64}}


def test_every_option_of_the_command_line_has_a_field_of_its_own() -> None:
    assert len(fields()) == len(list(all_options())) == sum(len(group) for group in groups().values())
    assert {field.path for field in fields().values()} == {option.path for option in all_options()}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_survives_its_form_and_its_address(name: str) -> None:
    form = Form.of(REQUESTS[name])
    assert not form["extra"]
    again = Form.submitted(dict(form.values))
    plan = form.plan_fields()
    assert canonical(again.request() | plan).payload | {"hardware": None} == canonical(REQUESTS[name]).payload | {"hardware": None}


@pytest.mark.parametrize(
    "request_",
    [
        {**LORA, "peft": {**LORA["peft"], "rank_pattern": {"q_proj": 4}}},
        {**LORA, "training": {"max_length": 64, "learning_rate": 1e-4, "torch_compile": True}},
        {**LORA, "training": {"max_seq_length": 64, "eval_strategy": "steps", "per_device_eval_batch_size": 4}},
        {**LORA, "model": {"config": {"model_type": "llama", "hidden_size": 64}}},
        {**LORA, "torch_dtype": "float16", "load_in_4bit": True, "stack": {"trl": "0.25", "transformers": "4.57"}},
        {**LORA, "task": {"kind": "dpo"}, "hardware": {"gpu": "t4", "num_gpus": 2, "strategy": "zero2", "deepspeed": {}}},
        {**LORA, "peft": {"r": 8, "target_modules": r".*\.(q|v)_proj"}, "quantization": {"llm_int8_threshold": 0.0}},
        {"model": "x", "training": {}},
        {"model": "x", "trainer": "trl", "training": {}},
    ],
)
def test_what_no_field_stands_for_is_kept(request_: dict[str, Any]) -> None:
    before, after = canonical(request_), canonical(Form.of(request_).request())
    assert after.payload == before.payload
    assert sorted(after.unmodelled) == sorted(before.unmodelled)
    assert sorted(after.ignored) == sorted(before.ignored)
    assert after.evaluation == before.evaluation


def test_an_empty_field_is_absent_from_the_request() -> None:
    assert Form.submitted({"model": "x", "optim": " ", "dtype": ""}).request() == {"model": "x"}


def test_a_field_goes_before_the_same_in_extra() -> None:
    form = Form.submitted({"model": "x", "max_length": "7", "extra": '{"training": {"max_length": 5, "loss_type": "nll"}}'})
    assert form.request()["training"] == {"max_length": 7, "loss_type": "nll"}


@pytest.mark.parametrize("name", ["max_length", "capacity_gib", "load_in_4bit", "extra", "stack"])
def test_what_cannot_be_read_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"^({name}|the request is not JSON)"):
        Form.submitted({"model": "x", name: "many"}).request()


def test_a_model_is_required() -> None:
    with pytest.raises(RequestError, match="model: is required"):
        Form.submitted({"gpu": "t4"}).request()


def test_an_access_token_does_not_get_into_an_address() -> None:
    token = "hf_" + "a1B2" * 8
    with pytest.raises(RequestError) as refused:
        Form.submitted({"model": "x", "revision": token})
    assert token not in str(refused.value)
    form = Form.of({**LORA, "training": {"max_length": 64, "hub_token": token}})
    assert token not in form.query


def test_a_form_too_long_for_an_address_has_none() -> None:
    config = {"model_type": "llama", "id2label": {str(n): "x" * 20 for n in range(MAX_ADDRESS // 20)}}
    assert Form.of({**LORA, "model": {"config": config}}).address is None


def test_a_plan_keeps_the_global_batch_that_the_fields_make_up() -> None:
    # transformers, training_args.py: the global batch is micro-batch × accumulation × ranks that read samples of their own
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert global_batch({"training": sizes}) == 8
    assert global_batch({"training": sizes, "hardware": {"num_gpus": 4, "strategy": "ddp"}}) == 32
    assert global_batch({"training": sizes, "hardware": {"num_gpus": 4, "strategy": "device_map"}}) == 8
    assert global_batch({"training": {"gradient_accumulation_steps": 2}}) is None
    assert Form.of({**LORA, "training": sizes, "global_batch_size": 64}).plan_request()["global_batch_size"] == 64
    assert Form.of({**LORA, "training": sizes}).plan_request()["global_batch_size"] == 8


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_is_recognised_and_keeps_model_card_and_sizes(name: str) -> None:
    form = presets.applied_to(presets.first().edited(per_device_train_batch_size="3", extra='{"training": {"learning_rate": 1}}'), name)
    assert presets.method_of(form) == name
    assert (form["model"], form["gpu"]) == ("meta-llama/Llama-3.1-8B", "rtx4090")
    assert form["per_device_train_batch_size"] == ("3" if presets.PRESETS[name].is_training else "")


def test_a_preset_takes_float16_where_the_card_has_no_bfloat16() -> None:
    form = presets.applied_to(presets.first().edited(gpu="t4"), "qlora")
    assert (form["dtype"], form["bnb_4bit_compute_dtype"], form["fp16"], form["bf16"]) == ("float16", "float16", "true", "")


def test_presets_follow_each_other_without_leaving_anything_behind() -> None:
    first = presets.applied_to(presets.first(), "qlora")
    there_and_back = presets.applied_to(presets.applied_to(first, "full"), "qlora")
    assert there_and_back.request() == first.request()


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(RequestError, match="preset"):
        presets.applied_to(presets.first(), "magic")
