"""Sweeps: every point is the estimate of that run; table and picture say the same."""

import csv
import io
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

import app.sweep
from app import examples
from app.check import check
from app.heatmap import draw
from app.reading import read_estimate
from app.service import prepare
from app.sweep import answer_sweep, axis, csv_of, svg_of, sweep
from estimator.errors import RequestError

SWEEP = {"per_device_train_batch_size": [1, 2, 8], "max_length": "512..2048:512", "r": [8, 64]}


def request(**changes: Any) -> dict[str, Any]:
    return {**examples.QLORA, "sweep": SWEEP, **changes}


def test_every_point_is_the_estimate_of_that_run() -> None:
    found = answer_sweep(sweep(request(confirm=False)))
    assert found["max_length"] == [512, 1024, 1536, 2048]
    assert [grid["r"] for grid in found["grids"]] == [8, 64]
    for grid in found["grids"]:
        for row, batch in enumerate(found["per_device_train_batch_size"]):
            for column, length in enumerate(found["max_length"]):
                training = {**examples.QLORA["training"], "per_device_train_batch_size": batch, "max_length": length}
                asked = {**examples.QLORA, "training": training, "peft": {**examples.QLORA["peft"], "r": grid["r"]}}
                case = prepare(read_estimate(asked))
                alone = case.answerer.estimate(case.recipe)
                assert grid["allocated_bytes"][row][column] == alone.peak.allocated_bytes
                assert grid["device_bytes"][row][column] == alone.quick_device_bytes


def test_the_border_is_the_largest_batch_that_fits_at_each_length() -> None:
    found = answer_sweep(sweep(request()))
    for grid in found["grids"]:
        for column, largest in enumerate(grid["frontier"]):
            fitting = [
                batch for batch, row in zip(found["per_device_train_batch_size"], grid["verdicts"], strict=True) if row[column] == "fits"
            ]
            assert largest == max(fitting, default=None)


def test_the_border_is_what_checks_of_single_runs_say() -> None:
    axes = {"per_device_train_batch_size": [1, 2, 3, 4, 6, 8], "max_length": [1024, 2048, 4096]}
    found = answer_sweep(sweep(request(sweep=axes, hardware={"gpu": "rtx3090"})))
    (grid,) = found["grids"]
    assert grid["frontier_basis"] == ["replayed"] * 3
    assert len(set(grid["frontier"])) > 1
    batches = found["per_device_train_batch_size"]
    for column, (length, largest) in enumerate(zip(found["max_length"], grid["frontier"], strict=True)):
        place = -1 if largest is None else batches.index(largest)
        for row in {max(place, 0), min(place + 1, len(batches) - 1)}:
            training = {**examples.QLORA["training"], "per_device_train_batch_size": batches[row], "max_length": length}
            alone = check({**examples.QLORA, "training": training, "hardware": {"gpu": "rtx3090"}})
            assert grid["verdicts"][row][column] == alone["verdict"], (batches[row], length)


def test_what_the_budget_does_not_reach_is_marked_as_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.sweep, "MAX_REPLAYS", 1)
    (grid,) = answer_sweep(sweep(request(sweep={**SWEEP, "r": [8]})))["grids"]
    assert grid["frontier_basis"] == ["replayed", *["modelled"] * 3]
    (grid,) = answer_sweep(sweep(request(sweep={**SWEEP, "r": [8]}, confirm=False)))["grids"]
    assert grid["frontier_basis"] == ["modelled"] * 4


def test_the_table_has_every_point_in_quoted_cells() -> None:
    text = csv_of(sweep(request()))
    assert all(line.startswith('"') and line.endswith('"') for line in text.splitlines())
    table = list(csv.DictReader(io.StringIO(text)))
    assert len(table) == 3 * 4 * 2
    grids = {grid["r"]: grid for grid in answer_sweep(sweep(request()))["grids"]}
    last = table[-1]
    assert (last["r"], last["per_device_train_batch_size"], last["max_length"]) == ("64", "8", "2048")
    assert int(last["device_bytes"]) == grids[64]["device_bytes"][-1][-1]


def test_the_picture_is_well_formed_and_carries_no_markup_of_a_stranger() -> None:
    found = sweep(request())
    drawn = ET.fromstring(svg_of(found))
    hostile = draw('<script>"&', [(8, found.grids[0][1])], 2**34)
    assert next(iter(ET.fromstring(hostile))).text == '<script>"&'
    assert drawn.tag.endswith("svg")
    labels = [element.text for element in drawn.iter() if element.text]
    assert any("Llama-3.1-8B" in label for label in labels)
    assert len([element for element in drawn.iter() if element.tag.endswith("polyline")]) == 2


def test_a_picture_in_a_page_takes_its_paper_and_ink() -> None:
    found = sweep(request())
    assert "#ffffff" in svg_of(found)
    shown = svg_of(found, standalone=False)
    assert not {"#ffffff", "#000000"} & set(re.findall("#[0-9a-f]{6}", shown))
    assert 'fill="currentColor"' in shown


def test_without_a_card_there_is_no_verdict_and_still_a_picture() -> None:
    found = sweep(request(hardware=None))
    assert answer_sweep(found)["grids"][0]["frontier"] is None
    ET.fromstring(svg_of(found))
    assert csv_of(found)


@pytest.mark.parametrize(
    ("asked", "values"),
    [("1..4", [1, 2, 3, 4]), ("64..256:64", [64, 128, 192, 256]), ([4, 1, 4], [1, 4]), ("8, 2", [2, 8]), (7, [7])],
)
def test_axes_are_numbers_or_ranges(asked: Any, values: list[int]) -> None:
    assert axis("sweep.max_length", asked, 1000) == values


@pytest.mark.parametrize("asked", ["", "4..1", "0..3", "1..5000", "1..3:0", "a", "1..999999999", [], [2000]])
def test_what_is_no_axis_is_refused(asked: Any) -> None:
    with pytest.raises(RequestError) as caught:
        axis("sweep.max_length", asked, 1000)
    assert caught.value.errors[0].field == "sweep.max_length"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"training": None}, "training"),
        ({"peft": None, "quantization": None, "prepare_model_for_kbit_training": None}, "sweep.r"),
        ({"sweep": {"per_device_train_batch_size": "1..1000", "max_length": "1..1000"}}, "sweep"),
        ({"sweep": {"rank": [8]}}, "sweep.rank"),
        ({"sweep": {"max_length": []}}, "sweep.max_length"),
        ({"sweep": {"max_length": ""}}, "sweep.max_length"),
        ({"sweep": {"per_device_train_batch_size": []}}, "sweep.per_device_train_batch_size"),
        ({"sweep": {"per_device_train_batch_size": [65536], "max_length": [16777216]}, "attn_implementation": "eager"}, "sweep"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        sweep(request(**changes))
    assert caught.value.errors[0].field == field
