"""The pages beside the form: accuracy and methods."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import estimator
from app.http import create_app
from app.methods import subjects
from calibration.published import rows


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield client


def test_the_accuracy_page_names_every_row_that_is_compared_and_counts_the_others(client: TestClient) -> None:
    text = client.get("/accuracy").text
    # calibration/measurements/published: 42 runs of fms-accel and 78 of optimum-benchmark are compared
    assert "120 rows" in text
    assert f"{len(rows()) - 120} rows" in text
    assert all(f'<th scope="row">{row.id}</th>' in text for row in rows() if row.id in ("fms-accel-0069", "optimum-bench-llama-0001"))


def test_the_methods_page_shows_every_source_that_the_arithmetic_names() -> None:
    root = Path(estimator.__file__).parent
    paths = [path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in ("introspect", "sources")]
    shown = sum(len(subject.rules) for subject in subjects())
    assert shown >= 0.97 * sum(path.read_text().count("Source:") for path in paths)
    assert all(rule.source for subject in subjects() for rule in subject.rules)


def test_a_source_is_shown_with_the_formula_that_it_stands_in(client: TestClient) -> None:
    # estimator/units.py, allocated: torch, c10/cuda/CUDACachingAllocator.cpp, round_size
    (units,) = [subject for subject in subjects() if subject.name == "units"]
    rule = next(rule for rule in units.rules if rule.name == "allocated")
    assert rule.source == "torch, c10/cuda/CUDACachingAllocator.cpp, round_size."
    assert rule.says == "Size of one tensor as `torch.cuda.memory_allocated` counts it."
    assert rule.source in client.get("/methods").text


def test_the_pages_beside_hold_to_the_same_policy(client: TestClient) -> None:
    for path in ("/accuracy", "/methods"):
        response = client.get(path)
        assert response.status_code == 200
        assert "unsafe" not in response.headers["content-security-policy"]
        assert "<script" not in response.text
        assert " style=" not in response.text
