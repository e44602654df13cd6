"""Whatever is asked, the answer is an answer or a refusal. `make fuzz` asks as often as the number of cases below says there."""

import copy
import os
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from app import examples
from app.http import create_app
from app.request import (
    MAX_ACCUMULATION,
    MAX_BATCH,
    MAX_LENGTH,
    HardwareFields,
    InferenceFields,
    PeftFields,
    QuantizationFields,
    Request,
    TrainingFields,
)

REQUESTS = int(os.environ.get("VRAMPLAN_FUZZ_REQUESTS", "150"))
CONFIGS = int(os.environ.get("VRAMPLAN_FUZZ_CONFIGS", "40"))

CLIENT = TestClient(create_app(), raise_server_exceptions=False)
SECTIONS: dict[str, list[str]] = {
    "": sorted(set(Request.model_fields) - {"model", "revision"}),
    "quantization": sorted(QuantizationFields.model_fields),
    "peft": sorted(PeftFields.model_fields),
    "training": sorted(TrainingFields.model_fields),
    "inference": sorted(InferenceFields.model_fields),
    "hardware": sorted(HardwareFields.model_fields),
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.integers(-2, 70_000),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(
        ["bfloat16", "float32", "auto", "eager", "all-linear", "q_proj", "adafactor", "sgd", "trl", "nf4", "lora_only", "5.0", "t4"]
    ),
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)
FIELDS = st.sampled_from([(section, name) for section, names in SECTIONS.items() for name in names])


@settings(max_examples=REQUESTS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([e["value"] for e in examples.ESTIMATE.values()]), st.lists(st.tuples(FIELDS, VALUES), min_size=1, max_size=3))
def test_a_request_with_any_values_gets_200_or_422(example: dict[str, Any], changes: list[tuple[tuple[str, str], Any]]) -> None:
    request = copy.deepcopy(example)
    for (section, name), value in changes:
        target = request.setdefault(section, {}) if section else request
        if isinstance(target, dict):
            target[name] = value
    response = CLIENT.post("/v1/estimate", json=request)
    assert response.status_code in (200, 422), (request, response.text)


@pytest.mark.parametrize(
    ("batch", "length", "steps", "status"),
    [(MAX_BATCH, MAX_LENGTH, 2**4, 200), (2**4, 2**20, MAX_ACCUMULATION, 200), (MAX_BATCH, MAX_LENGTH, MAX_ACCUMULATION, 422)],
)
def test_the_largest_sizes_are_answered_or_refused_together(batch: int, length: int, steps: int, status: int) -> None:
    sizes = {"per_device_train_batch_size": batch, "max_length": length, "gradient_accumulation_steps": steps}
    example = next(e["value"] for e in examples.ESTIMATE.values() if "training" in e["value"])
    response = CLIENT.post("/v1/estimate", json={**example, "training": {**example["training"], **sizes}})
    assert response.status_code == status, response.text
    if status == 422:
        assert "accepted: up to 17,592,186,044,416 together" in response.json()["errors"][0]["message"]


TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
}
CONFIG_FIELDS = st.sampled_from([*((name,) for name in TINY), ("rope_scaling", "factor"), ("rope_scaling", "rope_type"), ("text_config",)])


@settings(max_examples=CONFIGS, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(CONFIG_FIELDS, VALUES), min_size=1, max_size=3))
def test_a_config_with_any_values_gets_200_or_422(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    config = copy.deepcopy(TINY)
    for path, value in changes:
        target: Any = config
        for name in path[:-1]:
            target = target.get(name)
        if isinstance(target, dict):
            target[path[-1]] = value
    start = time.process_time()  # what else the machine does is no matter here
    response = CLIENT.post("/v1/estimate", json={"model": {"config": config}, "dtype": "bfloat16"})
    seconds = time.process_time() - start
    assert response.status_code in (200, 422), (config, response.text)
    refused_by_bounds = "accepted: " in response.text
    assert seconds < 2 or not refused_by_bounds, (config, seconds, response.text)
