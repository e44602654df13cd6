"""The HTTP face."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
from starlette.testclient import TestClient

from app import examples
from app.http import create_app
from app.reading import MAX_BODY_BYTES


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield client


def assert_problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "errors"} <= set(body)
    assert body["status"] == status
    return body


def unnamed(answer: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Fields of an answer that its schema does not name."""
    if "$ref" in schema:
        return unnamed(answer, schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "anyOf" in schema:
        return [] if answer is None else unnamed(answer, schema["anyOf"][0], schemas)
    if isinstance(answer, list):
        return [name for one in answer for name in unnamed(one, schema["items"], schemas)]
    if not isinstance(answer, dict) or "properties" not in schema:
        return []
    found = [name for name in answer if name not in schema["properties"]]
    return found + [below for name in answer.keys() - set(found) for below in unnamed(answer[name], schema["properties"][name], schemas)]


def test_every_example_of_the_documentation_runs_and_is_answered_in_fields_that_it_names(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    paths, components = document["paths"], document["components"]
    for path in ("/v1/estimate", "/v1/plan", "/v1/check", "/v1/sweep"):
        content = paths[path]["post"]["requestBody"]["content"]["application/json"]
        assert content["examples"]
        for example in content["examples"].values():
            response = client.post(path, json=example["value"])
            assert response.status_code == 200, response.text
            schema = paths[path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
            jsonschema_rs.validate({**schema, "components": components}, response.json())
            assert unnamed(response.json(), schema, components["schemas"]) == []


def test_the_same_question_gets_the_same_answer_and_another_gets_another(client: TestClient) -> None:
    first = client.post("/v1/estimate", json=examples.QLORA)
    again = client.post("/v1/estimate", json=dict(reversed(examples.QLORA.items())))
    assert first.content == again.content
    other = {**examples.QLORA, "training": {**examples.QLORA["training"], "max_length": 1024}}
    assert client.post("/v1/estimate", json=other).json()["peak"] != first.json()["peak"]


def test_a_sweep_comes_as_a_table_and_as_a_picture(client: TestClient) -> None:
    asked = {**examples.QLORA, "sweep": {"per_device_train_batch_size": "1..4", "max_length": [512, 1024]}}
    table = client.post("/v1/sweep?format=csv", json=asked)
    assert table.headers["content-type"] == "text/csv; charset=utf-8"
    assert len(table.text.splitlines()) == 9
    picture = client.post("/v1/sweep?format=svg", json=asked)
    assert picture.headers["content-type"] == "image/svg+xml"
    assert picture.text.startswith("<svg ")
    assert client.post("/v1/sweep?format=pdf", json=asked).status_code == 422


def test_a_plan_without_a_card_lists_cards(client: TestClient) -> None:
    found = client.post("/v1/plan", json={**examples.QLORA, "hardware": None}).json()
    assert found["plan"] is None
    assert found["shortfall"] is None
    assert found["gpus"]


def test_what_the_document_refers_to_stands_in_it(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    named = set(re.findall(r"'\$ref': '([^']+)'", str(document)))
    assert "#/components/schemas/EstimateRequest" in named
    assert named <= {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": NaN}',
        b'{"model": "gpt2", "training": {"max_length": Infinity}}',
        b'{"model": "gpt2", "training": {"max_length": 1e999}}',
        b'{"model": "gpt2", "training": {"max_length": ' + b"9" * 5000 + b"}}",
        b"[" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b"\xff\xfe\x00",
        b'{"model": {"config": {}}}',
        b'{"model": {"config": {"model_type": "llama", "num_hidden_layers": 1000000000}}}',
        b'{"model": "gpt2", "nonsense": 1}',
        b'{"model": "../../etc/passwd"}',
        b'{"model": "openai-community/gpt2", "revision": "../../../x"}',
    ],
)
def test_what_cannot_be_read_is_a_422_problem(client: TestClient, body: bytes) -> None:
    assert_problem(client.post("/v1/estimate", content=body), 422)


def test_a_refusal_names_field_and_value(client: TestClient) -> None:
    body = assert_problem(client.post("/v1/estimate", json={"model": "gpt2", "training": {"per_device_train_batch_size": 0}}), 422)
    assert body["errors"][0]["field"] == "training.per_device_train_batch_size"
    assert "0" in body["errors"][0]["message"]


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"optim": "adamw"}, "training.optim", "training.optim: 'adamw' is not known; accepted: adafactor, "),
        (
            {"optim": "lomo"},
            "training.optim",
            "training.optim: 'lomo' is not modelled, because lomo_optim is no dependency; accepted: adafactor, ",
        ),
        (
            {"optim": "sgd", "optim_args": "momentum"},
            "training.optim_args",
            "training.optim_args: 'momentum' is not accepted; expected text ",
        ),
        (
            {"optim": "sgd", "optim_args": "momentum=x"},
            "training.optim_args",
            "training.optim_args: momentum='x' is not accepted; expected a number from 0 on",
        ),
    ],
)
def test_a_refusal_of_an_optimizer_names_field_value_and_what_is_accepted(
    client: TestClient, fields: dict[str, str], field: str, message: str
) -> None:
    request = {"model": "openai-community/gpt2", "training": {"max_length": 8, **fields}}
    body = assert_problem(client.post("/v1/estimate", json=request), 422)
    (error,) = body["errors"]
    assert error["field"] == field
    assert error["message"].startswith(message)


@pytest.mark.parametrize(
    ("changed", "quantization", "message"),
    [
        ({"num_key_value_heads": 3}, None, "model.config.num_key_value_heads: 3 is out of bounds; accepted: a divisor of "),
        ({"head_dim": 0}, None, "model.config.head_dim: 0 is out of bounds; accepted: an integer from 1 to "),
        (
            {"intermediate_size": 5},
            {"bnb_4bit_quant_storage": "bfloat16"},
            "quantization.bnb_4bit_quant_storage: 'bfloat16' cannot hold model.layers.{}.mlp.gate_proj.weight, which packs into 15 bytes",
        ),
        (
            {"tie_word_embeddings": True},
            {"llm_int8_skip_modules": ["q_proj"]},
            "quantization.llm_int8_skip_modules: ['q_proj'] leaves lm_head to be quantized, which shares the weight of model.embed_tokens",
        ),
    ],
)
def test_what_the_libraries_fail_on_is_refused(
    client: TestClient, changed: dict[str, object], quantization: dict[str, object] | None, message: str
) -> None:
    sizes = {"hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = {"model_type": "llama", **sizes, "vocab_size": 50, "tie_word_embeddings": False, **changed}
    request = {"model": {"config": config}, "quantization": quantization and {"load_in_4bit": True, **quantization}}
    body = assert_problem(client.post("/v1/estimate", json=request), 422)
    (error,) = body["errors"]
    assert error["field"] == message.partition(":")[0]
    assert error["message"].startswith(message)
    assert "accepted" in error["message"]


def test_a_long_body_is_refused(client: TestClient) -> None:
    assert_problem(client.post("/v1/estimate", content=b" " * (MAX_BODY_BYTES + 1)), 413)


def test_a_long_body_of_unknown_length_is_refused(client: TestClient) -> None:
    chunks = (b" " * 65_536 for _ in range(MAX_BODY_BYTES // 65_536 + 2))
    assert_problem(client.post("/v1/estimate", content=chunks), 413)


def test_unknown_paths_and_methods_are_problems(client: TestClient) -> None:
    assert_problem(client.get("/nowhere"), 404)
    assert_problem(client.get("/v1/estimate"), 405)


def test_a_token_is_never_echoed(client: TestClient) -> None:
    token = "hf_canarycanarycanary"
    requests: list[dict[str, Any]] = [
        {"model": "gpt2", token: 1},
        {"model": "gpt2", "dtype": token},
        {"model": "gpt2", "training": {"max_length": token}},
        {**examples.QLORA, "training": {**examples.QLORA["training"], "hub_token": token}},
        {"model": "gpt2", "hardware": {"gpu": token}},
    ]
    for request in requests:
        assert token not in client.post("/v1/estimate", json=request).text


def test_the_catalogue_can_be_listed_and_searched(client: TestClient) -> None:
    models = client.get("/v1/models").json()["models"]
    assert len(models) >= 60
    found = client.get("/v1/models", params={"q": "llama-3.1-8b"}).json()["models"]
    assert "meta-llama/Llama-3.1-8B" in [model["id"] for model in found]


def test_a_model_is_shown_tensor_by_tensor(client: TestClient) -> None:
    model = client.get("/v1/models/meta-llama/Llama-3.1-8B").json()
    assert model["model"]["num_parameters"] == 8_030_261_248
    counted = sum(t["num_parameters"] for t in model["tensors"] if t["role"] == "parameter" and t["tied_to"] is None)
    assert counted == 8_030_261_248


def test_a_query_that_is_not_accepted_is_a_problem_without_the_input(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}


def test_pages_and_answers_carry_security_headers(client: TestClient) -> None:
    for path in ("/", "/healthz", "/nowhere"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_web_process_imports_no_framework_and_stays_small() -> None:
    # not getrusage: its maximum survives fork and exec, so it would be that of the process that runs the tests
    program = """
import pathlib, sys
from starlette.testclient import TestClient
from app import examples
from app.http import create_app
client = TestClient(create_app())
assert client.post("/v1/estimate", json=examples.QLORA).status_code == 200
assert client.get("/").status_code == 200
assert not {"torch", "transformers", "peft", "bitsandbytes"} & set(sys.modules)
status = pathlib.Path("/proc/self/status").read_text()
print(int(status.partition("VmHWM:")[2].split()[0]) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 150


def test_gpus_are_filtered_by_named_parts_and_by_words(client: TestClient) -> None:
    query = {"memory": "24GB..80GB", "bf16": "true", "provider": "runpod", "min_compute_capability": "8.6", "count": "1..8"}
    named = client.get("/v1/gpus", params=query).json()["gpus"]
    words = client.get("/v1/gpus", params={"filter": "24GB..80GB bf16 runpod sm86 1..8"}).json()["gpus"]
    assert named == words
    assert {"rtx4090", "l40s", "h100-sxm"} <= {gpu["id"] for gpu in named}
    assert not {"t4", "a100-80", "rtx4080"} & {gpu["id"] for gpu in named}
    assert all(offer["provider"] == "runpod" for gpu in named for offer in gpu["offers"])


@pytest.mark.parametrize("order", ["memory", "price", "bandwidth"])
def test_gpus_are_sorted_as_asked(client: TestClient, order: str) -> None:
    gpus = client.get("/v1/gpus", params={"sort": order}).json()["gpus"]
    keys = {
        "memory": [gpu["capacity_bytes"] for gpu in gpus],
        "price": [min((o["usd_per_hour"][0] for o in gpu["offers"] if o["usd_per_hour"][1]), default=1e9) for gpu in gpus],
        "bandwidth": [-gpu["memory_bandwidth_bytes_per_second"] for gpu in gpus],
    }
    assert keys[order] == sorted(keys[order])


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"memory": "much"}, "memory"),
        ({"count": "0"}, "count"),
        ({"provider": "nobody"}, "provider"),
        ({"min_compute_capability": "new"}, "min_compute_capability"),
        ({"filter": "abacus"}, "filter"),
        ({"sort": "beauty"}, "sort"),
        ({"bf16": "perhaps"}, "bf16"),
        ({"filter": "x" * 201}, "filter"),
    ],
)
def test_a_filter_that_cannot_be_read_is_a_problem_of_its_field(client: TestClient, query: dict[str, str], field: str) -> None:
    body = assert_problem(client.get("/v1/gpus", params=query), 422)
    assert [error["field"] for error in body["errors"]] == [field]


def test_listing_gpus_asks_no_network(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a request asked for prices")

    monkeypatch.setattr("app.prices.from_gpuhunt", refuse)
    assert client.get("/v1/gpus").status_code == 200


def test_a_key_that_stands_twice_is_refused_by_its_name(client: TestClient) -> None:
    body = b'{"model": "meta-llama/Llama-3.1-8B", "dtype": "bfloat16", "dtype": "float32"}'
    for path in ("/v1/estimate", "/v1/plan", "/v1/check", "/v1/sweep"):
        problem = assert_problem(client.post(path, content=body, headers={"content-type": "application/json"}), 422)
        assert [error["field"] for error in problem["errors"]] == ["dtype"]
