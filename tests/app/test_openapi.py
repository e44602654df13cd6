"""The OpenAPI document says what the service does: answered cases made from it meet it, and nothing made from it brings the service down.

`make fuzz` runs the same with 20,000 cases, and only there is memory judged, of operations with 1,000 cases and more: not of `/v1/trace`.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance, unsupported_method
from starlette.testclient import TestClient

from app import examples
from app.configuration import Configuration
from app.http import create_app
from estimator.units import MIB
from tests import mock_hub as mocked
from tests.app.test_http import unnamed
from tests.served import Process, Watch

CASES = int(os.environ.get("VRAMPLAN_FUZZ_CASES", "3"))
"""For each operation."""

MAX_GROWTH_BYTES = 8 * MIB
"""In the second half of an operation's cases in `make fuzz`, of which few are accepted; see `test_robustness`, where a smaller leak
shows."""

APP = create_app(Configuration(hub_endpoint="http://127.0.0.1:9", rate_limit="none", database_url="none"))
WHOLE = schemathesis.openapi.from_dict(TestClient(APP).get("/openapi.json").json())
# A trace takes seconds, since the libraries run.
QUICK, TRACES = WHOLE.exclude(path="/v1/trace"), WHOLE.include(path="/v1/trace")


@dataclass(frozen=True, kw_only=True)
class Service:
    """A serving process with a Hub that has no models: what is made from the document asks for many."""

    process: Process
    watches: defaultdict[str, Watch]
    """By operation."""

    def answers_as_it_says(self, case: Any) -> None:
        # The document leaves out what fields mean together, and the names of older versions that are understood as well.
        left_out = [positive_data_acceptance, negative_data_rejection, unsupported_method]
        case.call_and_validate(base_url=self.process.address, timeout=150, excluded_checks=left_out)
        self.watches[case.operation.label].note()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with mocked.serving() as mock, TemporaryDirectory(prefix="vramplan-fuzz-") as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        settings = {"hub_endpoint": mock.endpoint, "rate_limit": "none", "allowed_hosts": "*"}
        with Process(database_url=f"sqlite:///{folder}/state.sqlite3", **settings) as process:
            watches = defaultdict[str, Watch](lambda: Watch(process, MAX_GROWTH_BYTES))
            yield Service(process=process, watches=watches)
            assert {label: told for label, watch in watches.items() if (told := watch.complaint) is not None} == {}


@QUICK.parametrize()
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES < 100)
def test_what_is_made_from_the_document_is_answered_as_it_says(case: Any, service: Service) -> None:
    service.answers_as_it_says(case)


@pytest.mark.slow
@TRACES.parametrize()
@settings(max_examples=max(5, CASES // 50), deadline=None, suppress_health_check=list(HealthCheck))
def test_traces_made_from_the_document_are_answered_as_it_says(case: Any, service: Service) -> None:
    service.answers_as_it_says(case)


def test_every_operation_documents_its_errors_as_problems() -> None:
    document = TestClient(APP).get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            codes = set(operation["responses"])
            assert {"503"} <= codes, path
            assert path in ("/healthz", "/readyz") or {"422", "429"} <= codes, path
            assert method != "post" or {"413"} <= codes, path
            for code, response in operation["responses"].items():
                content = response["content"]
                assert list(content) == ["application/problem+json"] if int(code) >= 400 else "application/json" in content
            assert operation["summary"]


def test_every_operation_shows_what_it_answers_and_what_it_is_asked() -> None:
    document = TestClient(APP).get("/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            contents = [response["content"]["application/json"] for code, response in operation["responses"].items() if code < "300"]
            if method == "post" and path != "/v1/calibrations":
                asked = operation["requestBody"]["content"]["application/json"]
                assert set(asked["schema"]) == {"$ref"}
                assert asked["examples"], path
            for content in contents:
                (shown,) = content["examples"].values()
                schema = content["schema"]
                jsonschema_rs.validate({**schema, "components": document["components"]}, shown["value"])
                assert unnamed(shown["value"], schema, document["components"]["schemas"]) == [], path
                name = schema["$ref"].rpartition("/")[2]
                assert set(shown["value"]) >= set(document["components"]["schemas"][name]["required"])


def test_what_is_listed_and_converted_is_in_fields_that_the_document_names() -> None:
    client = TestClient(APP)
    document = client.get("/openapi.json").json()
    (trainer_file,) = examples.CONVERT.values()
    answers = {
        ("get", "/v1/models"): client.get("/v1/models"),
        ("get", "/v1/models/{model_id}"): client.get("/v1/models/google/gemma-2-2b"),
        ("get", "/v1/gpus"): client.get("/v1/gpus"),
        ("get", "/readyz"): client.get("/readyz"),
        ("post", "/v1/convert"): client.post("/v1/convert", json={**trainer_file["value"], "write": "llamafactory"}),
    }
    for (method, path), response in answers.items():
        assert response.status_code == 200, response.text
        schema = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema_rs.validate({**schema, "components": document["components"]}, response.json())
        assert unnamed(response.json(), schema, document["components"]["schemas"]) == []


def test_fields_that_the_command_line_explains_are_explained_in_the_document() -> None:
    schemas = TestClient(APP).get("/openapi.json").json()["components"]["schemas"]
    assert schemas["EstimateRequest"]["properties"]["pytorch_cuda_alloc_conf"]["description"] == "The environment variable of the run."
    assert schemas["PeftFields"]["properties"]["r"]["description"] == "rank"
    assert schemas["PlanRequest"]["properties"]["policy"]["description"].startswith("Whether a plan for one card leaves room")
    without = [field for field, one in schemas["HardwareFields"]["properties"].items() if "description" not in one]
    assert without == []
