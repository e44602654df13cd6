"""Recommendations run under a cap: what is tried next, when it ends, and what the runs are taken to say."""

from collections.abc import Callable
from typing import Any

import pytest

from calibration.caps import CACHE_KEPT, MAX_RUNS, Proof, Trial, Verdict, proofs, prove, sentences, summary
from calibration.case import Case
from calibration.record import Environment, Figures, Kind, Outcome, Record
from tests.calibration.cases import case
from tests.calibration.test_record import record

CAP = 8 * 2**30
HERE = Environment(gpu="NVIDIA A100-SXM4-80GB", torch="2", transformers="5", python="3", system="here")


def trial(planned: int, **others: int) -> Trial:
    return Trial(card="rtx4060ti-8", planned={CACHE_KEPT: planned, **others}, case=case().at(batch_size=1, cap_bytes=CAP))


def card_for(largest: int, unpressed: int | None = None) -> Callable[[Case], Record]:
    """A card on which micro-batches up to this one run, and up to another with the allocator's cache kept."""

    def run(one: Case) -> Record:
        if one.batch_size > largest:
            return record(one, outcome=Outcome.OOM, environment=HERE)
        retries = 0 if unpressed is None or one.batch_size <= unpressed else 2
        return record(one, outcome=Outcome.OK, environment=HERE, figures=Figures(num_allocation_retries=retries))

    return run


def proved(planned: int, largest: int, known: tuple[Record, ...] = ()) -> tuple[list[int], Proof]:
    """Which micro-batches were run, and what they say."""
    steps = list(prove(trial(planned), known, card_for(largest)))
    return [one.case.batch_size for one, _ in steps], steps[-1][1][0]


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
    assert (proof.verdict, proof.runs.largest, proof.tightness) == (verdict, largest, tightness)


def test_every_policys_recommendation_is_run_and_both_maxima_are_found() -> None:
    steps = list(prove(trial(4, cache_given_back=7, without=7), (), card_for(largest=9, unpressed=5)))
    assert [one.case.batch_size for one, _ in steps] == [4, 7, 8, 10, 9, 5, 6]
    kept, given_back, without = steps[-1][1]
    assert (kept.runs.largest, kept.runs.largest_unpressed) == (9, 5)
    assert (kept.verdict, kept.tightness, kept.tightness_unpressed) == (Verdict.HELD, 4 / 9, 4 / 5)
    assert (given_back.verdict, given_back.tightness, without.planned) == (Verdict.HELD, 7 / 9, 7)
    assert steps[0][0].provenance.planned_by_policy == {CACHE_KEPT: 4, "cache_given_back": 7, "without": 7}


def test_a_recommendation_that_should_keep_its_cache_and_does_not_is_told() -> None:
    steps = list(prove(trial(6, cache_given_back=6), (), card_for(largest=8, unpressed=5)))
    kept, given_back = steps[-1][1]
    assert (kept.verdict, given_back.verdict) == (Verdict.GAVE_BACK, Verdict.HELD)
    found = summary([kept])
    assert (found.tried, found.ran_out, found.gave_back, found.tightness, found.tightness_unpressed) == (1, 0, 1, (6 / 8,), (6 / 5,))


def test_what_runs_by_giving_its_cache_back_alone_is_not_wrongly_refused_by_a_policy_that_keeps_it() -> None:
    steps = list(prove(trial(0, cache_given_back=0), (), card_for(largest=1, unpressed=0)))
    kept, given_back = steps[-1][1]
    assert (summary([kept]).wrongly_refused, summary([given_back]).wrongly_refused) == (0, 1)


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

    ((_, (proof,)),) = list(prove(trial(4), (), broken))
    assert proof.verdict is Verdict.OPEN
    assert summary([proof]).tried == 0


def test_a_recommendation_far_below_the_maximum_ends_too() -> None:
    ran, proof = proved(1, 100_000)
    assert len(ran) == MAX_RUNS
    assert (proof.verdict, proof.runs.largest) == (Verdict.HELD, None)


def test_no_time_left_means_no_run() -> None:
    assert list(prove(trial(4), (), lambda _: None)) == []


def all_records(planned: int, largest: int, **changes: Any) -> list[Record]:
    return [one.model_copy(update=changes) for one, _ in prove(trial(planned), (), card_for(largest))]


def test_proofs_are_read_from_records_alone() -> None:
    (proof,) = proofs([*all_records(4, 5), record()])
    assert (proof.card, proof.planned, proof.runs.largest, proof.verdict) == ("rtx4060ti-8", 4, 5, Verdict.HELD)


def test_records_from_before_there_were_policies_are_of_the_one_there_was() -> None:
    before = [
        one.model_copy(update={"provenance": one.provenance.model_copy(update={"planned_by_policy": None})}) for one in all_records(4, 5)
    ]
    assert proofs(before) == proofs(all_records(4, 5))


def test_cards_and_kinds_are_kept_apart() -> None:
    elsewhere = HERE.model_copy(update={"gpu": "NVIDIA H100"})
    found = proofs([*all_records(4, 5), *all_records(4, 2, environment=elsewhere), *all_records(4, 7, kind=Kind.TRACED)])
    assert sorted((proof.verdict, proof.runs.largest) for proof in found) == [(Verdict.HELD, 5), (Verdict.HELD, 7), (Verdict.RAN_OUT, 2)]


def test_the_summary_counts_what_ran_out_and_how_tight_the_rest_is() -> None:
    found = [proved(planned, largest)[1] for planned, largest in ((4, 4), (4, 5), (4, 2), (0, 0), (0, 1))]
    counted = summary(found)
    assert (counted.tried, counted.ran_out, counted.tightness) == (3, 1, (0.8, 1.0))
    assert (counted.none_fits, counted.wrongly_refused) == (2, 1)
    (told,) = sentences(found, Kind.MEASURED)
    assert told.startswith("cache_kept, measured: 3 recommendations on 1 card sizes, 1 ran out of memory")
    assert "nothing was measured" in sentences(found, Kind.TRACED)[0]
