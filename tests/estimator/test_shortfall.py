"""Smallest sets of changes, against all sets there are; what each phase lacks."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.correction import required_bytes
from estimator.engine import estimate
from estimator.phases import Phase
from estimator.shortfall import Chosen, minimal_sets, missing_by_phase
from estimator.units import GIB
from tests.estimator.recipes import model, training

SMALL = "HuggingFaceTB/SmolLM2-1.7B"


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=6),
    st.integers(1, 150),
    st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=4),
    st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 5)), st.integers(-50, 50), max_size=4),
)
def test_sets_fit_and_have_no_part_that_fits_whatever_changes_do_to_each_other(
    savings: list[int], lacking: int, apart: set[tuple[int, int]], together: dict[tuple[int, int], int]
) -> None:
    def missing(chosen: Chosen) -> int | None:
        pairs = set(combinations(sorted(chosen), 2))
        if pairs & apart:
            return None
        return lacking - sum(savings[n] for n in chosen) - sum(together.get(pair, 0) for pair in pairs)

    def fits(chosen: Chosen) -> bool:
        lacks = missing(chosen)
        return lacks is not None and lacks <= 0

    found = minimal_sets(missing, order=range(len(savings)))
    assert len(set(found)) == len(found) <= 4
    for chosen in found:
        assert len(chosen) > 1
        assert fits(chosen)
        assert not any(fits(frozenset(part)) for size in range(len(chosen)) for part in combinations(chosen, size))
    assert [len(chosen) for chosen in found] == sorted(map(len, found))


@given(st.lists(st.integers(1, 60), min_size=2, max_size=6), st.integers(61, 150))
def test_where_savings_add_up_a_set_is_found_if_there_is_one(savings: list[int], lacking: int) -> None:
    found = minimal_sets(lambda chosen: lacking - sum(savings[n] for n in chosen), order=range(len(savings)))
    assert bool(found) == (sum(savings) >= lacking)


def test_what_is_missing_in_the_peak_is_what_the_run_lacks_and_other_phases_lack_less() -> None:
    recipe = training(method="full", length=1024)
    found = estimate(model(SMALL), recipe)
    required = required_bytes(found.quick_device_bytes, None)
    usable = required - 3 * GIB
    lacking = missing_by_phase(recipe, found, peak_required_bytes=required, usable_bytes=usable)
    assert lacking[found.peak.phase] == 3 * GIB == max(lacking.values())
    assert Phase.LOAD not in lacking
    assert not missing_by_phase(recipe, found, peak_required_bytes=required, usable_bytes=required)


@pytest.mark.parametrize("phase", [Phase.LOAD, Phase.FORWARD, Phase.BACKWARD])
def test_a_phase_lacks_its_own_bytes_when_hardly_anything_is_usable(phase: Phase) -> None:
    recipe = training(method="full", length=1024)
    found = estimate(model(SMALL), recipe)
    own = next(p.allocated_bytes for p in found.phases if p.phase is phase)
    lacking = missing_by_phase(recipe, found, peak_required_bytes=required_bytes(found.quick_device_bytes, None), usable_bytes=0)
    assert lacking[phase] > own
