"""The searches, against brute force."""

from hypothesis import given
from hypothesis import strategies as st

from estimator.planner import divisors, largest_down_from, largest_of, largest_up_to


@given(st.integers(1, 5000))
def test_divisors_are_all_divisors_in_order(number: int) -> None:
    assert list(divisors(number)) == [d for d in range(1, number + 1) if number % d == 0]


@given(st.lists(st.integers(1, 1000), unique=True), st.integers(0, 1000))
def test_the_largest_candidate_that_fits_is_found(candidates: list[int], limit: int) -> None:
    candidates.sort()
    assert largest_of(candidates, lambda size: size <= limit) == max((c for c in candidates if c <= limit), default=None)


@given(st.integers(1, 3000), st.integers(0, 4000), st.integers(1, 64))
def test_the_largest_size_up_to_a_limit_is_found(limit: int, fitting: int, step: int) -> None:
    found = largest_up_to(limit, lambda size: size <= fitting, step=step)
    assert found == max((s for s in range(step, limit + 1, step) if s <= fitting), default=None)


@given(st.integers(1, 3000), st.integers(0, 4000), st.integers(1, 64))
def test_the_search_from_above_finds_the_same_size(limit: int, fitting: int, step: int) -> None:
    found = largest_down_from(limit, lambda size: size <= fitting, step=step)
    assert found == max((s for s in range(step, limit + 1, step) if s <= fitting), default=None)


@given(st.integers(1, 100_000), st.floats(0.9, 1))
def test_the_search_from_above_asks_few_questions_where_it_begins_close(limit: int, share: float) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit * share

    largest_down_from(limit, fits)
    assert len(asked) <= 2 * (limit // 10 + 2).bit_length()
    assert len(set(asked)) == len(asked)


@given(st.integers(1, 100_000))
def test_the_search_asks_few_questions(fitting: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= fitting

    largest_up_to(100_000, fits)
    assert len(asked) <= 40
