"""The estimate of speed against published runs: none of them set a constant."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import calibration
from calibration.published import Run, rows, translate
from calibration.published_model import inventory_of
from estimator.gpus import Gpu, find_gpu
from estimator.throughput import JUDGED_GPUS, JUDGED_RANGE, UNJUDGED_RANGE, step_time
from tests.estimator.recipes import model, training

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
    assert {run.gpu.id for row in rows() if row.id in ratios() and isinstance(run := translate(row), Run)} == JUDGED_GPUS


def tokens_per_second(name: str, gpu: Gpu, batch: int, length: int, *, checkpointing: bool) -> float:
    return step_time(model(name), training(batch, length, method="full", checkpointing=checkpointing), gpu).tokens_per_second


# Another trainer on cards side by side, FSDP2 in bfloat16: tokens per second of each card.
# Source: pytorch/torchtitan, docs/performance.md (64 A100 of 80 GB, batch 1 × 8192) and benchmarks/llama3_h100_202412_torchtitan.md (8 H100
# of 2.4 TB/s held to 500 W, batch 2 × 8192).
def test_another_trainer_with_all_layers_checkpointed_lies_within_the_range() -> None:
    low, high = JUDGED_RANGE
    assert low <= tokens_per_second("meta-llama/Meta-Llama-3-70B", find_gpu("a100-80"), 1, 8192, checkpointing=True) / 331 <= high


def test_another_trainer_that_checkpoints_some_layers_lies_between_all_and_none() -> None:
    name, gpu = "meta-llama/Meta-Llama-3-8B", find_gpu("a100-80")
    slow, fast = (tokens_per_second(name, gpu, 1, 8192, checkpointing=on) for on in (True, False))
    assert slow < 2904 < 2973 < fast


def test_another_card_held_below_its_power_lies_within_the_wider_range() -> None:
    low, high = UNJUDGED_RANGE
    gpu = replace(find_gpu("h100-sxm"), memory_bandwidth=2.4e12)
    for checkpointing in (True, False):
        assert low <= tokens_per_second("meta-llama/Llama-3.1-8B", gpu, 2, 8192, checkpointing=checkpointing) / 5762 <= high
