"""Programs replayed: counters at every instant, failures, and snapshots that torch's own tools read."""

from collections.abc import Sequence

import pytest
import torch.cuda._memory_viz as viewer
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.allocator_settings import parse_settings
from estimator.memory_snapshot import segments_of
from estimator.phases import Segment
from estimator.replay import Replay, replay, replay_events
from estimator.timeline import Allocation, Mark, Timeline
from estimator.units import MIB


def mark(event: int, phase: str) -> Mark:
    return Mark(event=event, phase=phase, segment=Segment.OUTSIDE, layer=-1)


def _timeline(sizes: Sequence[int], events: tuple[int, ...]) -> Timeline:
    made = tuple(
        Allocation(num_bytes=size, shape=(size,), dtype="uint8", operator="empty", module="", phase="load", item="weights")
        for size in sizes
    )
    return Timeline(allocations=made, events=events, marks=(mark(0, "load"), mark(4, "forward")))


# 9 MiB are freed between tensors that stay, and 8 MiB take them with the 1 MiB that cannot be split off.
# Source: torch, c10/cuda/CUDACachingAllocator.cpp, should_split.
_SIZES = (9 * MIB, 2 * MIB, 13 * MIB, 8 * MIB, 1000, 0)
_PROGRAM = (0, 1, 2, ~0, 3, 4, 5, ~5, ~3)


def _run(**options: object) -> Replay:
    return replay(_timeline(_SIZES, _PROGRAM), **options)  # type: ignore[arg-type]


def test_counters_follow_the_program() -> None:
    run = _run()
    # 9 and 2 of 20; 14 for 13 (a segment of its own, an unsplit remainder of 1); 9 freed; 9 for 8; 1 kB in a small segment; an empty tensor
    assert [n / MIB for n in run.allocated_bytes[:5]] == [9, 11, 25, 16, 25]
    assert list(run.allocated_bytes[5:]) == [25 * MIB + 1024] * 3 + [16 * MIB + 1024]
    assert [n // MIB for n in run.reserved_bytes] == [20, 20, 34, 34, 34, 36, 36, 36, 36]
    assert run.requested_bytes[4] == 23 * MIB
    assert run.inactive_split_bytes[4] == 9 * MIB
    assert run.addresses[0] == run.addresses[3] == run.addresses[4]
    assert run.addresses[6] == run.addresses[7] == 0
    assert (run.num_device_alloc, run.num_device_free, run.num_alloc_retries, run.out_of_memory) == (3, 0, 0, None)


def test_peaks_can_be_asked_for_by_phase() -> None:
    timeline, run = _timeline(_SIZES, _PROGRAM), _run()
    peaks = {mark.phase: run.peak(mark.event, end) for mark, end in timeline.spans()}
    assert (peaks["load"].event, peaks["load"].allocated_bytes, peaks["load"].reserved_bytes) == (2, 25 * MIB, 34 * MIB)
    assert (peaks["forward"].event, peaks["forward"].allocated_bytes) == (5, 25 * MIB + 1024)
    assert peaks["forward"].fragmentation == pytest.approx((11 * MIB - 1024) / (36 * MIB))
    assert run.peak(8).event == 7  # what only frees is largest before it begins
    assert run.max_reserved_bytes == 36 * MIB


def test_a_program_ends_where_it_does_not_fit() -> None:
    run = _run(capacity_bytes=30 * MIB)
    assert run.out_of_memory is not None
    assert (run.out_of_memory.before.event, run.out_of_memory.requested_bytes) == (2, 13 * MIB)
    assert (run.out_of_memory.before.allocated_bytes, run.out_of_memory.before.reserved_bytes) == (11 * MIB, 20 * MIB)
    assert len(run.allocated_bytes) == 2
    assert _run(capacity_bytes=36 * MIB).out_of_memory is None


def test_the_cache_can_be_emptied_in_between() -> None:
    sizes, events = (30 * MIB, 40 * MIB), (0, ~0, 1)
    assert replay_events(sizes, events).reserved_bytes[-1] == 70 * MIB
    emptied = replay_events(sizes, events, cache_emptied_after=[1])
    assert (emptied.reserved_bytes[1], emptied.reserved_bytes[-1], emptied.num_device_free) == (0, 40 * MIB, 1)


def test_options_reach_the_allocator() -> None:
    run = _run(settings=parse_settings("expandable_segments:True"))
    assert run.allocated_bytes[4] == 23 * MIB


def test_torchs_viewer_reads_a_snapshot() -> None:
    run = _run(snapshots_after=[4])
    snapshot = {"segments": segments_of(run.snapshots[4]), "device_traces": []}
    summary = viewer.segsum(snapshot)
    for line in ("segments: 2", "total_reserved: 34.0MiB", "total_allocated: 23.0MiB"):
        assert line in summary
    assert "total_free: 11.0MiB (18.2% internal)" in summary  # the two remainders of 1 MiB, and a free block of 9
    blocks = viewer.memory(snapshot, format_flamegraph=lambda lines: lines).splitlines()
    assert blocks.count(f"stream_0;active_allocated;<gaps> {MIB}") == 2
    assert f"stream_0;inactive;<gaps> {9 * MIB}" in blocks
    viewer.trace(snapshot)  # without an error


_PROGRAMS = st.lists(st.integers(0, 30 * MIB), min_size=1, max_size=40)


@settings(deadline=None)
@given(_PROGRAMS)
def test_a_replay_charges_at_least_what_the_timeline_counts(sizes: list[int]) -> None:
    events = [e for i in range(len(sizes)) for e in ((i,) if i % 3 else (i, ~i))]
    timeline = _timeline(sizes, tuple(events))
    run = replay(timeline)
    counted = 0
    for position, event in enumerate(events):
        counted += timeline.allocations[event if event >= 0 else ~event].allocated_bytes * (1 if event >= 0 else -1)
        assert counted <= run.allocated_bytes[position] <= run.reserved_bytes[position]
    assert run.at(-1).idle_bytes == 0
