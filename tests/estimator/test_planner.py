"""The searches, against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import RequestError
from estimator.planner import ROUNDING_BYTES, Goal, PlanObjective, divisors, largest_place, lengths, reachable

# Sizes at places: within a program they ascend, but for rounding; between programs anything may be.
JUMPS = st.lists(st.integers(0, 3 * ROUNDING_BYTES), min_size=1, max_size=300)
ROUNDINGS = st.integers(0, ROUNDING_BYTES)


def _sizes(jumps: list[int], rounding: list[int], programs: list[int]) -> np.ndarray:
    sums = dict.fromkeys(range(3), 0)
    found = []
    for jump, extra, program in zip(jumps, rounding, programs, strict=True):
        sums[program] += jump
        found.append(sums[program] + program * 5 * ROUNDING_BYTES + extra)
    return np.array(found, dtype=np.int64)


@given(st.integers(1, 5000))
def test_divisors_are_all_divisors_in_order(number: int) -> None:
    assert list(divisors(number)) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("fan", [1, 64])
@given(st.data(), JUMPS, st.integers(0, 300 * ROUNDING_BYTES))
def test_the_last_place_that_fits_is_found_whatever_programs_and_rounding_do(
    fan: int, data: st.DataObject, jumps: list[int], limit: int
) -> None:
    number = len(jumps)
    rounding = data.draw(st.lists(ROUNDINGS, min_size=number, max_size=number))
    programs = data.draw(st.lists(st.integers(0, 2), min_size=number, max_size=number))
    sizes = _sizes(jumps, rounding, programs)
    fitting = np.flatnonzero(sizes <= limit)
    found = largest_place(np.array(programs), lambda places: sizes[places] - limit, fan=fan)
    assert found == (int(fitting[-1]) if len(fitting) else None)


@given(st.data(), JUMPS, st.integers(0, 300 * ROUNDING_BYTES))
def test_what_is_not_reachable_does_not_fit(data: st.DataObject, jumps: list[int], limit: int) -> None:
    number = len(jumps)
    rounding = data.draw(st.lists(ROUNDINGS, min_size=number, max_size=number))
    programs = data.draw(st.lists(st.integers(0, 2), min_size=number, max_size=number))
    sizes = _sizes(jumps, rounding, programs)
    found = set(reachable(np.array(programs), lambda places: sizes[places] - limit).tolist())
    assert set(np.flatnonzero(sizes <= limit).tolist()) <= found


@given(st.integers(1, 60_000), st.sampled_from([1, 64]))
def test_the_search_asks_few_questions(fitting: int, fan: int) -> None:
    asked: list[int] = []

    def excess(places: np.ndarray) -> np.ndarray:
        asked.append(len(places))
        return (places + 1 - fitting) * 2 * ROUNDING_BYTES

    assert largest_place(np.zeros(65_536, dtype=np.int64), excess, fan=fan) == fitting - 1
    assert len(asked) <= 40 // (1 + 5 * (fan > 1)) + 2


def test_lengths_go_in_steps_up_to_the_limit_and_a_short_limit_is_the_only_one() -> None:
    assert lengths(1, 1, 200).length.tolist() == [64, 128, 192]
    assert lengths(1, 1, 40).length.tolist() == [40]


def test_a_global_batch_that_the_cards_cannot_share_is_refused() -> None:
    with pytest.raises(RequestError, match="not a multiple of 4 GPUs; expected 4 or 8"):
        Goal(
            objective=PlanObjective.LARGEST_MICRO_BATCH,
            micro_batch_size=1,
            gradient_accumulation_steps=1,
            sequence_length=64,
            global_batch_size=6,
            num_gpus=4,
            batch_limit=8,
            length_limit=64,
        )
