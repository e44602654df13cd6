"""What a process takes beside the allocator's segments."""

from estimator.device import context_bytes, device_bytes, library_bytes, workspace_bytes, workspaces_bytes
from estimator.units import KIB, MIB


def test_a_workspace_is_32_mib_on_hopper_and_blackwell_and_8320_kib_before() -> None:
    assert [workspace_bytes(c) for c in ((9, 0), (10, 0), (12, 0))] == [32 * MIB] * 3
    assert [workspace_bytes(c) for c in ((7, 5), (8, 0), (8, 9))] == [8320 * KIB] * 3


def test_training_takes_a_second_workspace_for_the_backward_thread() -> None:
    assert workspaces_bytes((8, 0), training=True) == 2 * workspaces_bytes((8, 0), training=False)


def test_a_context_grows_with_the_number_of_multiprocessors() -> None:
    assert abs(context_bytes(132) - context_bytes(108) - 2.9 * 24 * MIB) <= 1


def test_device_is_segments_context_libraries_and_paged_memory() -> None:
    assert device_bytes(reserved_bytes=7, context_bytes=11, paged_bytes=13) == 31 + library_bytes()
