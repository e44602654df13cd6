"""The figures of the accuracy page are those of the present estimator."""

from typing import Any

import pytest

from calibration.accuracy import compare_all
from calibration.published_evidence import evidence, shipped


@pytest.fixture(scope="module")
def present() -> dict[str, Any]:
    return evidence(*compare_all())


def test_the_shipped_errors_are_those_of_the_present_estimator(present: dict[str, Any]) -> None:
    made = {row["id"]: row["figures"] for row in present["rows"]}
    kept = {row["id"]: row["figures"] for row in shipped()["rows"]}
    assert made.keys() == kept.keys()
    for name, figures in made.items():
        for figure, (measured, predicted) in figures.items():
            assert kept[name][figure][0] == measured
            assert kept[name][figure][1] == pytest.approx(predicted, rel=1e-5), f"{name} {figure}: make it anew"


def test_every_row_is_compared_or_counted_with_a_reason(present: dict[str, Any]) -> None:
    assert [kind["rows"] for kind in present["kinds"]] == [42, 78]
    assert present["not_compared"] == shipped()["not_compared"]
    assert all(one["reason"] for one in present["not_compared"])


def test_coverage_and_bounds_are_those_of_the_present_estimator(present: dict[str, Any]) -> None:
    assert present["coverage"] == shipped()["coverage"]
    assert [one["holds"] for one in present["bounds"]] == [one["holds"] for one in shipped()["bounds"]]
