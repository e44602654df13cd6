"""Free ranges beside the allocator of blocks, which is held to torch's own."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.caching_allocator import Block, CachingAllocator
from estimator.free_ranges import FreeRanges, Range
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


@settings(max_examples=400)
@given(program=_PROGRAM, capacity=st.one_of(st.none(), st.integers(1, 200 * MIB)))
def test_free_ranges_hold_what_blocks_hold_after_every_event(program: list[int | None], capacity: int | None) -> None:
    assert _play(program, FreeRanges(capacity), []) == _play(program, CachingAllocator(capacity_bytes=capacity), [])


@settings(max_examples=200)
@given(before=_PROGRAM, after=_PROGRAM, capacity=st.one_of(st.none(), st.integers(100 * MIB, 300 * MIB)))
def test_free_ranges_go_on_from_the_state_of_blocks(before: list[int | None], after: list[int | None], capacity: int | None) -> None:
    blocks = CachingAllocator(capacity_bytes=capacity)
    _play(before, blocks, [])
    following = FreeRanges.following(blocks)
    assert (following.reserved_bytes, following.max_reserved_bytes) == (blocks.reserved_bytes, blocks.max_reserved_bytes)
    # What was handed out before stays for good.
    assert _play(after, following, []) == _play(after, blocks, [])


def test_a_block_of_the_small_pool_is_never_found_for_a_large_request() -> None:
    ranges = FreeRanges()
    small = ranges.allocate(600 * KIB)
    assert small is not None
    ranges.free(small)
    assert ranges.allocate(MIB + 1) is not None
    assert ranges.reserved_bytes == 22 * MIB
