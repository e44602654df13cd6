"""Published runs under FSDP1 on two A100s."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest

from calibration.published import Row, Run, rows, translate
from calibration.published_model import inventory_of
from estimator.engine import estimate
from estimator.parallelism.options import Fsdp, Parallel, Strategy

# Rows of fms-acceleration: without mixed precision and with it, of four stacks.
MISTRAL = ("0010", "0012", "0191", "0193", "0239", "0241", "0299", "0301")
SANTACODER: Mapping[str, float] = {"0002": 0.08, "0004": 0.001, "0183": 0.005, "0185": 0.012}


def _row(number: str) -> Row:
    return next(row for row in rows() if row.id == f"fms-accel-{number}")


def _run(row: Row) -> Run:
    """As if on one card: the translation covers those."""
    assert row.fields["parallelism"] == "FSDP FULL_SHARD"
    found = translate(replace(row, fields=MappingProxyType({**row.fields, "num_gpus": 1, "parallelism": None})))
    assert isinstance(found, Run)
    parallel = Parallel(strategy=Strategy.FSDP, num_gpus=row.fields["num_gpus"], fsdp=Fsdp(version=1))
    return replace(found, recipe=replace(found.recipe, parallel=parallel))


@pytest.mark.parametrize("number", MISTRAL)
def test_the_peak_of_an_update_is_what_was_measured(number: str) -> None:
    """Shards, gradients and states are all there is: the allocator's own figure, to a tenth of a percent."""
    row = _row(number)
    run = _run(row)
    found = estimate(inventory_of(run), run.recipe)
    assert found.peak.allocated_bytes == pytest.approx(row.fields["figure_bytes"], rel=1e-3)


@pytest.mark.parametrize("number", [number for number in MISTRAL if number < "0299"])
def test_gradients_rest_until_the_next_forward_pass(number: str) -> None:
    row = _row(number)
    run = _run(row)
    assert estimate(inventory_of(run), run.recipe).steady_state_bytes == pytest.approx(row.resting_bytes, rel=1e-3)


@pytest.mark.parametrize(("number", "above"), SANTACODER.items())
def test_peaks_in_the_step_are_no_more_than_stated_off(number: str, above: float) -> None:
    """Where logits are largest they are met; at the smallest batch bounds of gathered units and gradients lie above."""
    row = _row(number)
    run = _run(row)
    off = estimate(inventory_of(run), run.recipe).peak.allocated_bytes / row.fields["figure_bytes"] - 1
    assert -0.012 < off < above


@pytest.mark.parametrize("number", ["0034", "0036", "0126", "0128", "0215", "0217", "0251", "0253", "0303", "0305", "0353", "0354"])
def test_runs_with_adapters_hold_the_inputs_of_all_layers_and_their_gradients(number: str) -> None:
    """Of five stacks, with dropout and without, adapters in 32 and 16 bits: the allocator's own figure, to 0.01 %."""
    row = _row(number)
    run = _run(row)
    found = estimate(inventory_of(run), run.recipe)
    assert found.peak.allocated_bytes == pytest.approx(row.fields["figure_bytes"], rel=1e-4)
    assert any(notice.code == "fsdp1_keeps_layer_inputs" for notice in found.notices)
