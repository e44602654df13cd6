"""What strangers measure: physics decides what counts, and no stranger much."""

from dataclasses import replace
from typing import Any

import pytest

from calibration import gate
from calibration.comparison import compare
from calibration.fit import Row, fit
from calibration.gate import Contribution
from calibration.record import Kind, Outcome
from estimator.fitted import Term, group_of
from tests.calibration.test_fit import CARD, MODELS, PLANTED, row

HONEST = {**dict.fromkeys(Term, 1.0)}


def honest_row(**changes: Any) -> Row:
    found = row(MODELS[0], 2, 1024, HONEST)
    figures = found.record.figures
    assert figures is not None
    phases = {name: peak.model_copy(update={"reserved_bytes": peak.allocated_bytes}) for name, peak in figures.phases.items()}
    whole = figures.model_copy(update={"phases": phases, **changes})
    return replace(found, record=found.record.model_copy(update={"environment": CARD, "figures": whole}))


def why(found: Row) -> tuple[str, ...]:
    return gate.reasons(found.record, found)


def test_an_honest_record_counts() -> None:
    assert why(honest_row()) == ()


def test_less_than_the_exact_static_bytes_does_not_count() -> None:
    found = honest_row()
    assert found.record.figures is not None
    assert found.record.figures.loaded_bytes is not None
    (reason,) = why(honest_row(loaded_bytes=found.record.figures.loaded_bytes - 1))
    assert "loaded is exact" in reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peak_reserved_bytes": 81 * 2**30}, "above card"),
        ({"peak_reserved_bytes": 1}, "above reserved peak"),
        ({"run_allocated_bytes": 1}, "above allocated peak of the run"),
        ({"context_bytes": 2**40}, "context"),
        (
            {"peak_allocated_bytes": 70 * 2**30, "peak_reserved_bytes": 71 * 2**30, "run_allocated_bytes": 70 * 2**30},
            "times its prediction",
        ),
    ],
)
def test_what_contradicts_itself_or_the_card_does_not_count(changes: dict[str, int], words: str) -> None:
    assert any(words in reason for reason in why(honest_row(**changes)))


def test_a_card_that_does_not_exist_does_not_count() -> None:
    found = honest_row()
    environment = CARD.model_copy(update={"total_bytes": 2**50})
    record = found.record.model_copy(update={"environment": environment})
    assert any("does not exist" in reason for reason in gate.reasons(record, found))


@pytest.mark.parametrize("changes", [{"kind": Kind.TRACED}, {"outcome": Outcome.FAILED}, {"figures": None}, {"environment": None}])
def test_what_is_no_measurement_does_not_count(changes: dict[str, Any]) -> None:
    found = honest_row()
    assert gate.reasons(found.record.model_copy(update=changes), found)


def test_what_cannot_be_predicted_waits() -> None:
    assert gate.reasons(honest_row().record, None) == ("cannot be predicted, so nothing can be set beside it",)


def rows(factors: dict[Term, float], models: tuple[str, ...]) -> list[Row]:
    return [row(name, batch, length, factors) for name in models for batch, length in ((1, 1024), (2, 2048), (4, 2048))]


def factors_of(found: list[Row]) -> dict[Term, float]:
    corrections = fit(found, date="", with_residuals=False)
    group = group_of(found[0].prediction.recipe)
    return {term: one.factor for term in Term if (one := corrections.find(group, term)) is not None}


def contributed(found: list[Row], who: str, *, is_trusted: bool) -> list[Contribution]:
    return [Contribution(row=one, contributor=who, is_trusted=is_trusted) for one in found]


def test_a_coherent_liar_with_many_models_and_keys_moves_no_factor_beyond_3_percent() -> None:
    honest = rows(PLANTED, MODELS)
    lie = {term: 1.9 * factor for term, factor in PLANTED.items()}
    # Every row under a model name of its own, each with a key of its own.
    lies = [
        replace(one, record=one.record.model_copy(update={"case": one.record.case.model_copy(update={"model": f"liar/{number}"})}))
        for number, one in enumerate(rows(lie, MODELS) * 3)
    ]
    mixed = [
        *(one for number, lying in enumerate(lies) for one in contributed([lying], f"liar {number}", is_trusted=False)),
        *contributed(honest, "operator", is_trusted=True),
    ]
    used = gate.within_influence(mixed)
    assert len({one.model for one in used}) == len(MODELS) + 1
    before, after = factors_of(honest), factors_of(list(used))
    assert before.keys() == after.keys()
    assert len(before) >= 4
    for term, factor in before.items():
        assert after[term] == pytest.approx(factor, rel=0.03), term
    # without the cap the liar would have its way
    assert factors_of([one.row for one in mixed])[Term.CONTEXT] > 1.5 * before[Term.CONTEXT]


def test_ten_percent_of_poison_moves_no_factor_beyond_3_percent() -> None:
    honest = rows(PLANTED, MODELS)
    poisoned = [row(MODELS[0], 2, 1024, {term: 1.8 * factor for term, factor in PLANTED.items()})]
    assert len(poisoned) / len(honest) <= 0.1
    before, after = factors_of(honest), factors_of([*honest, *poisoned])
    for term, factor in before.items():
        assert after[term] == pytest.approx(factor, rel=0.03), term


def test_strangers_alone_put_nothing_in_force() -> None:
    assert gate.within_influence(contributed(rows(PLANTED, MODELS), "stranger", is_trusted=False)) == ()


def test_corrections_that_predict_unseen_models_better_are_accepted() -> None:
    found = compare(rows(PLANTED, MODELS), date="2026-01-01")
    verdict = gate.judge(found)
    assert verdict.is_accepted, verdict.reason
    # against what is in force already and as good, the same fit is accepted; against better ones it is not
    errors = [abs(error.allocated) for error in found.without_model]
    assert gate.judge(found, in_force=errors).is_accepted
    assert not gate.judge(found, in_force=[0.0] * len(errors)).is_accepted or max(errors) <= 1e-4


def test_a_factor_beyond_belief_is_refused() -> None:
    verdict = gate.judge(compare(rows({**PLANTED, Term.CONTEXT: 9.0}, MODELS), date="2026-01-01"))
    assert not verdict.is_accepted
    assert "would be multiplied by" in verdict.reason


def test_without_rows_nothing_is_judged_good() -> None:
    assert not gate.judge(compare([], date="2026-01-01")).is_accepted
