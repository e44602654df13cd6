"""Whatever is asked, the answer is an answer or a refusal.

That it takes no memory for good only `make fuzz` judges, which asks as often as it says there: the ordinary run stays below the 1,000
requests of a kind from which `Watch` judges, and says nothing about memory.
"""

import ast
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app import examples
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
from app.trainer_files import opening
from estimator.units import MIB
from tests.app.trainer_files import test_axolotl, test_launchers, test_llamafactory, test_trl
from tests.served import Process, Watch

REQUESTS = int(os.environ.get("VRAMPLAN_FUZZ_REQUESTS", "150"))
CONFIGS = int(os.environ.get("VRAMPLAN_FUZZ_CONFIGS", "40"))
FILES = int(os.environ.get("VRAMPLAN_FUZZ_FILES", "150"))

MAX_GROWTH_BYTES = 16 * MIB
"""In the second half of a run of `make fuzz`. Answers and the steps of recipes are kept, so many and no more, and not all places are taken
by then: one request in sixteen is accepted, and such a one takes 18 kB. A leak of the request itself, 2 kB, comes to more."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A serving process: hypothesis keeps more of every case than the service should, so that its own process tells nothing."""

    process: Process
    client: httpx2.Client
    requests: Watch
    configs: Watch
    files: Watch

    def estimate(self, request: dict[str, Any]) -> httpx2.Response:
        return self.client.post("/v1/estimate", json=request)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with Process(rate_limit="none") as process, httpx2.Client(base_url=process.address, timeout=150) as client:
        requests, configs, files = (Watch(process, MAX_GROWTH_BYTES) for _ in range(3))
        yield Service(process=process, client=client, requests=requests, configs=configs, files=files)
        assert (requests.complaint, configs.complaint, files.complaint) == (None, None, None)


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
def test_a_request_with_any_values_gets_200_or_422(
    service: Service, example: dict[str, Any], changes: list[tuple[tuple[str, str], Any]]
) -> None:
    request = copy.deepcopy(example)
    for (section, name), value in changes:
        target = request.setdefault(section, {}) if section else request
        if isinstance(target, dict):
            target[name] = value
    response = service.estimate(request)
    service.requests.note()
    assert response.status_code in (200, 422), (request, response.text)


@pytest.mark.parametrize(
    ("batch", "length", "steps", "status"),
    [(MAX_BATCH, MAX_LENGTH, 2**4, 200), (2**4, 2**20, MAX_ACCUMULATION, 200), (MAX_BATCH, MAX_LENGTH, MAX_ACCUMULATION, 422)],
)
def test_the_largest_sizes_are_answered_or_refused_together(service: Service, batch: int, length: int, steps: int, status: int) -> None:
    sizes = {"per_device_train_batch_size": batch, "max_length": length, "gradient_accumulation_steps": steps}
    example = next(e["value"] for e in examples.ESTIMATE.values() if "training" in e["value"])
    response = service.estimate({**example, "training": {**example["training"], **sizes}})
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
def test_a_config_with_any_values_gets_200_or_422(service: Service, changes: list[tuple[tuple[str, ...], Any]]) -> None:
    config = copy.deepcopy(TINY)
    for path, value in changes:
        target: Any = config
        for name in path[:-1]:
            target = target.get(name)
        if isinstance(target, dict):
            target[path[-1]] = value
    start = service.process.processor_seconds  # what else the machine does is no matter here
    response = service.estimate({"model": {"config": config}, "dtype": "bfloat16"})
    seconds = service.process.processor_seconds - start
    service.configs.note()
    assert response.status_code in (200, 422), (config, response.text)
    refused_by_bounds = "accepted: " in response.text
    assert seconds < 2 or not refused_by_bounds, (config, seconds, response.text)


def _words() -> list[str]:
    """Every name in the source of those who read trainers' files: keys, and values that mean something."""
    constants = (
        node.value for path in TRANSLATORS.glob("*.py") for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
    )
    return sorted({text.strip(".") for text in constants if isinstance(text, str) and 1 < len(text) < 45 and " " not in text})


TRANSLATORS = Path(opening.__file__).parent
WORDS = _words()
TRAINERS = [
    test_axolotl.QLORA,
    test_llamafactory.QLORA,
    test_trl.QLORA,
    test_launchers.FSDP,
    test_launchers.ZERO3,
    {"peft_type": "LORA", "r": 8},
]
MEANT = VALUES | st.sampled_from(WORDS) | st.dictionaries(st.sampled_from(WORDS), SCALARS, max_size=3)


@settings(max_examples=FILES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(TRAINERS), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 40), st.none() | st.sampled_from(WORDS), MEANT), min_size=1, max_size=4),
)
def test_trainers_files_with_any_values_get_200_or_422(
    service: Service, files: list[dict[str, Any]], changes: list[tuple[int, int, str | None, Any]]
) -> None:
    """Each change sets a key that is there, in the file or in a mapping of it, or one of the words."""
    contents = copy.deepcopy(files)
    for file, place, word, value in changes:
        content = contents[file % len(contents)]
        places = [content, *(inner for inner in content.values() if isinstance(inner, dict))]
        target = places[place % len(places)]
        target[word or [*target, "r"][place % (len(target) + 1)]] = value
    named = [{"name": f"file{number}", "content": content} for number, content in enumerate(contents)]
    response = service.client.post("/v1/convert", json={"files": named})
    service.files.note()
    assert response.status_code in (200, 422), (named, response.text)
