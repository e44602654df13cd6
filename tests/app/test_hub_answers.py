"""Models of the Hub through the service: what it answers when the Hub does, and when it does not."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from app import examples
from app.configuration import Configuration
from app.http import create_app
from tests import mock_hub as mocked
from tests.mock_hub import COMMIT, CONFIG, MockHub


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with mocked.serving() as mock:
        yield mock


@pytest.fixture
def client(mock: MockHub) -> TestClient:
    settings: dict[str, Any] = {"hub_endpoint": mock.endpoint, "hub_file_hosts": (mock.file_endpoint,), "hub_timeout_seconds": 2.0}
    return TestClient(create_app(Configuration(**settings)), raise_server_exceptions=False)


def codes(answer: dict[str, Any]) -> set[str]:
    return {warning["code"] for warning in answer["warnings"]}


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("missing", 404), ("private", 404), ("no-revision", 404), ("no-config", 404), ("gated", 403), ("html", 502), ("huge", 502),
        ("elsewhere", 502), ("circle", 502), ("broken", 422), ("hostile", 422), ("down", 503), ("dripping", 503), ("hanging", 503),
        ("busy", 503),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_has_a_status_of_its_own(client: TestClient, name: str, status: int) -> None:
    start = time.monotonic()
    response = client.post("/v1/estimate", json={"model": f"owner/{name}"})
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["errors"][0]["field"] in ("model", "revision", "model.config", "model.config.num_hidden_layers")
    assert ("retry-after" in response.headers) == (status == 503)
    assert time.monotonic() - start < 6
    assert "HF_TOKEN" not in response.text


@pytest.mark.parametrize("fault", ["down", "hanging", "refusing"])
def test_bundled_models_and_pasted_configs_are_answered_without_the_hub(mock: MockHub, client: TestClient, fault: str) -> None:
    mock.status, mock.hangs = (503 if fault == "down" else None), fault == "hanging"
    if fault == "refusing":
        client = TestClient(create_app(Configuration(hub_endpoint="http://127.0.0.1:9")), raise_server_exceptions=False)
    assert client.post("/v1/estimate", json={"model": "owner/other"}).status_code == 503
    assert client.post("/v1/estimate", json=examples.QLORA).status_code == 200
    assert client.post("/v1/estimate", json={"model": {"config": CONFIG}}).status_code == 200
    assert client.get("/v1/models/meta-llama/Llama-3.1-8B").status_code == 200


def test_a_config_from_before_is_marked_while_the_hub_is_down(mock: MockHub) -> None:
    app = create_app(Configuration(hub_endpoint=mock.endpoint, hub_fresh_seconds=0))
    client = TestClient(app, raise_server_exceptions=False)
    fresh = client.post("/v1/estimate", json={"model": "owner/public"}).json()
    mock.status = 502
    stale = client.post("/v1/estimate", json={"model": "owner/public"}).json()
    assert (fresh["model"]["revision"], stale["model"]["revision"]) == (COMMIT, COMMIT)
    assert codes(stale) - codes(fresh) == {"stale_config"}


# Layers as AutoGPTQ and AutoAWQ pack them: 8 weights of 4 bits an int32, one scale for a group of 64 rows.
def gptq(num_in: int, num_out: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.zeros(num_in // 8, num_out, dtype=torch.int32),
        "qzeros": torch.zeros(num_in // 64, num_out // 8, dtype=torch.int32),
        "scales": torch.zeros(num_in // 64, num_out, dtype=torch.float16),
        "g_idx": torch.zeros(num_in, dtype=torch.int32),
    }


def awq(num_in: int, num_out: int) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.zeros(num_in, num_out // 8, dtype=torch.int32),
        "qzeros": torch.zeros(num_in // 64, num_out // 8, dtype=torch.int32),
        "scales": torch.zeros(num_in // 64, num_out, dtype=torch.float16),
    }


def fp8(num_in: int, num_out: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.zeros(num_out, num_in, dtype=torch.float8_e4m3fn),
        "weight_scale_inv": torch.zeros(1, 1, dtype=torch.float32),
    }


def checkpoint(layer: Any) -> dict[str, torch.Tensor]:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(100, 64, dtype=torch.float16),
        "lm_head.weight": torch.zeros(100, 64, dtype=torch.float16),
    }
    for index in range(2):
        for name, (num_in, num_out) in {"mlp.gate_proj": (64, 96), "self_attn.q_proj": (64, 64)}.items():
            tensors |= {f"model.layers.{index}.{name}.{leaf}": tensor for leaf, tensor in layer(num_in, num_out).items()}
    return tensors


@pytest.mark.parametrize(("method", "layer"), [("gptq", gptq), ("awq", awq), ("fp8", fp8)])
def test_a_quantized_checkpoint_takes_what_its_files_store(mock: MockHub, client: TestClient, method: str, layer: Any) -> None:
    tensors = checkpoint(layer)
    mock.repositories[method] = {
        "config.json": json.dumps({**CONFIG, "torch_dtype": "float16", "quantization_config": {"quant_method": method}}).encode(),
        "model.safetensors": mocked.safetensors(tensors),
    }
    answer = client.post("/v1/estimate", json={"model": f"owner/{method}"}).json()
    stored = sum(tensor.nbytes for tensor in tensors.values())
    assert answer["model"]["checkpoint"] == {
        "quantization": method, "basis": "safetensors headers", "stored_bytes": stored, "num_tensors": len(tensors), "num_files": 1,
    }  # fmt: skip
    # what `memory_allocated` counts: every tensor rounded up to 512 bytes
    weights = sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors.values())
    assert {item["name"]: item["bytes"] for item in answer["phases"][0]["items"]} == {"weights": weights}
    # the class has all of its parameters, however they are packed
    assert answer["model"]["num_parameters"] == 2 * 100 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    assert "sizes_from_headers" in codes(answer)
    inference = client.post("/v1/estimate", json={"model": f"owner/{method}", "inference": {}}).json()
    assert inference["peak"] is None
    assert "not_modelled" in codes(inference)


def test_a_quantized_checkpoint_without_headers_is_answered_for_dequantized_and_says_so(mock: MockHub, client: TestClient) -> None:
    mock.repositories["gptq"] = {"config.json": json.dumps({**CONFIG, "quantization_config": {"quant_method": "gptq"}}).encode()}
    answer = client.post("/v1/estimate", json={"model": "owner/gptq"}).json()
    assert "checkpoint" not in answer["model"]
    assert "sizes_from_headers" not in codes(answer)
    assert "gptq" in json.dumps(answer["warnings"])


def test_a_bitsandbytes_checkpoint_is_modelled_and_its_stored_bytes_are_told(mock: MockHub, client: TestClient) -> None:
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    tensors = {"model.layers.0.mlp.gate_proj.weight": torch.zeros(64 * 96 // 2, 1, dtype=torch.uint8)}
    mock.repositories["bnb"] = {
        "config.json": json.dumps({**CONFIG, "quantization_config": quantization}).encode(),
        "model.safetensors": mocked.safetensors(tensors),
    }
    answer = client.post("/v1/estimate", json={"model": "owner/bnb", "peft": {"r": 8, "target_modules": ["q_proj"]}}).json()
    assert answer["model"]["checkpoint"]["quantization"] == "bitsandbytes"
    assert answer["model"]["checkpoint"]["stored_bytes"] == 64 * 96 // 2
    assert answer["recipe"]["quantization"]["bnb_4bit_quant_type"] == "nf4"


def test_a_repository_with_own_code_is_answered_from_headers_and_nothing_is_adapted(mock: MockHub, client: TestClient) -> None:
    tensors = checkpoint(lambda num_in, num_out: {"weight": torch.zeros(num_out, num_in, dtype=torch.float16)})
    config = {
        **CONFIG,
        "model_type": "strange",
        "architectures": ["StrangeForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
    }
    mock.repositories["strange"] = {"config.json": json.dumps(config).encode(), "model.safetensors": mocked.safetensors(tensors)}
    ask: dict[str, Any] = {"model": "owner/strange", "dtype": "float32"}
    answer = client.post("/v1/estimate", json=ask).json()
    assert answer["model"]["num_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert answer["phases"][0]["allocated_bytes"] == sum(-(-4 * tensor.numel() // 512) * 512 for tensor in tensors.values())
    assert {"sizes_from_headers"} <= codes(answer)
    assert "own_code_not_run" not in codes(answer)
    training = {"per_device_train_batch_size": 1, "max_length": 64}
    trained = client.post("/v1/estimate", json={**ask, "training": training}).json()
    assert trained["peak"] is None
    for refused in (
        {"peft": {"r": 8}},
        {"quantization": {"load_in_4bit": True}},
        {"training": training, "task": {"kind": "classification"}},
        {"training": training, "engine": "trace"},
    ):
        assert client.post("/v1/estimate", json={**ask, **refused}).status_code == 422
    for path in ("plan", "check", "sweep", "trace"):
        response = client.post(f"/v1/{path}", json={**ask, "training": training, "hardware": {"gpu": "t4"}})
        assert response.status_code in (200, 422), (path, response.text)
    assert client.get("/v1/models/owner/strange").status_code == 200
