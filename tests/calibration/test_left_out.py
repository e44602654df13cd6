"""Groups of published rows against the others, on figures worked out by hand."""

from dataclasses import replace
from types import MappingProxyType

import pytest

from calibration.accuracy import Comparison, Pair, compare
from calibration.left_out import axes_of, left_out, told
from calibration.published import CONFIRMED, Run, rows, translate

RUN = next(one for one in map(translate, rows()) if isinstance(one, Run))


def compared(model: str, measured: int, predicted: int = 1000) -> Comparison:
    return Comparison(
        run=replace(RUN, model=model),
        figures=MappingProxyType({"allocated": Pair(measured=measured, predicted=predicted)}),
        residual_class=None,
    )


def test_a_model_is_judged_by_the_rows_of_the_others() -> None:
    """Nine rows of one model, 1 % off, make an interval of ±1 %; a second model's rows, 0.5 % and 2 % off, lie once in it."""
    found = [compared("a", 1010)] * 9 + [compared("b", 1005), compared("b", 1020)]
    by_group = {one.group: one for one in left_out(found, "allocated") if one.axis == "model"}
    other = by_group["b"]
    assert other.radius == pytest.approx(0.00995, abs=1e-5)
    assert (other.num_rows, other.num_inside) == (2, 1)
    assert other.worst == pytest.approx(1000 / 1020 - 1)
    assert (by_group["a"].radius, by_group["a"].num_inside) == (None, None)
    assert "too few others" in told(by_group["a"])
    assert "holds 1 of 2" in told(other)


def test_every_row_is_left_out_once_on_each_axis() -> None:
    found = [compare(one) for one in map(translate, rows()) if isinstance(one, Run)]
    for figure in ("resting", "allocated", "device"):
        groups = list(left_out(found, figure))
        for axis in axes_of(RUN):
            assert sum(one.num_rows for one in groups if one.axis == axis) == len(found)


def test_rules_name_the_code_that_they_come_from() -> None:
    for rule in CONFIRMED:
        assert ".py" in rule.source or ".cpp" in rule.source
        assert rule.where.split(".")[0] in ("estimator", "calibration")
