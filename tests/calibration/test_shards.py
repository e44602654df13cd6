"""Shares of a campaign: together they are the whole, each about as dear as the others."""

import pytest

from calibration.case import Case
from calibration.shards import Shard
from estimator.errors import RequestError
from tests.calibration.cases import case

CASES = tuple(case().at(batch_size=size) for size in range(1, 12))


def cost(one: Case) -> float:
    return float(one.batch_size)


def test_shares_are_the_whole_and_no_case_is_in_two() -> None:
    shares = [Shard(number=number, of=3).take(CASES, cost) for number in (1, 2, 3)]
    assert sorted(one.batch_size for share in shares for one in share) == list(range(1, 12))


def test_every_machine_deals_alike_whatever_its_order() -> None:
    share = Shard(number=2, of=3)
    assert share.take(CASES, cost) == share.take(CASES[::-1], cost)


def test_shares_cost_about_the_same() -> None:
    """No more apart than the dearest case."""
    totals = [sum(map(cost, Shard(number=number, of=3).take(CASES, cost))) for number in (1, 2, 3)]
    assert max(totals) - min(totals) <= 11


def test_a_share_is_written_as_number_of_all() -> None:
    assert str(Shard.parse("2/8")) == "2/8"
    for wrong in ("0/4", "5/4", "2", "a/b", "1/0", "-1/2"):
        with pytest.raises(RequestError, match="shard"):
            Shard.parse(wrong)
