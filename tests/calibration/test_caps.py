"""Recommendations run under a cap: what is tried next, when it ends, and what the runs are taken to say."""

from collections.abc import Callable
from typing import Any

import pytest

from calibration.caps import MAX_RUNS, Proof, Trial, Verdict, proofs, prove, sentence, summary
from calibration.case import Case
from calibration.record import Environment, Kind, Outcome, Record
from tests.calibration.cases import case
from tests.calibration.test_record import record

CAP = 8 * 2**30
HERE = Environment(gpu="NVIDIA A100-SXM4-80GB", torch="2", transformers="5", python="3", system="here")


def trial(planned: int) -> Trial:
    return Trial(card="rtx4060ti-8", planned=planned, case=case().at(batch_size=max(1, planned), cap_bytes=CAP))


def card_for(largest: int) -> Callable[[Case], Record]:
    """A card on which micro-batches up to this one run."""
    return lambda one: record(one, outcome=Outcome.OK if one.batch_size <= largest else Outcome.OOM, environment=HERE)


def proved(planned: int, largest: int, known: tuple[Record, ...] = ()) -> tuple[list[int], Proof]:
    """Which micro-batches were run, and what they say."""
    steps = list(prove(trial(planned), known, card_for(largest)))
    return [one.case.batch_size for one, _ in steps], steps[-1][1]


@pytest.mark.parametrize(
    ("planned", "largest", "run", "verdict", "tightness"),
    [
        (4, 4, [4, 5], Verdict.HELD, 1.0),
        (4, 5, [4, 5, 7, 6], Verdict.HELD, 0.8),
        (4, 10, [4, 5, 7, 11, 9, 10], Verdict.HELD, 0.4),
        (4, 2, [4, 2, 3], Verdict.RAN_OUT, 2.0),
        (1, 0, [1], Verdict.RAN_OUT, None),
        (0, 0, [1], Verdict.HELD, None),
        (0, 1, [1, 3, 2], Verdict.HELD, 0.0),
    ],
)
def test_the_recommendation_comes_first_and_the_true_maximum_is_closed_in_on(
    planned: int, largest: int, run: list[int], verdict: Verdict, tightness: float | None
) -> None:
    ran, proof = proved(planned, largest)
    assert ran == run
    assert (proof.verdict, proof.largest, proof.tightness) == (verdict, largest, tightness)


def test_what_is_known_is_not_run_again() -> None:
    known = tuple(card_for(5)(trial(4).at(size)) for size in (4, 7))
    assert proved(4, 5, known)[0] == [5, 6]
    every = (*known, *(card_for(5)(trial(4).at(size)) for size in (5, 6)))
    assert list(prove(trial(4), every, card_for(5))) == []


def test_runs_under_another_cap_say_nothing() -> None:
    other = card_for(9)(case().at(batch_size=4, cap_bytes=CAP + 1))
    assert proved(4, 4, (other,))[0] == [4, 5]


def test_a_run_that_fails_ends_the_trial_and_decides_nothing() -> None:
    def broken(one: Case) -> Record:
        return record(one, outcome=Outcome.FAILED, environment=HERE)

    ((_, proof),) = list(prove(trial(4), (), broken))
    assert proof.verdict is Verdict.OPEN
    assert summary([proof]).tried == 0


def test_a_recommendation_far_below_the_maximum_ends_too() -> None:
    ran, proof = proved(1, 100_000)
    assert len(ran) == MAX_RUNS
    assert (proof.verdict, proof.largest) == (Verdict.HELD, None)


def test_no_time_left_means_no_run() -> None:
    assert list(prove(trial(4), (), lambda _: None)) == []


def all_records(planned: int, largest: int, **changes: Any) -> list[Record]:
    return [one.model_copy(update=changes) for one, _ in prove(trial(planned), (), card_for(largest))]


def test_proofs_are_read_from_records_alone() -> None:
    (proof,) = proofs([*all_records(4, 5), record()])
    assert (proof.card, proof.planned, proof.largest, proof.verdict) == ("rtx4060ti-8", 4, 5, Verdict.HELD)


def test_cards_and_kinds_are_kept_apart() -> None:
    elsewhere = HERE.model_copy(update={"gpu": "NVIDIA H100"})
    found = proofs([*all_records(4, 5), *all_records(4, 2, environment=elsewhere), *all_records(4, 7, kind=Kind.TRACED)])
    assert sorted((proof.verdict, proof.largest) for proof in found) == [(Verdict.HELD, 5), (Verdict.HELD, 7), (Verdict.RAN_OUT, 2)]


def test_the_summary_counts_what_ran_out_and_how_tight_the_rest_is() -> None:
    found = [proved(planned, largest)[1] for planned, largest in ((4, 4), (4, 5), (4, 2), (0, 0), (0, 1))]
    counted = summary(found)
    assert (counted.tried, counted.ran_out, counted.tightness) == (3, 1, (0.8, 1.0))
    assert (counted.none_fits, counted.wrongly_refused) == (2, 1)
    assert sentence(found, Kind.MEASURED).startswith("measured: 3 recommendations on 1 card sizes, 1 ran out of memory")
    assert "nothing was measured" in sentence(found, Kind.TRACED)
