"""Closed forms beside the trace, for a fixed sample of bundled models."""

from statistics import median

import pytest

from calibration.agreement import Cell, cells, small
from estimator.sources.process import Inspector
from estimator.sources.tracing import Tracer

SAMPLE = ("meta-llama/Llama-3.2-1B", "Qwen/Qwen3-0.6B", "google/gemma-2-2b")
METHODS = ("lora", "qlora_prepared")


@pytest.fixture(scope="module")
def found() -> list[Cell]:
    inspector = Inspector(keep_spare=False)
    compared = list(cells(SAMPLE, Tracer(inspector=inspector), inspector, methods=METHODS))
    inspector.close()
    assert all(isinstance(cell, Cell) for cell in compared), compared
    return [cell for cell in compared if isinstance(cell, Cell)]


def test_every_model_is_compared_under_every_recipe(found: list[Cell]) -> None:
    assert len(found) == len(SAMPLE) * len(METHODS) * 2 * 3


def test_closed_forms_agree_with_the_trace_above_the_steady_state(found: list[Cell]) -> None:
    """The vocabulary is small, so that layers decide."""
    differences = [abs(cell.above_steady) for cell in found]
    assert median(differences) <= 0.003
    assert max(differences) <= 0.02


def test_vocabularies_are_made_small_wherever_a_config_names_one() -> None:
    expected = {"vocab_size": 4096, "pad_token_id": 0}
    assert small({"vocab_size": 9, "text_config": {"vocab_size": 9, "pad_token_id": 8}}) == {**expected, "text_config": expected}
