"""The traced step against the same step really run on the CPU, on tiny models; a few layers against all of them."""

from itertools import product

import pytest

from tests.oracle import run as oracle
from tests.oracle import traces
from tests.oracle.models import FAMILIES

MODES = (
    "full_bf16",
    "full_fp32_autocast",
    "lora_bf16_fp32_autocast",
    "lora_fp32_fp32_autocast",
    "qlora_bf16_autocast",
    "qlora_fp32_autocast",
    "qlora_prepared",
    "qlora_prepared_autocast",
    "int8_fp32_autocast",
)
CHECKPOINTING = (None, False, True)
BATCH, LENGTH, LAYERS = 2, 40, 3
STEP = ("forward", "loss", "backward")

# One cell of every family by default, modes and kinds of checkpointing in turn.
SAMPLE = [(family, MODES[n % len(MODES)], CHECKPOINTING[n % 3]) for n, family in enumerate(FAMILIES)]
ALL = [cell for cell in product(FAMILIES, MODES, CHECKPOINTING) if cell not in SAMPLE]


def assert_equal(family: str, mode: str, gc: bool | None) -> None:
    real = oracle.step(family, mode, BATCH, LENGTH, LAYERS, gc=gc).first
    traced = traces.live_bytes(traces.timeline(family, mode, BATCH, LENGTH, LAYERS, gc=gc))
    assert {phase: traced[phase] for phase in STEP} == {phase: real[phase].live_bytes for phase in STEP}


@pytest.mark.parametrize(("family", "mode", "gc"), SAMPLE)
def test_peaks_equal_those_of_a_real_run(family: str, mode: str, gc: bool | None) -> None:
    assert_equal(family, mode, gc)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode", "gc"), ALL)
def test_peaks_equal_those_of_a_real_run_in_every_mode(family: str, mode: str, gc: bool | None) -> None:
    assert_equal(family, mode, gc)
