"""Settings: fields of a request changed in the request's own spelling."""

from typing import Any

import pytest

from app.reading import read_estimate
from app.settings import applied, joined, spelled

MODEL = "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    ("payload", "setting", "path"),
    [
        ({"torch_dtype": "float32"}, {"dtype": "bfloat16"}, "torch_dtype"),
        ({"training": {"max_seq_length": 512}}, {"training.max_length": 256}, "training.max_seq_length"),
        ({"quantization_config": {"load_in_8bit": True}}, {"quantization": {"load_in_4bit": True}}, "quantization_config"),
        ({"peft_config": {"r": 8}}, {"peft.r": 4}, "peft_config.r"),
        ({"training": {"model_init_kwargs": {"dtype": "float32"}}}, {"dtype": "bfloat16"}, "training.model_init_kwargs.dtype"),
        (
            {"load_in_4bit": True, "bnb_4bit_use_double_quant": False},
            {"quantization.bnb_4bit_use_double_quant": True},
            "bnb_4bit_use_double_quant",
        ),
        ({}, {"training.optim": "adamw_8bit"}, "training.optim"),
        (
            {"quantization": {"load_in_4bit": True}},
            {"quantization.bnb_4bit_use_double_quant": True},
            "quantization.bnb_4bit_use_double_quant",
        ),
    ],
)
def test_a_setting_takes_the_spelling_of_the_request_and_can_be_read(payload: dict[str, Any], setting: dict[str, Any], path: str) -> None:
    own = spelled({"model": MODEL, **payload}, setting)
    assert list(own) == [path]
    plain = read_estimate(applied({"model": MODEL, **payload}, own)).request.model_dump()
    (field, value), *_ = setting.items()
    found: Any = plain
    for name in field.split("."):
        found = found[name]
    assert {k: found[k] for k in value} == value if isinstance(value, dict) else found == value


def test_applying_leaves_the_request_as_it_was() -> None:
    request = {"training": {"optim": "sgd"}}
    assert applied(request, {"training.optim": "adamw_8bit"}) == {"training": {"optim": "adamw_8bit"}}
    assert request == {"training": {"optim": "sgd"}}


def test_settings_of_one_field_cannot_be_joined() -> None:
    assert joined([{"a": 1}, {"b": 2}]) == {"a": 1, "b": 2}
    assert joined([{"a": 1}, {"a": 2}]) is None
    assert joined([{"quantization": {}}, {"quantization.load_in_4bit": True}]) is None
    assert joined([{"dtype": 1}, {"dtype_other": 1}]) == {"dtype": 1, "dtype_other": 1}
