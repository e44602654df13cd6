"""Which cards fit: the answer to a plan without a card, against plans for each card alone."""

import io
from typing import Any

import pytest
from rich.console import Console

import app.which
from app import examples
from app.plan import plan
from app.reading import read_estimate
from app.service import prepare
from app.terminal import print_which
from estimator.errors import RequestError
from estimator.gpus import Vendor, all_gpus
from estimator.offers import cheapest

REQUEST = {**examples.QLORA, "global_batch_size": 16}
SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length")


def rows(**changes: Any) -> list[dict[str, Any]]:
    result = plan({**REQUEST, "hardware": None, **changes})
    assert result["plan"] is None
    assert result["shortfall"] is None
    return list(result["gpus"])


@pytest.mark.parametrize("objective", ["largest_micro_batch", "longest_sequence", "most_margin"])
def test_every_card_has_the_estimate_of_its_sizes(objective: str) -> None:
    found = rows(objective=objective, hardware={"filter": "1"}, confirm=False)
    assert {row["gpu"] for row in found} == {g.id for g in all_gpus() if g.vendor is Vendor.NVIDIA and not g.is_modified}
    for row in found[::5]:
        training = {**REQUEST["training"], **{name: row[name] for name in SIZES}}
        case = prepare(read_estimate({**examples.QLORA, "training": training, "hardware": {"gpu": row["gpu"]}}))
        alone = case.answerer.estimate(case.recipe)
        assert case.card is not None
        assert row["reserved_basis"] == "modelled"
        assert row["device_bytes"] == alone.quick_device_bytes
        assert row["margin_bytes"] == case.card.usable_bytes - alone.quick_device_bytes
        assert (row["missing_bytes"] == 0) == (row["verdict"] == "fits")


@pytest.mark.parametrize(
    ("objective", "total"),
    [
        ("largest_micro_batch", 16),
        ("longest_sequence", None),
        pytest.param("largest_micro_batch", None, marks=pytest.mark.slow),
        pytest.param("most_margin", 4, marks=pytest.mark.slow),
    ],
)
def test_a_row_that_is_confirmed_says_what_a_plan_for_its_card_says(objective: str, total: int | None) -> None:
    asked = {"objective": objective, "global_batch_size": total, "hardware": {"filter": "10GB..24GB 1"}}
    confirmed = [row for row in rows(**asked) if row["reserved_basis"] == "replayed"]
    assert len(confirmed) > 3
    assert {row["verdict"] for row in confirmed} >= {"fits"}
    for row in confirmed[::3]:
        alone = plan({**REQUEST, **asked, "hardware": {"gpu": row["gpu"]}})
        found = alone["plan"]
        assert (row["verdict"] == "fits") == (found is not None), row["gpu"]
        if found is None:
            fit = alone["shortfall"]["estimate"]["fit"]
            assert (row["verdict"], row["margin_bytes"]) == (fit["verdict"], fit["free_bytes"])
            assert row["missing_bytes"] == alone["shortfall"]["missing_bytes"]
        else:
            assert [row[name] for name in SIZES] == [found[name] for name in SIZES]
            assert row["margin_bytes"] == found["margin_bytes"]


def test_confirming_changes_rows_of_single_cards_alone_and_as_many_as_its_budget_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [row for row in rows(hardware={"filter": "24GB..48GB 2..8"}) if row["reserved_basis"] == "replayed"]
    monkeypatch.setattr(app.which, "MAX_REPLAYS", 1)
    few = [row["reserved_basis"] for row in rows(hardware={"filter": "24GB..80GB 1"})]
    assert {"replayed", "modelled"} == set(few)
    assert few.index("modelled") <= 4  # the first of the list are confirmed


def test_cards_come_in_numbers_and_keep_the_global_batch_together() -> None:
    found = rows()
    assert {row["num_gpus"] for row in found} == {1, 2, 4, 8}
    for row in found:
        assert row["per_device_train_batch_size"] * row["gradient_accumulation_steps"] * row["num_gpus"] == 16
        assert row["strategy"] == ("single" if row["num_gpus"] == 1 else "ddp")


def test_a_global_batch_that_cards_cannot_share_leaves_those_numbers_out() -> None:
    assert {row["num_gpus"] for row in rows(global_batch_size=6)} == {1, 2}


def test_what_fits_comes_first_then_as_asked() -> None:
    order = {"fits": 0, "tight": 1, "does_not_fit": 2}
    for sort, key in (("margin", lambda row: -row["margin_bytes"]), ("memory", lambda row: row["capacity_bytes"])):
        found = rows(sort=sort)
        assert [(order[row["verdict"]], key(row)) for row in found] == sorted((order[row["verdict"]], key(row)) for row in found)
    priced = [row["usd_per_hour"][0] for row in rows() if row["verdict"] == "fits" and row["usd_per_hour"]]
    assert priced == sorted(priced)
    costs = [row["cost"]["usd_per_million_tokens"] for row in rows(sort="cost") if row["cost"]]
    assert costs == sorted(costs)


def test_a_filter_and_a_headroom_hold() -> None:
    for row in rows(hardware={"filter": "24GB..48GB 1..2 bf16", "headroom": "2GiB"}):
        gpu = next(gpu for gpu in all_gpus() if gpu.id == row["gpu"])
        assert 24 <= gpu.label_gb <= 48
        assert gpu.bf16
        assert row["num_gpus"] in (1, 2)
        assert row["margin_bytes"] == gpu.capacity_bytes - 2 * 2**30 - row["device_bytes"]


def test_prices_and_costs_are_those_of_the_cheapest_offer() -> None:
    for row in rows(epoch_tokens=10**7):
        offer = cheapest(row["gpu"], row["num_gpus"])
        assert (row["usd_per_hour"] is None) == (offer is None)
        if offer is None:
            assert row["cost"] is None
            continue
        assert row["usd_per_hour"] == [offer.usd_per_hour_min, offer.usd_per_hour_max]
        if row["cost"] is not None:
            hours = 1e6 / row["speed"]["tokens_per_second"] / 3600
            assert row["cost"]["usd_per_million_tokens"] == pytest.approx(hours * offer.usd_per_hour_min)
            assert row["cost"]["usd_per_epoch"] == pytest.approx(10 * row["cost"]["usd_per_million_tokens"])


@pytest.mark.parametrize(
    ("hardware", "field"),
    [
        ({"filter": "24XB"}, "hardware.filter"),
        ({"filter": "24GB", "gpu": "t4"}, "hardware.filter"),
        ({"headroom": "lots"}, "hardware.headroom"),
        ({"gpu": "t4", "headroom": "100%"}, "hardware.headroom"),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(hardware: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan({**REQUEST, "hardware": hardware})
    assert [error.field for error in caught.value.errors] == [field]


def test_only_a_plan_takes_a_filter() -> None:
    from app.service import answer

    with pytest.raises(RequestError, match="only a plan"):
        answer({**examples.QLORA, "hardware": {"filter": "24GB"}})


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"hardware": {"filter": "300GB..400GB bf16"}}, "hardware.filter", "no card of CUDA meets '300GB..400GB'"),
        ({"hardware": {"filter": "t4 bf16"}}, "hardware.filter", "no card of CUDA meets all of t4, bf16 at once"),
        ({"hardware": {"filter": "amd"}}, "hardware.filter", "no card of CUDA meets 'amd'"),
        ({"hardware": {"filter": "2..4"}, "global_batch_size": 7}, "global_batch_size", r"not shared evenly .* \(2, 4\)"),
    ],
)
def test_an_empty_list_says_what_left_nothing(changes: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        plan({**REQUEST, "hardware": None, **changes})
    assert [error.field for error in caught.value.errors] == [field]


def test_the_table_says_to_spare_of_what_fits_alone_and_marks_what_is_modelled() -> None:
    found = plan({**REQUEST, "hardware": {"filter": "15GB..24GB 1..2"}})
    assert {row["verdict"] for row in found["gpus"]} == {"fits", "tight", "does_not_fit"}
    console = Console(width=200, record=True, file=io.StringIO())
    print_which(console, found)
    _, *lines = console.export_text().splitlines()
    for row, line in zip(found["gpus"], lines, strict=False):
        assert ("to spare" in line) == (row["verdict"] == "fits"), line
        assert ("missing" in line) == (row["verdict"] != "fits"), line
        assert (f"{row['verdict'].replace('_', ' ')}*" in line) == (row["reserved_basis"] == "modelled"), line
    assert any(line.startswith("* modelled") for line in lines)


def test_a_card_that_only_emulates_the_run_s_number_format_is_marked() -> None:
    found = rows(hardware={"filter": "16GB 1"}, confirm=False)
    assert {row["gpu"] for row in found if row["emulates_bfloat16"]} == {
        gpu.id for gpu in all_gpus() if gpu.label_gb == 16 and not gpu.bf16
    }
    output = io.StringIO()
    print_which(Console(file=output, width=200), {"gpus": found})
    assert "° has no bfloat16" in output.getvalue()
    assert output.getvalue().count("°") == 1 + sum(row["emulates_bfloat16"] for row in found)
    halves = {**examples.QLORA["quantization"], "bnb_4bit_compute_dtype": "float16"}
    training = {**REQUEST["training"], "bf16": False, "fp16": True}
    in_halves = rows(hardware={"filter": "16GB 1"}, confirm=False, dtype="float16", quantization=halves, training=training)
    assert not any(row["emulates_bfloat16"] for row in in_halves)
