"""The estimate of speed against published runs: none of them set a constant."""

import json
from functools import cache
from pathlib import Path

import calibration
from calibration.published import Run, rows, translate
from calibration.published_model import inventory_of
from estimator.throughput import JUDGED_GPUS, JUDGED_RANGE, step_time

_FILE = Path(calibration.__file__).parent / "measurements" / "published" / "throughput.json"


@cache
def ratios() -> dict[str, float]:
    """Measured time over estimated time of every published run that can be translated, by row."""
    measured = json.loads(_FILE.read_text(encoding="utf-8"))["tokens_per_second"]
    found = {}
    for row in rows():
        run = translate(row) if row.id in measured else None
        if isinstance(run, Run):
            found[row.id] = step_time(inventory_of(run), run.recipe, run.gpu).tokens_per_second / measured[row.id]
    return found


def test_every_published_run_lies_within_the_range_that_is_shown() -> None:
    low, high = JUDGED_RANGE
    assert len(ratios()) == 42
    assert all(low <= ratio <= high for ratio in ratios().values()), sorted(ratios().items(), key=lambda item: item[1])


def test_the_range_is_no_wider_than_the_runs_ask_for() -> None:
    low, high = JUDGED_RANGE
    assert min(ratios().values()) - low < 0.01
    assert high - max(ratios().values()) < 0.01


def test_the_median_run_is_met_within_6_percent() -> None:
    ordered = sorted(ratios().values())
    assert abs(ordered[len(ordered) // 2] - 1) < 0.06


def test_the_runs_are_those_of_the_cards_that_count_as_judged() -> None:
    assert {run.gpu.id for row in rows() if row.id in ratios() and isinstance(run := translate(row), Run)} <= JUDGED_GPUS
