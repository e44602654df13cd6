"""The caching allocator's rounding, and the model of what it holds idle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.allocator import Head, fresh_block_bytes, reserved_bytes, segment_bytes
from estimator.units import MIB, allocated


@pytest.mark.parametrize(
    ("request_bytes", "segment"),
    [(0, 0), (1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (10 * MIB + 1, 12 * MIB)],
)
def test_a_segment_follows_the_size_of_its_request(request_bytes: int, segment: int) -> None:
    assert segment_bytes(request_bytes) == segment


def test_logits_without_the_last_position_count_as_all_positions() -> None:
    # 4 × 4095 × 32000 float32: the remainder of the segment is below 1 MiB and stays with the tensor (row fms-accel-0125).
    assert fresh_block_bytes(4 * 4 * 4095 * 32_000) == 4 * 4 * 4096 * 32_000


@given(st.integers(1, 2**40))
def test_a_block_is_never_smaller_than_its_tensor_nor_1_mib_larger(request_bytes: int) -> None:
    assert allocated(request_bytes) <= fresh_block_bytes(request_bytes) <= allocated(request_bytes) + MIB


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.sampled_from(Head))
def test_reserved_is_never_below_allocated(peak: int, steady: int, head: Head) -> None:
    assert reserved_bytes(peak_bytes=peak, steady_bytes=min(peak, steady), head=head) >= peak


def test_full_logits_leave_more_idle_than_a_fused_loss() -> None:
    full = reserved_bytes(peak_bytes=20 * 2**30, steady_bytes=5 * 2**30)
    assert full > reserved_bytes(peak_bytes=20 * 2**30, steady_bytes=5 * 2**30, head=Head.FUSED)
