"""Leaving groups out, on sets small enough to be worked out by hand."""

import pytest

from calibration.left_out import Coverage, IdleRow, Refit, Tagged, coverages, one_sided, refits, split


def _idle(model: str, share: float, **other: str) -> IdleRow:
    """100 bytes rest, 200 are the peak, the context takes 10: device memory is 210 and `share` of 100."""
    return IdleRow(
        groups={"model": model, **other},
        measured_peak=200,
        measured_resting=100,
        measured_device=round(210 + 100 * share),
        predicted_peak=200,
        predicted_resting=100,
        outside_allocator=10,
    )


def _tagged(method: str, residual: float, of: str = "class") -> Tagged:
    return Tagged(groups={"method": method}, residual_class=of, residual=residual)


def test_the_idle_share_is_what_lies_idle_of_what_comes_and_goes() -> None:
    assert _idle("a", 0.3).share == pytest.approx(0.3)


def test_a_constant_is_the_median_of_the_rows_of_other_groups() -> None:
    members = [_idle("a", 0.1), _idle("a", 0.2), _idle("a", 0.4), _idle("b", 0.9)]
    without_a, without_b = refits(members)
    assert (without_a.group, without_a.constant) == ("a", pytest.approx(0.9))
    assert (without_b.group, without_b.constant) == ("b", pytest.approx(0.2))


def test_a_group_is_judged_by_the_constant_of_the_others() -> None:
    without_a, without_b = refits([_idle("a", 0.1), _idle("b", 0.5)])
    # a: 220 measured, 210 + 50 predicted; b: 260 measured, 210 + 10 predicted
    assert without_a.errors == pytest.approx([40 / 220])
    assert without_b.errors == pytest.approx([-40 / 260])


def test_the_only_group_of_a_dimension_leaves_nothing_to_set_a_constant_by() -> None:
    assert refits([_idle("a", 0.1), _idle("a", 0.2)]) == [Refit(dimension="model", group="a", constant=None, errors=())]


def test_a_row_without_a_dimension_stays_among_the_others() -> None:
    plain, quantized = _idle("a", 0.1), _idle("a", 0.2, bitsandbytes="0.43.1")
    left = {dimension: (inside, rest) for dimension, _, inside, rest in split([plain, quantized])}
    assert left["bitsandbytes"] == ([quantized], [plain])


def test_coverage_is_counted_with_radii_of_the_other_rows_of_the_class() -> None:
    # The nine of 'b' have a radius of 0.09 (the largest, as 9 residuals are the fewest that have one): 0.05 lies inside, 0.10 does not.
    others = [_tagged("b", 0.01 * (i + 1)) for i in range(9)]
    without_a, without_b = coverages([_tagged("a", -0.05), _tagged("a", 0.10), *others])
    assert without_a == Coverage(dimension="method", group="a", inside=1, outside=1, without_interval=0)
    assert without_a.share == 0.5
    assert without_b == Coverage(dimension="method", group="b", inside=0, outside=0, without_interval=9)
    assert without_b.share is None


def test_no_class_lends_residuals_to_another() -> None:
    others = [_tagged("b", 0.01, of="other") for _ in range(9)]
    without_a, _ = coverages([_tagged("a", 0.0), *others])
    assert without_a.without_interval == 1


def test_a_one_sided_bound_keeps_the_sign() -> None:
    # ⌈0.9 · 10⌉ = 9: the largest of nine; with nineteen, the eighteenth.
    assert one_sided([-0.5, 0.1, 0.0, -0.1, -0.2, 0.02, 0.03, 0.04, 0.05]) == 0.1
    assert one_sided([0.01 * i for i in range(1, 20)]) == pytest.approx(0.18)
    assert one_sided([0.1] * 8) is None
