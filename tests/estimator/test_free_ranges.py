"""Free ranges beside the allocator of blocks, which is held to torch's own."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.caching_allocator import Block, CachingAllocator
from estimator.free_ranges import FreeRanges, Range, _Pool
from estimator.streams import apart
from estimator.units import KIB, MIB

_SIZES = st.one_of(
    st.integers(1, 3 * MIB),
    st.integers(1, 64 * MIB),
    st.sampled_from([1, 512, 513, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB, 19 * MIB, 20 * MIB, 21 * MIB]),
)
# A size asks for a block; None empties the cache; a negative number frees one of those that are there.
_PROGRAM = st.lists(st.one_of(_SIZES, _SIZES, st.integers(-1000, -1), st.integers(-1000, -1), st.none()), max_size=120)


def _play(
    program: Sequence[int | None], allocator: CachingAllocator | FreeRanges, live: list[Block | Range]
) -> list[tuple[int, int, int, bool]]:
    """What is reserved and was at most, how often the cache was given back, and whether there was room, after every event."""
    seen = []
    for event in program:
        has_room = True
        if event is None:
            allocator.empty_cache()
        elif event > 0:
            block = allocator.allocate(event)
            has_room = block is not None
            if block is not None:
                live.append(block)
        elif live:
            allocator.free(live.pop(event % len(live)))  # type: ignore[arg-type]
        seen.append((allocator.reserved_bytes, allocator.max_reserved_bytes, allocator.num_alloc_retries, has_room))
    return seen


@settings(max_examples=600)
@given(program=_PROGRAM, capacity=st.one_of(st.none(), st.integers(1, 200 * MIB)))
def test_free_ranges_hold_what_blocks_hold_after_every_event(program: list[int | None], capacity: int | None) -> None:
    assert _play(program, FreeRanges(capacity), []) == _play(program, CachingAllocator(capacity_bytes=capacity), [])


def _in_order(allocator: CachingAllocator, sizes: Sequence[int], events: Sequence[int], kept: Sequence[int]) -> list[Block]:
    """A program on blocks; what is kept. Before its event 1 a block of 8 MiB is made that stays."""
    there: dict[int, Block] = {}
    for position, event in enumerate(events):
        if position == 1:
            allocator.allocate(8 * MIB)
        if event < 0:
            if ~event in there:
                allocator.free(there.pop(~event))
        elif sizes[event]:
            block = allocator.allocate(sizes[event])
            assert block is not None
            there[event] = block
    handed_over = [there.pop(storage) for storage in kept if storage in there]
    for block in there.values():
        allocator.free(block)
    return handed_over


@settings(max_examples=100)
@given(before=_PROGRAM, data=st.data(), rounds=st.lists(st.integers(0, 1), min_size=1, max_size=6))
def test_pools_play_their_parts_of_programs_as_blocks_play_the_whole(
    before: list[int | None], data: st.DataObject, rounds: list[int]
) -> None:
    programs = []
    for _ in range(2):
        sizes = data.draw(st.lists(st.one_of(st.just(0), _SIZES), min_size=1, max_size=20))
        makes = [(data.draw(st.floats(0, 1)), storage) for storage in range(len(sizes))]
        frees = [(data.draw(st.floats(at, 2)), ~storage) for at, storage in makes if data.draw(st.booleans())]
        freed = {~event for _, event in frees}
        kept = [storage for storage in range(len(sizes)) if storage not in freed and data.draw(st.booleans())]
        programs.append((sizes, [event for _, event in sorted(makes + frees, key=lambda one: one[0])], kept))
    blocks = CachingAllocator()
    _play(before, blocks, [])
    ranges = FreeRanges()
    _play(before, ranges, [])
    split = [apart(*program, {1: 8 * MIB}) for program in programs]
    held: list[tuple[list[Block], list[Range]]] = []
    for chosen in rounds:
        in_pools = ranges.play(*split[chosen])
        assert in_pools is not None
        held.append((_in_order(blocks, *programs[chosen]), in_pools))
        assert ranges.max_reserved_bytes == blocks.max_reserved_bytes
        assert len(held[-1][0]) == len(in_pools)
        if len(held) == 2:  # one program's outlives the next
            for block in held[0][0]:
                blocks.free(block)
            for block in held.pop(0)[1]:
                ranges.free(block)


def test_a_pool_plays_nothing_twice_from_the_same_state(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = FreeRanges()
    program = apart([MIB, 30 * MIB, 3 * MIB], [0, 1, 2, ~1, ~0], [2], {})
    first = ranges.play(*program)
    assert first is not None
    ranges.free(first[0])
    again = ranges.play(*program)
    assert again == first
    ranges.free(again[0])
    monkeypatch.setattr(_Pool, "take", None)
    assert ranges.play(*program) == first
    assert ranges.reserved_bytes == 2 * MIB + 30 * MIB + 20 * MIB


def test_a_block_of_the_small_pool_is_never_found_for_a_large_request() -> None:
    ranges = FreeRanges()
    small = ranges.allocate(600 * KIB)
    assert small is not None
    ranges.free(small)
    assert ranges.allocate(MIB + 1) is not None
    assert ranges.reserved_bytes == 22 * MIB
