"""Declared grids: what they unfold to, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from app.prediction import predict
from calibration import campaign
from calibration.campaign import Campaign, with_layers
from calibration.case import JsonObject
from estimator.errors import RequestError, UnknownNameError
from estimator.fitted import Term
from estimator.phases import Phase
from tests.calibration.cases import LLAMA, QLORA

GRID: dict[str, Any] = {
    "name": "sizes",
    "request": {"model": {"config": LLAMA}, **QLORA},
    "vary": {"training.per_device_train_batch_size": [1, 2], "training.max_length": [16, 32, 64]},
}


def unfolded(**changes: Any) -> Campaign:
    return Campaign.model_validate({"name": "tried", "about": "-", "budget_minutes": 1, "grids": [{**GRID, **changes}]})


def own_config(request: JsonObject) -> JsonObject:
    model = request["model"]
    assert isinstance(model, dict)
    config = model["config"]
    assert isinstance(config, dict)
    return config


def test_every_combination_becomes_a_case() -> None:
    sizes = [(case.batch_size, case.sequence_length) for case in unfolded().cases(own_config)]
    assert sorted(sizes) == [(1, 16), (1, 32), (1, 64), (2, 16), (2, 32), (2, 64)]


def test_a_case_in_two_grids_is_run_once() -> None:
    twice = Campaign.model_validate({"name": "tried", "about": "-", "budget_minutes": 1, "grids": [GRID, {**GRID, "name": "again"}]})
    assert len(twice.cases(own_config)) == 6


def test_other_fields_stay_when_one_is_varied() -> None:
    (first, *_) = unfolded().cases(own_config)
    assert first.training["gradient_checkpointing"] is True
    assert first.request["quantization"] == QLORA["quantization"]


def test_layers_are_cut_at_the_models_own_widths() -> None:
    config = {**LLAMA, "num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"], "eos_token_id": [1, 2]}
    cut = with_layers(config, 2)
    assert (cut["num_hidden_layers"], cut["layer_types"], cut["eos_token_id"]) == (2, ["a", "b"], [1, 2])
    assert cut["hidden_size"] == LLAMA["hidden_size"]
    assert with_layers({"model_type": "gpt2", "n_layer": 12}, 3)["n_layer"] == 3


def test_fields_of_the_config_take_other_values_before_layers_are_cut() -> None:
    (first, *_) = unfolded(config={"vocab_size": 32}, layers=[1]).cases(own_config)
    assert first.config == {**LLAMA, "vocab_size": 32, "num_hidden_layers": 1}


def test_a_grid_whose_libraries_are_not_installed_is_left_out() -> None:
    assert unfolded(needs=["torch"]).cases(own_config)
    without = unfolded(needs=["torch", "no-such-library"])
    assert (without.cases(own_config), without.grids[0].missing) == ((), ("no-such-library",))


@pytest.mark.parametrize("number", [0, 3, -1])
def test_more_layers_than_there_are_is_refused(number: int) -> None:
    with pytest.raises(RequestError, match=f"layers: {number} of 2"):
        with_layers(LLAMA, number)


def test_a_grid_whose_request_is_no_case_is_named() -> None:
    with pytest.raises(RequestError, match=r"campaign tried, grid sizes: training.max_length"):
        unfolded(vary={"training.max_length": [0]}).cases(own_config)


@pytest.mark.parametrize(
    ("text", "told"),
    [("name: x", "about"), ("{name: x, about: y, budget_minutes: -1, grids: []}", "budget_minutes"), ("a: [", "is not YAML")],
)
def test_a_file_that_is_no_campaign_names_what_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RequestError, match=told):
        campaign.read(str(path))


def test_an_unknown_campaign_is_told_which_there_are() -> None:
    with pytest.raises(UnknownNameError, match="smoke"):
        campaign.read("smok")


def test_the_campaigns_that_come_along_run_on_bundled_models_alone() -> None:
    assert {"smoke", "terms", "models"} <= set(campaign.shipped())
    for name in campaign.shipped():
        assert campaign.read(name).cases(), name


def test_terms_shows_each_term_of_the_layers_at_every_point() -> None:
    """Where logits stand above what the layers take in a phase, the phase's peak tells nothing of them."""
    points = [one for one in campaign.read("terms").cases() if (one.config["num_hidden_layers"], one.sequence_length) == (2, 2048)]
    assert len({one.model for one in points}) == 4
    for one in points:
        predicted = predict(one, None)
        for phase, term in ((Phase.FORWARD, Term.FORWARD_TEMPORARIES), (Phase.BACKWARD, Term.BACKWARD_TEMPORARIES)):
            whole = predicted.phase(phase)
            assert whole is not None
            assert predicted.modelled_bytes(term) >= 0.01 * whole.allocated_bytes, (one.model, one.request, term)


def test_smoke_fits_a_card_of_8_gb_by_far() -> None:
    for one in campaign.read("smoke").cases():
        assert predict(one, None).estimate.device_bytes < 4 * 2**30, one.request


def test_the_trainer_of_trl_is_measured_too() -> None:
    for name in ("smoke", "terms", "models"):
        assert {one.trainer for one in campaign.read(name).cases()} == {"transformers", "trl"}


def test_terms_separates_slopes_from_intercepts() -> None:
    """Two depths, two batches and two lengths of each model at least, with everything else equal."""
    seen: dict[str, set[tuple[object, int, int]]] = {}
    for case in campaign.read("terms").cases():
        seen.setdefault(str(case.model), set()).add((case.config["num_hidden_layers"], case.batch_size, case.sequence_length))
    for model, points in seen.items():
        assert all(len({point[axis] for point in points}) >= 2 for axis in range(3)), model
