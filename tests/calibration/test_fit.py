"""Fits recover what was planted, refuse what is not determined, and never touch what is exact."""

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean

import pytest

from calibration.comparison import compare
from calibration.fit import MIN_MEASUREMENTS, Row, bugs, contradicted, errors, factors_of, fit, left_out, observations, weighted_median
from calibration.prediction import Prediction
from calibration.record import Environment, Figures, Kind, Outcome, PhasePeak
from estimator.correction import COVERAGE, conformal_radius
from estimator.engine import estimate
from estimator.errors import RequestError
from estimator.fitted import Corrections, Group, Term, bytes_of, corrected, dumped, is_correctable, parsed
from estimator.phases import Basis, Item, Phase
from estimator.units import MIB
from tests.calibration.cases import case
from tests.calibration.test_record import record
from tests.estimator.recipes import inference, model, training

MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B", "mistralai/Mistral-7B-v0.1", "google/gemma-2-2b")
PLANTED = {
    Term.FORWARD_TEMPORARIES: 1.3,
    Term.BACKWARD_TEMPORARIES: 0.8,
    Term.WORKSPACE: 2.0,
    Term.SLACK: 0.5,
    Term.CONTEXT: 1.25,
}
CARD = Environment(
    gpu="NVIDIA A100-SXM4-80GB", compute_capability="8.0", total_bytes=80 * 2**30, torch="2", transformers="5", python="3", system="s"
)


def prediction(name: str, batch: int, length: int, method: str = "qlora") -> Prediction:
    recipe = training(batch, length, method=method)
    return Prediction(recipe=recipe, estimate=estimate(model(name), recipe))


def row(name: str, batch: int, length: int, factors: Mapping[Term, float], method: str = "qlora", **changes: object) -> Row:
    """A record that shows the prediction with each term scaled, as a card would show it."""
    predicted = prediction(name, batch, length, method)
    found = predicted.estimate
    assert found.device_bytes is not None
    workspace = round(factors[Term.WORKSPACE] * predicted.workspace_bytes) - predicted.workspace_bytes
    phases: dict[str, PhasePeak] = {}
    for phase in found.phases:
        term = {Phase.FORWARD: Term.FORWARD_TEMPORARIES, Phase.BACKWARD: Term.BACKWARD_TEMPORARIES}.get(phase.phase)
        growth = 0 if phase.phase is Phase.LOAD else workspace
        if term is not None:
            growth += round((factors[term] - 1) * predicted.modelled_bytes(term))
        phases[phase.phase.value] = PhasePeak(allocated_bytes=phase.allocated_bytes + growth, reserved_bytes=0)
    allocated = max(peak.allocated_bytes for name_, peak in phases.items() if name_ != "load")
    reserved = allocated + round(factors[Term.SLACK] * predicted.modelled_bytes(Term.SLACK))
    figures = Figures(
        loaded_bytes=predicted.loaded_bytes,
        steady_state_bytes=predicted.steady_state_bytes + workspace,
        phases=phases,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=reserved,
        device_bytes=reserved + round(factors[Term.CONTEXT] * predicted.modelled_bytes(Term.CONTEXT)) + found.paged_bytes,
    )
    of = case(training={"per_device_train_batch_size": batch, "max_length": length, "bf16": True}).model_copy(update={"model": name})
    fields: dict[str, object] = {"figures": figures, "environment": CARD, **changes}
    return Row(record=record(of, **fields), prediction=predicted)


def rows(factors: Mapping[Term, float] = PLANTED, models: tuple[str, ...] = MODELS) -> list[Row]:
    return [row(name, batch, length, factors) for name in models for batch in (1, 2, 4) for length in (256, 512, 1024, 2048)]


def test_planted_factors_are_recovered() -> None:
    """The layers' temporaries show at the peak of few of these runs: where logits stand above them there is nothing to read."""
    found = fit(rows(), date="2026-01-01").groups[Group()]
    for term in (Term.WORKSPACE, Term.SLACK, Term.CONTEXT):
        assert found[term].factor == pytest.approx(PLANTED[term], rel=0.001), term
    assert Term.FORWARD_TEMPORARIES in found
    assert found[Term.FORWARD_TEMPORARIES].factor == pytest.approx(PLANTED[Term.FORWARD_TEMPORARIES], rel=0.001)


def mixed(draw: random.Random, num_poisoned: int = 0, noise: float = 0.0) -> list[Row]:
    """Rows that show every term, with noise; some of them show five times as much, or a fifth."""
    sizes = [("qlora", batch, length) for batch in (1, 2, 4) for length in (256, 512, 1024, 2048)] + [("full", 1, 256), ("full", 1, 2048)]
    places = [(name, *size) for name in MODELS for size in sizes]
    poisoned = set(draw.sample(range(len(places)), num_poisoned))
    found = []
    for place, (name, method, batch, length) in enumerate(places):
        wrong = draw.choice((0.2, 5.0)) if place in poisoned else 1.0
        factors = {term: factor * wrong * math.exp(draw.gauss(0, noise)) for term, factor in PLANTED.items()}
        found.append(row(name, batch, length, factors, method))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_tenth_of_poisoned_rows_moves_no_factor_by_3_percent(seed: int) -> None:
    """Six of 56 rows, all terms of them at once, beside noise of 1 % in the rest."""
    found = fit(mixed(random.Random(seed), num_poisoned=6, noise=0.01), date="2026-01-01").groups[Group()]
    assert set(found) == set(Term)
    for term, correction in found.items():
        assert correction.factor == pytest.approx(PLANTED[term], rel=0.03), term


def test_one_coherent_liar_moves_no_factor_by_3_percent() -> None:
    liar = [row(MODELS[3], batch, length, dict.fromkeys(PLANTED, 9.0)) for batch in (1, 2, 4) for length in (256, 512, 1024, 2048)]
    found = fit(rows(models=MODELS[:3]) + liar, date="2026-01-01").groups[Group()]
    for term in (Term.WORKSPACE, Term.SLACK, Term.CONTEXT):
        assert found[term].factor == pytest.approx(PLANTED[term], rel=0.03), term


@pytest.mark.parametrize("few", [rows(models=MODELS[:1]), rows()[: MIN_MEASUREMENTS - 1], []], ids=["one model", "few rows", "nothing"])
def test_what_is_not_determined_is_not_fitted(few: list[Row]) -> None:
    assert fit(few, date="2026-01-01").groups == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": Kind.TRACED},
        {"outcome": Outcome.FAILED},
        {"provenance": record().provenance.model_copy(update={"foreign_before_bytes": 2**30})},
    ],
    ids=["traced", "failed", "shared card"],
)
def test_only_measurements_enter_a_fit(changes: dict[str, object]) -> None:
    others = [row(one.model, one.record.case.batch_size, one.length, PLANTED, **changes) for one in rows()]
    assert fit(others, date="2026-01-01").groups == {}


def test_a_group_without_enough_rows_takes_its_parents_factor() -> None:
    found = fit(rows(), date="2026-01-01")
    elsewhere = Group(compute_capability=(9, 0), transformers=5)
    assert elsewhere not in found.groups
    correction = found.find(elsewhere, Term.SLACK)
    assert correction is not None
    assert correction.factor == found.groups[Group()][Term.SLACK].factor


def test_exact_items_are_never_corrected() -> None:
    predicted = prediction(MODELS[0], 2, 512)
    found, _ = corrected(predicted.estimate, predicted.recipe, fit(rows(), date="2026-01-01"))
    for before, after in zip(predicted.estimate.phases, found.phases, strict=True):
        for old, new in zip(before.items, after.items, strict=True):
            if not is_correctable(old, before):
                assert new == old
            elif new.num_bytes != old.num_bytes:
                assert new.basis is Basis.FITTED


def test_a_corrected_prediction_is_what_was_measured() -> None:
    found = fit(rows(), date="2026-01-01")
    for one in rows():
        estimated, outside = corrected(one.prediction.estimate, one.prediction.recipe, found)
        figures = one.record.figures
        assert figures is not None
        assert figures.device_bytes is not None
        assert estimated.device_bytes == pytest.approx(figures.device_bytes, rel=0.02)
        assert outside == ()


def test_an_answer_beyond_what_was_measured_says_so() -> None:
    found = fit(rows(), date="2026-01-01")
    far = prediction("meta-llama/Llama-3.1-70B", 8, 8192)
    _, outside = corrected(far.estimate, far.recipe, found)
    assert Term.SLACK in outside


def test_errors_of_a_left_out_model_come_from_the_others() -> None:
    """Three models show one slack, the fourth another: left out, it is off by what sets it apart."""
    odd = [row(MODELS[3], batch, length, {**PLANTED, Term.CONTEXT: 5.0}) for batch in (1, 2) for length in (256, 512)]
    found = left_out(rows(models=MODELS[:3]) + odd, lambda one: one.model)
    by_model = {name: [abs(e.device or 0) for e in found if e.row.model == name] for name in MODELS}
    assert min(by_model[MODELS[3]]) > 10 * max(by_model[MODELS[0]])


def test_exact_terms_that_measurements_contradict_are_told_and_not_fitted() -> None:
    honest = row(MODELS[0], 1, 512, PLANTED)
    figures = honest.record.figures
    assert figures is not None
    assert figures.loaded_bytes is not None
    assert list(bugs([honest])) == []
    lighter = figures.model_copy(update={"loaded_bytes": figures.loaded_bytes - 512})
    heavier = figures.model_copy(update={"loaded_bytes": round(figures.loaded_bytes * 1.02)})
    for wrong in (lighter, heavier):
        (bug,) = bugs([replace(honest, record=record(honest.record.case, figures=wrong, environment=CARD))])
        assert (bug.term, bug.measured_bytes, bug.predicted_bytes) == ("loaded", wrong.loaded_bytes, figures.loaded_bytes)


def test_running_out_where_the_prediction_fits_is_told() -> None:
    small = CARD.model_copy(update={"total_bytes": 2 * 2**30})
    in_vain = row(MODELS[0], 1, 512, PLANTED, outcome=Outcome.OOM)
    expected = row(MODELS[0], 1, 512, PLANTED, outcome=Outcome.OOM, environment=small)
    assert list(contradicted([in_vain, expected], None)) == [in_vain]


def test_corrections_survive_a_file() -> None:
    found = fit(rows(), date="2026-01-01")
    assert parsed(dumped(found)) == found


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 2}', dumped(fit(rows(), date="-")).replace('"factor": ', '"factor": -'), '{"format": 1, "version": "x"}'],
    ids=["empty", "list", "another format", "negative factor", "incomplete"],
)
def test_a_file_that_holds_no_corrections_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="corrections"):
        parsed(text)


def test_the_weighted_median_is_where_half_the_weight_lies() -> None:
    assert weighted_median([(1.0, 1), (2.0, 1), (100.0, 1)]) == 2.0
    assert weighted_median([(1.0, 5), (2.0, 1), (3.0, 1)]) == 1.0


def test_intervals_from_left_out_models_reach_their_coverage() -> None:
    """1,000 simulated calibrations of 20 residuals each: how often the next one lies inside."""
    draw = random.Random(11)
    inside = []
    for _ in range(1000):
        residuals = [draw.gauss(0, 0.02) for _ in range(20)]
        radius = conformal_radius(residuals, COVERAGE)
        assert radius is not None
        inside.append(mean(abs(draw.gauss(0, 0.02)) <= radius for _ in range(20)))
    # 20 residuals: the 19th smallest of 21 places, hence 19 / 21 = 90.5 %
    assert mean(inside) == pytest.approx(19 / 21, abs=0.02)


@pytest.mark.slow
def test_intervals_of_whole_calibrations_reach_their_coverage() -> None:
    """1,000 simulated calibrations of 29 models with one row each: fitted, every model left out once, five models never seen judged.

    29 residuals: the 27th smallest of 30 places, hence 90 % exactly.
    """
    draw = random.Random(5)
    pool = [
        row(name, batch, length, {term: factor * math.exp(draw.gauss(0, 0.1)) for term, factor in PLANTED.items()})
        for name in MODELS
        for batch in (1, 2, 3, 4)
        for length in (256, 512, 1024, 2048)
        for _ in range(4)
    ]
    inside = {"allocated": 0, "device": 0}
    for _ in range(1000):
        models = [
            replace(one, record=one.record.model_copy(update={"case": one.record.case.model_copy(update={"model": f"model-{number}"})}))
            for number, one in enumerate(draw.sample(pool, 29 + 5))
        ]
        judging, judged = models[:29], models[29:]
        found = left_out(judging, lambda one: one.model)
        radii = {
            "allocated": conformal_radius([error.allocated for error in found], COVERAGE),
            "device": conformal_radius([error.device for error in found if error.device is not None], COVERAGE),
        }
        fitted = fit_without_residuals(judging)
        for error in errors(judged, fitted):
            for figure, value in (("allocated", error.allocated), ("device", error.device)):
                radius = radii[figure]
                assert radius is not None
                assert value is not None
                inside[figure] += abs(value) <= radius
    for figure, number in inside.items():
        assert number / 5000 == pytest.approx(COVERAGE, abs=0.02), figure


def fit_without_residuals(judging: list[Row]) -> Corrections:
    """The fit of all rows; leaving models out once more would double the work."""
    return Corrections(version="", date="", evidence="", groups=factors_of(tuple(observations(judging))), residuals={})


def test_a_comparison_counts_every_row_once_in_every_way() -> None:
    found = compare(rows(), date="2026-01-01")
    assert len(found.as_modelled) == len(found.in_sample) == len(found.without_model) == len(found.without_length) == 48
    assert found.coverage is not None
    spreads = {one.name: one for one in found.spreads}
    assert spreads["device, fitted, in sample"].median < spreads["device, as modelled"].median


def test_records_of_a_shared_card_are_counted_though_they_count_for_nothing() -> None:
    shared = record().provenance.model_copy(update={"foreign_after_bytes": 2**30})
    found = compare([*rows()[:5], row(MODELS[0], 1, 256, PLANTED, provenance=shared)], date="2026-01-01")
    assert (found.num_shared, len(found.as_modelled)) == (1, 5)


def test_what_is_loaded_leaves_out_what_comes_and_goes_while_loading() -> None:
    predicted = prediction(MODELS[0], 1, 512)
    load = predicted.phase(Phase.LOAD)
    assert load is not None
    assert predicted.loaded_bytes == load.allocated_bytes - bytes_of(load, Item.TEMPORARY)


def test_a_generation_shows_the_context_and_what_is_loaded_and_no_other_term() -> None:
    """Its slack is modelled as a share, where that of training is replayed: one factor cannot stand for both."""
    recipe = inference(prompt=512, new=16)
    predicted = Prediction(recipe=recipe, estimate=estimate(model(MODELS[0]), recipe))
    figures = Figures(
        loaded_bytes=predicted.loaded_bytes - 512,
        steady_state_bytes=1,
        peak_allocated_bytes=predicted.estimate.peak.allocated_bytes,
        peak_reserved_bytes=predicted.estimate.reserved_bytes,
        device_bytes=predicted.estimate.device_bytes,
    )
    of = case(training=None, inference={"batch_size": 1, "prompt_length": 512, "max_new_tokens": 16})
    one = Row(record=record(of, figures=figures, environment=CARD), prediction=predicted)
    assert [(seen.term, seen.ratio) for seen in observations([one])] == [(Term.CONTEXT, 1.0)]
    assert [bug.term for bug in bugs([one])] == ["loaded"]
    (error,) = errors([one], fit(rows(), date="2026-01-01"))
    assert error.allocated == pytest.approx(0, abs=0.01)
    changed, _ = corrected(predicted.estimate, recipe, fit(rows(), date="2026-01-01"))
    assert changed.reserved_bytes - changed.peak.allocated_bytes == pytest.approx(
        predicted.estimate.reserved_bytes - predicted.estimate.peak.allocated_bytes, abs=2 * MIB
    )
