"""Resting memory of published runs: every byte of it follows from sizes."""

import pytest

from calibration.published import BATCH_BYTES_PER_TOKEN, Run, rows, translate
from calibration.published_model import inventory_of, with_vocabulary
from estimator.device import workspace_bytes, workspaces_bytes
from estimator.engine import estimate, weights_growth_bytes
from estimator.loading import unsplit_bytes
from estimator.sources.resolve import resolve
from estimator.static_memory import static_memory
from estimator.units import MIB

RUNS = tuple(one for one in map(translate, rows()) if isinstance(one, Run) and one.row.resting_bytes is not None)
BUNDLED = [run for run in RUNS if run.config is None]

# Packed weights of 8 MiB in freed blocks of 8.75 and 9: the allocator does not split off what is left, and counts it.
UNSPLIT = {"fms-accel-0069", "fms-accel-0071"}
# The loss, its running sum and the gradients' norm, which every run keeps.
_SCALARS_BYTES = 3 * 512
_WORKSPACE_BYTES = workspace_bytes((8, 0))


def _predicted(run: Run) -> int:
    static = static_memory(inventory_of(run), run.recipe)
    batch_bytes = BATCH_BYTES_PER_TOKEN * run.tokens
    return static.loaded_bytes + static.optimizer_states_bytes + workspaces_bytes((8, 0), training=True) + batch_bytes


@pytest.mark.parametrize("run", BUNDLED, ids=lambda run: run.row.id)
def test_resting_memory_of_mistral_is_predicted_to_a_hundredth_of_a_percent(run: Run) -> None:
    assert _predicted(run) == pytest.approx(run.row.resting_bytes, rel=1e-4)


@pytest.mark.parametrize("run", [r for r in RUNS if r.config is not None and r.row.id not in UNSPLIT], ids=lambda run: run.row.id)
def test_resting_memory_of_santacoder_is_predicted_within_a_tenth_of_a_percent(run: Run) -> None:
    assert _predicted(run) == pytest.approx(run.row.resting_bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("row", "unsplit_workspaces_bytes"),
    # With the larger batch both workspaces lie in blocks of 9 MiB, the size of santacoder's attention weights in 16 bit.
    [("fms-accel-0069", 0), ("fms-accel-0071", 2 * (9 * MIB - _WORKSPACE_BYTES))],
)
def test_the_replayed_loading_and_the_biases_explain_resting_memory_to_the_byte(row: str, unsplit_workspaces_bytes: int) -> None:
    (run,) = (run for run in RUNS if run.row.id == row)
    steady = estimate(inventory_of(run), run.recipe).steady_state_bytes
    assert steady is not None
    assert run.row.resting_bytes == steady + _SCALARS_BYTES + unsplit_workspaces_bytes


def test_biases_fed_in_float32_stay_float32_from_the_first_forward_pass_on() -> None:
    (run,) = (run for run in RUNS if run.row.id == "fms-accel-0069")
    # c_attn, c_fc and the MLP's c_proj of 24 layers; the attention's c_proj gets flash attention's bfloat16
    assert weights_growth_bytes(inventory_of(run), run.recipe) == 24 * 2 * (2304 + 8192 + 2048)


@pytest.mark.parametrize("row", ["fms-accel-0057", "fms-accel-0059", "fms-accel-0077", "fms-accel-0079"])
def test_the_replayed_loading_of_mistral_leaves_nothing_unsplit_and_nothing_is_missing_but_scalars(row: str) -> None:
    (run,) = (run for run in RUNS if run.row.id == row)
    steady = estimate(inventory_of(run), run.recipe).steady_state_bytes
    assert steady is not None
    assert run.row.resting_bytes is not None
    assert unsplit_bytes(inventory_of(run), run.recipe) == 0
    assert 0 <= run.row.resting_bytes - steady <= _SCALARS_BYTES


def test_a_resized_vocabulary_changes_embedding_and_head_alone() -> None:
    model = resolve("mistralai/Mistral-7B-v0.1").inventory
    resized = with_vocabulary(model, 32_001)
    assert resized.num_parameters - model.num_parameters == 2 * 4096
    assert resized.config["vocab_size"] == 32_001
    assert resized != model
