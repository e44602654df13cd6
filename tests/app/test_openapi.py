"""The OpenAPI document says what the service does: answered cases made from it meet it, and nothing made from it brings the service down.

`make fuzz` runs the same with 20,000 cases.
"""

import os
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance, unsupported_method
from starlette.testclient import TestClient

from app.configuration import Configuration
from app.http import create_app
from tests import mock_hub as mocked

CASES = int(os.environ.get("VRAMPLAN_FUZZ_CASES", "3"))
"""For each operation."""

FOLDER = TemporaryDirectory(prefix="vramplan-fuzz-")
APP = create_app(Configuration(hub_endpoint="http://127.0.0.1:9", rate_limit="none", database_url=f"sqlite:///{FOLDER.name}/state.sqlite3"))
WHOLE = schemathesis.openapi.from_asgi("/openapi.json", APP)
# A trace takes seconds, since the libraries run.
QUICK, TRACES = WHOLE.exclude(path="/v1/trace"), WHOLE.include(path="/v1/trace")


@pytest.fixture(scope="module", autouse=True)
def mock_hub() -> Iterator[None]:
    """A Hub that has no models, in place of one that is down: what is made from the document asks for many."""
    with mocked.serving() as mock, pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            patch.delenv(name, raising=False)
        patch.setattr(APP.state.lookup, "_endpoint", mock.endpoint)
        yield


def answered_as_it_says(case: Any) -> None:
    # The document leaves out what fields mean together, and the names of older versions that are understood as well.
    case.call_and_validate(timeout=150, excluded_checks=[positive_data_acceptance, negative_data_rejection, unsupported_method])


@QUICK.parametrize()
@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES < 100)
def test_what_is_made_from_the_document_is_answered_as_it_says(case: Any) -> None:
    answered_as_it_says(case)


@pytest.mark.slow
@TRACES.parametrize()
@settings(max_examples=max(5, CASES // 50), deadline=None, suppress_health_check=list(HealthCheck))
def test_traces_made_from_the_document_are_answered_as_it_says(case: Any) -> None:
    answered_as_it_says(case)


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


def test_examples_of_answers_are_answers() -> None:
    paths = TestClient(APP).get("/openapi.json").json()["paths"]
    for path in ("/v1/estimate", "/v1/check"):
        operation = paths[path]["post"]
        asked = next(iter(operation["requestBody"]["content"]["application/json"]["examples"].values()))["value"]
        (shown,) = operation["responses"]["200"]["content"]["application/json"]["examples"].values()
        found = TestClient(APP).post(path, json=asked).json()
        assert set(shown["value"]) == set(found)
