"""The simulated allocator beside torch's own, recorded; by hand; and what must hold for every program."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.allocator_settings import AllocatorSettings, parse_settings
from estimator.caching_allocator import Block, CachingAllocator
from estimator.units import KIB, MIB
from tests.estimator.allocator_recording.programs import OPTIONS, Program, programs
from tests.estimator.allocator_recording.record import RECORDING, digest

_FIRST_ADDRESS = 0x7000_0000_0000
_RECORDED: list[dict[str, Any]] = json.loads(RECORDING.read_text(encoding="utf-8"))["programs"]


def _run(program: Program) -> list[str]:
    """Events and segments in the words of the recording's driver."""
    allocator = CachingAllocator(parse_settings(program.options), capacity_bytes=program.capacity_bytes)
    live: dict[str, Block] = {}
    output = []
    for line in program.lines:
        kind, *words = line.split()
        failed = ""
        if kind == "a":
            block = allocator.allocate(int(words[1]), int(words[2]))
            if block is None:
                failed = "oom "
            else:
                live[words[0]] = block
        elif kind == "e":
            allocator.empty_cache()
        elif words[0] in live:
            allocator.free(live.pop(words[0]))
        a = allocator
        held = f"{a.allocated_bytes} {a.requested_bytes} {a.reserved_bytes} {a.allocated_bytes} {a.inactive_split_bytes}"
        output.append(f"{failed}{held} {a.num_device_alloc} {a.num_device_free} {a.num_alloc_retries} {a.num_ooms}")
    for segment in allocator.segments():
        blocks = "".join(f" {'a' if b.is_allocated else 'f'}{b.num_bytes}:{b.requested_bytes}" for b in segment.blocks)
        output.append(
            f"segment {segment.address - _FIRST_ADDRESS} {segment.num_bytes} {int(not segment.is_small)} {segment.stream}{blocks}"
        )
    return output


@pytest.mark.parametrize("options", OPTIONS)
def test_every_counter_and_segment_is_that_of_torchs_own_allocator(options: str) -> None:
    compared = 0
    for program, recorded in zip(programs(), _RECORDED, strict=True):
        if program.options != options:
            continue
        assert (recorded["options"], recorded["capacity_bytes"]) == (options, program.capacity_bytes)
        output = _run(program)
        for event, line in recorded["after"].items():
            assert output[int(event)] == line
        assert digest(output) == recorded["sha256"]
        compared += 1
    assert compared == 10


def test_the_recording_has_failures_and_retries() -> None:
    last = [entry["after"]["599"].split() for entry in _RECORDED]
    assert sum(int(words[-1]) for words in last) > 500
    assert sum(int(words[-2]) for words in last) > 500


# -- by hand, from should_split, get_allocation_size and get_free_block ------------------------------------------------------------------


def _layout(allocator: CachingAllocator) -> list[list[tuple[float, bool]]]:
    """Per segment: block sizes [MiB] and whether they are in use."""
    return [[(b.num_bytes / MIB, b.is_allocated) for b in segment.blocks] for segment in allocator.segments()]


def _allocate(allocator: CachingAllocator, num_bytes: int) -> Block:
    block = allocator.allocate(num_bytes)
    assert block is not None
    return block


def test_a_remainder_of_exactly_1_mib_stays_with_the_tensor() -> None:
    allocator = CachingAllocator()
    weight = _allocate(allocator, 9 * MIB)  # below 10 MiB: a segment of 20 MiB, 11 MiB left
    packed = _allocate(allocator, 9 * MIB + 1)  # 9 MiB and 512 bytes of the 11 MiB: more than 1 MiB is left
    allocator.free(weight)
    _allocate(allocator, 8 * MIB)  # the freed 9 MiB are the smallest that hold it; 1 MiB is not more than 1 MiB
    assert _layout(allocator) == [[(9, True), (9 + 512 / MIB, True), (2 - 512 / MIB, False)]]
    assert allocator.allocated_bytes == 18 * MIB + 512
    assert allocator.requested_bytes == 17 * MIB + 1
    assert allocator.reserved_bytes == 20 * MIB
    assert allocator.inactive_split_bytes == 2 * MIB - 512
    allocator.free(packed)  # merges with what follows it
    assert allocator.inactive_split_bytes == 11 * MIB
    assert allocator.num_device_alloc == 1


def test_small_requests_share_segments_of_2_mib_and_split_at_512_bytes() -> None:
    allocator = CachingAllocator()
    _allocate(allocator, MIB)  # 1 MiB is still small
    _allocate(allocator, 1)
    assert allocator.allocated_bytes == MIB + 512
    _allocate(allocator, MIB - 512)  # all that is left
    assert _layout(allocator) == [[(1, True), (512 / MIB, True), (1 - 512 / MIB, True)]]
    _allocate(allocator, MIB + 1)  # large: a segment of 20 MiB
    assert allocator.reserved_bytes == 22 * MIB


def test_from_10_mib_on_a_tensor_gets_a_segment_of_its_own_in_steps_of_2_mib() -> None:
    allocator = CachingAllocator()
    _allocate(allocator, 11 * MIB)  # 12 MiB; 1 MiB is not split off
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (12 * MIB, 12 * MIB)
    _allocate(allocator, 10 * MIB + 512)  # 12 MiB; 2 MiB less 512 bytes are
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (22 * MIB + 512, 24 * MIB)


def test_of_cached_blocks_the_smallest_that_fits_is_taken_and_of_equals_the_older() -> None:
    allocator = CachingAllocator()
    blocks = [_allocate(allocator, size * MIB) for size in (40, 30, 50, 30)]
    addresses = [block.address for block in blocks]
    for block in blocks:
        allocator.free(block)
    again = _allocate(allocator, 28 * MIB)
    assert again.address == addresses[1]
    assert allocator.num_device_alloc == 4


def test_blocks_stay_on_their_stream() -> None:
    allocator = CachingAllocator()
    allocator.free(_allocate(allocator, 30 * MIB))
    assert allocator.allocate(30 * MIB, stream=1) is not None
    assert allocator.reserved_bytes == 60 * MIB


def test_emptying_the_cache_gives_back_whole_segments_only() -> None:
    allocator = CachingAllocator()
    first, second = _allocate(allocator, 4 * MIB), _allocate(allocator, 4 * MIB)
    other = _allocate(allocator, 30 * MIB)
    allocator.free(first)
    allocator.free(other)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.num_device_free) == (20 * MIB, 1)
    allocator.free(second)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments()) == (0, ())


def test_without_room_the_cache_is_given_back_and_only_then_does_it_fail() -> None:
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    kept = _allocate(allocator, 40 * MIB)
    allocator.free(_allocate(allocator, 50 * MIB))
    assert allocator.allocate(60 * MIB) is not None  # 40 + 50 + 60 > 100: the cached 50 go
    assert (allocator.num_alloc_retries, allocator.num_ooms, allocator.reserved_bytes) == (1, 0, 100 * MIB)
    assert allocator.allocate(2 * MIB) is None
    assert (allocator.num_alloc_retries, allocator.num_ooms) == (2, 1)
    allocator.free(kept)
    assert allocator.allocate(2 * MIB) is not None


def test_blocks_of_max_split_size_are_reused_whole_and_only_for_requests_of_their_size() -> None:
    allocator = CachingAllocator(parse_settings("max_split_size_mb:32"))
    large = _allocate(allocator, 64 * MIB)
    allocator.free(large)
    small = _allocate(allocator, 30 * MIB)  # below the limit: may not have an oversize block
    assert small.address != large.address
    middle = _allocate(allocator, 44 * MIB)  # 64 is not below 44 + 20: too much would be wasted
    assert middle.address != large.address
    close = _allocate(allocator, 45 * MIB)  # 64 is below 45 + 20; the block is not split
    assert (close.address, close.size) == (large.address, 64 * MIB)
    assert allocator.reserved_bytes == (64 + 30 + 44) * MIB


def test_garbage_is_collected_only_under_a_memory_fraction_and_oldest_first() -> None:
    def held(options: str) -> int:
        allocator = CachingAllocator(parse_settings(options), capacity_bytes=200 * MIB)
        blocks = [_allocate(allocator, size * MIB) for size in (30, 40)]
        for block in blocks:
            allocator.free(block)
        _allocate(allocator, 40 * MIB)  # leaves the 30 idle
        _allocate(allocator, 50 * MIB)
        return allocator.reserved_bytes // MIB

    assert held("garbage_collection_threshold:0.3") == 120
    # 70 MiB are above 0.3 · 180: the 30 go before the driver is asked for 50
    assert held("garbage_collection_threshold:0.3,per_process_memory_fraction:0.9") == 90


def test_an_expandable_segment_grows_by_pages_at_its_end() -> None:
    allocator = CachingAllocator(parse_settings("expandable_segments:True"))
    first = _allocate(allocator, 9 * MIB)
    assert allocator.reserved_bytes == 20 * MIB  # one page
    second = _allocate(allocator, 32 * MIB)  # 11 MiB are free at the end: 21 more are two pages
    assert (allocator.reserved_bytes, second.address) == (60 * MIB, first.address + 9 * MIB)
    third = _allocate(allocator, 19 * MIB - 512)  # the rest but for 512 bytes, which are split off
    assert third.size == 19 * MIB - 512
    assert _layout(allocator) == [[(9, True), (32, True), (19 - 512 / MIB, True), (512 / MIB, False)]]
    assert allocator.inactive_split_bytes == 0  # expandable segments are left out of it
    allocator.free(second)
    allocator.empty_cache()  # 9 to 41 MiB are free: the page from 20 to 40 goes
    assert allocator.reserved_bytes == 40 * MIB
    assert [segment.num_bytes // MIB for segment in allocator.segments()] == [20, 20]


# -- every program ----------------------------------------------------------------------------------------------------------------------

_EVENTS = st.lists(st.tuples(st.booleans(), st.integers(1, 40 * MIB) | st.integers(1, 64 * KIB), st.integers(0, 10**6)), max_size=60)
_SETTINGS = st.sampled_from([parse_settings(options) for options in OPTIONS])


def _programme(allocator: CachingAllocator, events: Sequence[tuple[bool, int, int]]) -> list[Block]:
    live: list[Block] = []
    for releases, size, choice in events:
        if releases and live:
            allocator.free(live.pop(choice % len(live)))
            continue
        block = allocator.allocate(size)
        if block is not None:
            live.append(block)
    return live


@settings(deadline=None)
@given(_EVENTS, _SETTINGS)
def test_blocks_tile_their_segments_and_counters_are_their_sums(events: list[tuple[bool, int, int]], options: AllocatorSettings) -> None:
    allocator = CachingAllocator(options, capacity_bytes=300 * MIB)
    live = _programme(allocator, events)
    segments = allocator.segments()
    end = 0
    for segment in segments:
        assert segment.address >= end
        for block in segment.blocks:
            assert block.address >= end
            end = block.address + block.num_bytes
        assert end == segment.address + segment.num_bytes
        assert all(not (a.is_allocated is b.is_allocated is False) for a, b in zip(segment.blocks, segment.blocks[1:], strict=False))
    assert allocator.reserved_bytes == sum(segment.num_bytes for segment in segments) <= 300 * MIB
    assert allocator.allocated_bytes == sum(segment.allocated_bytes for segment in segments) == sum(block.size for block in live)
    assert (
        allocator.requested_bytes == sum(block.requested_bytes for block in live) <= allocator.allocated_bytes <= allocator.reserved_bytes
    )
    split = [s for s in segments if len(s.blocks) > 1 and not s.is_expandable]
    assert allocator.inactive_split_bytes == sum(s.num_bytes - s.allocated_bytes for s in split)


@settings(deadline=None)
@given(_EVENTS, _SETTINGS)
def test_a_program_that_frees_everything_leaves_one_block_per_segment_and_nothing_once_emptied(
    events: list[tuple[bool, int, int]], options: AllocatorSettings
) -> None:
    allocator = CachingAllocator(options)
    for block in _programme(allocator, events):
        allocator.free(block)
    assert (allocator.allocated_bytes, allocator.requested_bytes, allocator.inactive_split_bytes) == (0, 0, 0)
    assert all(len(segment.blocks) == 1 for segment in allocator.segments())
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments()) == (0, ())


@settings(deadline=None)
@given(_EVENTS)
def test_a_card_that_holds_all_that_was_reserved_is_enough_and_changes_nothing(events: list[tuple[bool, int, int]]) -> None:
    free, tight = CachingAllocator(), None
    _programme(free, events)
    peak = free.reserved_bytes  # without pressure nothing is ever given back
    tight = CachingAllocator(capacity_bytes=peak)
    _programme(tight, events)
    assert (tight.num_alloc_retries, tight.reserved_bytes, tight.segments()) == (0, peak, free.segments())


@settings(deadline=None)
@given(_EVENTS)
def test_expandable_segments_charge_no_remainders(events: list[tuple[bool, int, int]]) -> None:
    allocator = CachingAllocator(AllocatorSettings(expandable_segments=True))
    live = _programme(allocator, events)
    assert all(block.size == -(-block.requested_bytes // 512) * 512 for block in live)
