"""CUDA's caching allocator itself: the same blocks and segments that PyTorch would make for the same sequence of requests.

A request is rounded up and takes the smallest cached block that holds it; of a larger block the rest is split off where the rules allow;
freed blocks merge with free neighbours. Nothing is given back to the driver but under pressure, or when the cache is emptied. Requests up
to 1 MiB have a pool of their own.

The driver's addresses are not known. Here they only grow, so that of equal blocks the one in the older segment is taken.

Source: torch 2.13.0, c10/cuda/CUDACachingAllocator.cpp, DeviceCachingAllocator; every method names its function there.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from estimator.allocator import SEGMENT_GRANULARITY_BYTES, SMALL_REQUEST_BYTES, SMALL_SEGMENT_BYTES, UNSPLIT_REMAINDER_BYTES, segment_bytes
from estimator.allocator_settings import AllocatorSettings
from estimator.units import ALLOCATION_GRANULARITY_BYTES, ceil_div

_GRANULARITY = ALLOCATION_GRANULARITY_BYTES
_FIRST_ADDRESS = 0x7000_0000_0000
# A card without a limit: its expandable segments get this many addresses.
UNLIMITED_BYTES = 2**50

Taken = TypeVar("Taken")


class Allocator(Protocol[Taken]):
    """What a program does with an allocator; `Taken` is a block that it has been given."""

    max_reserved_bytes: int
    num_alloc_retries: int
    """How often the cache was given back to make room."""

    def allocate(self, num_bytes: int, /) -> Taken | None: ...

    def free(self, block: Taken, /) -> None: ...

    def empty_cache(self) -> None: ...


class _Pool:
    """Free blocks of one size class, smallest first, and the addresses of its expandable segments that have no memory yet."""

    __slots__ = ("blocks", "keys", "num_searches", "page_bytes", "small", "unmapped", "unmapped_keys")

    def __init__(self, *, small: bool, page_bytes: int) -> None:
        self.small = small
        self.page_bytes = page_bytes
        self.keys: list[tuple[int, int, int]] = []  # (stream, size, address): the order in which blocks are looked for
        self.blocks: dict[int, Block] = {}
        self.unmapped_keys: list[tuple[int, int]] = []  # (stream, address)
        self.unmapped: dict[int, Block] = {}
        self.num_searches = 0

    def add(self, block: "Block") -> None:
        block.search_at_free = self.num_searches
        self.blocks[block.address] = block
        insort(self.keys, (block.stream, block.size, block.address))

    def remove(self, block: "Block") -> None:
        del self.blocks[block.address]
        del self.keys[bisect_left(self.keys, (block.stream, block.size, block.address))]

    def add_unmapped(self, block: "Block") -> None:
        self.unmapped[block.address] = block
        insort(self.unmapped_keys, (block.stream, block.address))

    def remove_unmapped(self, block: "Block") -> None:
        del self.unmapped[block.address]
        del self.unmapped_keys[bisect_left(self.unmapped_keys, (block.stream, block.address))]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expandable:
    """Addresses of a segment that grows: memory is mapped to them page by page."""

    address: int
    num_bytes: int


class Block:
    """A range of addresses inside a segment; neighbours are linked."""

    __slots__ = (
        "address",
        "expandable",
        "is_allocated",
        "is_mapped",
        "next",
        "pool",
        "prev",
        "requested_bytes",
        "search_at_free",
        "size",
        "stream",
    )

    def __init__(
        self, address: int, size: int, stream: int, pool: _Pool, expandable: _Expandable | None = None, *, is_mapped: bool = True
    ) -> None:
        self.address = address
        self.size = size
        self.stream = stream
        self.pool = pool
        self.expandable = expandable
        self.is_mapped = is_mapped
        self.is_allocated = False
        self.requested_bytes = 0
        self.search_at_free = 0
        self.prev: Block | None = None
        self.next: Block | None = None

    @property
    def is_split(self) -> bool:
        """Whether other blocks share its segment."""
        return self.prev is not None or self.next is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockState:
    """One block of a segment."""

    address: int
    num_bytes: int
    requested_bytes: int
    """Of the last tensor in it [bytes]."""
    is_allocated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Memory from the driver that is contiguous, with its blocks in order of address."""

    address: int
    stream: int
    is_small: bool
    is_expandable: bool
    blocks: tuple[BlockState, ...]

    @property
    def num_bytes(self) -> int:
        return sum(block.num_bytes for block in self.blocks)

    @property
    def allocated_bytes(self) -> int:
        return sum(block.num_bytes for block in self.blocks if block.is_allocated)


class CachingAllocator:
    """The allocator of one card. Counters have the names of `torch.cuda.memory_stats`."""

    def __init__(self, settings: AllocatorSettings | None = None, *, capacity_bytes: int | None = None) -> None:
        """An allocator that holds nothing yet.

        Args:
            settings: options; the defaults of PyTorch where none are given.
            capacity_bytes: what the driver can give in all: the card's memory less the context; None for a card without a limit [bytes].
        """
        self.settings = settings = settings if settings is not None else AllocatorSettings()
        self.capacity_bytes = capacity_bytes if capacity_bytes is not None else UNLIMITED_BYTES
        fraction = settings.per_process_memory_fraction
        self._allowed_bytes = int(fraction * self.capacity_bytes) if fraction < 1 else None
        self._rounds_plainly = max(settings.roundup_power2_divisions) <= 1
        self._collects = self._allowed_bytes is not None and settings.garbage_collection_threshold > 0
        self._small = _Pool(small=True, page_bytes=SMALL_SEGMENT_BYTES)
        self._large = _Pool(small=False, page_bytes=settings.large_segment_bytes)
        self._allocated: dict[int, Block] = {}
        self._next_address = _FIRST_ADDRESS
        self.allocated_bytes = 0
        self.requested_bytes = 0
        self.reserved_bytes = 0
        self.max_reserved_bytes = 0
        self.inactive_split_bytes = 0
        """Free blocks that share a segment with others: they cannot be given back to the driver (expandable segments left out) [bytes]."""
        self.num_device_alloc = 0
        self.num_device_free = 0
        self.num_alloc_retries = 0
        self.num_ooms = 0

    # -- what a program does ------------------------------------------------------------------------------------------------------------

    def allocate(self, num_bytes: int, stream: int = 0) -> Block | None:
        """A block for a tensor, or None where PyTorch would raise `OutOfMemoryError`.

        Args:
            num_bytes: size of the tensor, above 0: an empty one takes no block [bytes].
            stream: number of the CUDA stream; blocks are reused on their own stream only.

        Source: malloc.
        """
        size = -(-num_bytes // _GRANULARITY) * _GRANULARITY if self._rounds_plainly else self.settings.rounded(num_bytes)
        pool = self._small if size <= SMALL_REQUEST_BYTES else self._large
        block = self._free_block(pool, size, stream)
        if block is None:
            block = self._from_driver(pool, size, stream)
            if block is None:
                self.num_ooms += 1
                return None
        if self._should_split(block, size):
            block = self._split(block, size)
        elif block.expandable is None and block.is_split:
            self.inactive_split_bytes -= block.size
        block.is_allocated = True
        block.requested_bytes = num_bytes
        self._allocated[block.address] = block
        self.allocated_bytes += block.size
        self.requested_bytes += num_bytes
        return block

    def free(self, block: Block) -> None:
        """Takes a block back into its pool, merged with its free neighbours.

        Source: free, free_block.
        """
        del self._allocated[block.address]
        block.is_allocated = False
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested_bytes
        merged = self._merge(block, block.prev) + self._merge(block, block.next)
        block.pool.add(block)
        if block.expandable is None:
            self.inactive_split_bytes += (block.size if block.is_split else 0) - merged

    def empty_cache(self) -> None:
        """Gives back to the driver every segment that is free as a whole, and every free page of expandable ones.

        Source: emptyCache, release_cached_blocks.
        """
        self._release_all(self._large)
        self._release_all(self._small)

    def segments(self) -> tuple[Segment, ...]:
        """All memory held, in order of address; of an expandable segment every contiguous part.

        Source: snapshot.
        """
        blocks = (*self._small.blocks.values(), *self._large.blocks.values(), *self._allocated.values())
        heads = sorted((b for b in blocks if b.prev is None or not b.prev.is_mapped), key=lambda b: b.address)
        return tuple(
            Segment(
                address=head.address,
                stream=head.stream,
                is_small=head.pool.small,
                is_expandable=head.expandable is not None,
                blocks=tuple(
                    BlockState(address=b.address, num_bytes=b.size, requested_bytes=b.requested_bytes, is_allocated=b.is_allocated)
                    for b in _mapped_from(head)
                ),
            )
            for head in heads
        )

    # -- finding and dividing blocks ----------------------------------------------------------------------------------------------------

    def _free_block(self, pool: _Pool, size: int, stream: int) -> Block | None:
        """The smallest cached block of at least this size.

        Source: get_free_block.
        """
        if self._collects:
            pool.num_searches += 1
        keys = pool.keys
        at = bisect_left(keys, (stream, size, 0))
        if at == len(keys) or keys[at][0] != stream:
            return None
        block = pool.blocks[keys[at][2]]
        if block.expandable is not None:
            # A block at the end of what is mapped counts as large as it can grow to.
            while at + 1 < len(keys) and keys[at + 1][0] == stream:
                other = pool.blocks[keys[at + 1][2]]
                if _expandable_bytes(other) >= _expandable_bytes(block):
                    break
                block, at = other, at + 1
        limit = self.settings.max_split_bytes
        if limit is not None:
            if size < limit <= block.size:
                return None
            if size >= limit and block.size >= size + self.settings.max_non_split_rounding_bytes:
                return None
        del keys[at]
        del pool.blocks[block.address]
        return block

    def _should_split(self, block: Block, size: int) -> bool:
        """Source: should_split."""
        remaining = block.size - size
        if block.pool.small or self.settings.expandable_segments:
            return remaining >= ALLOCATION_GRANULARITY_BYTES
        limit = self.settings.max_split_bytes
        return (limit is None or size < limit) and remaining > UNSPLIT_REMAINDER_BYTES

    def _split(self, remaining: Block, size: int) -> Block:
        """Takes the front of a block; the rest goes back to the pool.

        Source: alloc_found_block.
        """
        was_split = remaining.is_split
        block = Block(remaining.address, size, remaining.stream, remaining.pool, remaining.expandable)
        block.prev = remaining.prev
        if block.prev is not None:
            block.prev.next = block
        block.next = remaining
        remaining.prev = block
        remaining.address += size
        remaining.size -= size
        remaining.pool.add(remaining)
        if block.expandable is None:
            self.inactive_split_bytes += -size if was_split else remaining.size
        return block

    def _merge(self, block: Block, other: Block | None) -> int:
        """Takes a free neighbour in; what it held [bytes].

        Source: try_merge_blocks.
        """
        if other is None or other.is_allocated or other.is_mapped != block.is_mapped:
            return 0
        if other.is_mapped:
            other.pool.remove(other)
        else:
            other.pool.remove_unmapped(other)
        if block.prev is other:
            block.address = other.address
            block.prev = other.prev
            if block.prev is not None:
                block.prev.next = block
        else:
            block.next = other.next
            if block.next is not None:
                block.next.prev = block
        block.size += other.size
        return other.size

    # -- the driver ---------------------------------------------------------------------------------------------------------------------

    def _from_driver(self, pool: _Pool, size: int, stream: int) -> Block | None:
        """A new segment, or a part of one; if there is no room, after ever more of the cache has been given back.

        Source: malloc.
        """
        if self._collects:
            self._collect_garbage()
        block = self._new_block(pool, size, stream)
        if block is None and self._release_oversize(pool, size, stream):
            block = self._new_block(pool, size, stream)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = self._new_block(pool, size, stream)
        return block

    def _new_block(self, pool: _Pool, size: int, stream: int) -> Block | None:
        """Source: alloc_block."""
        num_bytes = segment_bytes(size, self.settings.large_segment_bytes)
        if self._allowed_bytes is not None and self.reserved_bytes + num_bytes > self._allowed_bytes:
            return None
        if self.settings.expandable_segments:
            return self._grow(pool, size, stream)
        if self.reserved_bytes + num_bytes > self.capacity_bytes:
            return None
        self._reserve(num_bytes)
        return Block(self._addresses(num_bytes), num_bytes, stream, pool)

    def _reserve(self, num_bytes: int) -> None:
        self.reserved_bytes += num_bytes
        self.max_reserved_bytes = max(self.max_reserved_bytes, self.reserved_bytes)
        self.num_device_alloc += 1

    def _addresses(self, num_bytes: int) -> int:
        address = self._next_address
        self._next_address += ceil_div(num_bytes, SEGMENT_GRANULARITY_BYTES) * SEGMENT_GRANULARITY_BYTES
        return address

    def _release(self, block: Block) -> None:
        """Source: release_block."""
        block.pool.remove(block)
        self.reserved_bytes -= block.size
        self.num_device_free += 1

    def _release_all(self, pool: _Pool) -> None:
        """Source: release_blocks."""
        for block in [pool.blocks[address] for _, _, address in pool.keys]:
            if block.expandable is not None:
                self._unmap(block, block.expandable)
            elif not block.is_split:
                self._release(block)

    def _release_oversize(self, pool: _Pool, size: int, stream: int) -> bool:
        """Gives back blocks that may not be split until there is room for a request; whether there is.

        Source: release_available_cached_blocks.
        """
        limit = self.settings.max_split_bytes
        if limit is None:
            return False
        wanted = max(size, limit)
        at = bisect_left(pool.keys, (stream, wanted, 0))
        if at < len(pool.keys) and pool.keys[at][0] == stream:
            block = pool.blocks[pool.keys[at][2]]
            if block.expandable is None:
                self._release(block)
                return True
        released = 0
        while at > 0 and released < wanted:
            at -= 1
            found_stream, found_size, address = pool.keys[at]
            if found_stream != stream or found_size < limit:
                break
            block = pool.blocks[address]
            if block.expandable is None:
                released += found_size
                self._release(block)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """Gives back free segments that have not been used for longer than the average, until enough is free.

        Source: garbage_collect_cached_blocks.
        """
        assert self._allowed_bytes is not None
        excess = self.reserved_bytes - int(self.settings.garbage_collection_threshold * self._allowed_bytes)
        pool = self._large
        ages = {b.address: pool.num_searches - b.search_at_free for b in pool.blocks.values() if not b.is_split and b.expandable is None}
        reclaimed = 0
        while reclaimed < excess and ages:
            average = sum(ages.values()) / len(ages)
            for address in [key[2] for key in pool.keys]:
                # The average stands for the round; oldest first would be another order.
                if ages.get(address, -1) >= average:
                    reclaimed += pool.blocks[address].size
                    self._release(pool.blocks[address])
                    del ages[address]

    # -- expandable segments ------------------------------------------------------------------------------------------------------------

    def _grow(self, pool: _Pool, size: int, stream: int) -> Block | None:
        """A block at the lowest addresses of an expandable segment that free and unmapped ranges leave room for.

        Source: try_allocate_expandable_block.
        """
        block = self._room(pool, size, stream)
        if not block.is_mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.next
            assert following is not None, "free addresses are followed by unmapped ones"
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following
        pool.remove(block)
        return block

    def _room(self, pool: _Pool, size: int, stream: int) -> Block:
        """Source: find_expandable_block."""
        for found_stream, address in pool.unmapped_keys[bisect_left(pool.unmapped_keys, (stream, 0)) :]:
            if found_stream != stream:
                break
            block = pool.unmapped[address]
            if block.prev is not None and not block.prev.is_allocated:
                block = block.prev
            if _free_bytes_from(block, size) >= size:
                return block
        # Addresses for one eighth more than the card holds.
        wanted = self.capacity_bytes + self.capacity_bytes // 8
        num_bytes = ceil_div(wanted, pool.page_bytes) * pool.page_bytes
        segment = _Expandable(address=self._addresses(num_bytes), num_bytes=num_bytes)
        block = Block(segment.address, num_bytes, stream, pool, segment, is_mapped=False)
        pool.add_unmapped(block)
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Puts memory behind the front of an unmapped range, in whole pages; whether there was room for it.

        Source: map_block; ExpandableSegment.map.
        """
        pool = block.pool
        num_bytes = ceil_div(size, pool.page_bytes) * pool.page_bytes
        if self.reserved_bytes + num_bytes > self.capacity_bytes:
            return False
        pool.remove_unmapped(block)
        block.is_mapped = True
        if num_bytes < block.size:
            rest = Block(block.address + num_bytes, block.size - num_bytes, block.stream, pool, block.expandable, is_mapped=False)
            _link(rest, block, block.next)
            pool.add_unmapped(rest)
            block.size = num_bytes
        self._merge(block, block.prev)
        self._merge(block, block.next)
        pool.add(block)
        self._reserve(num_bytes)
        return True

    def _unmap(self, block: Block, segment: _Expandable) -> None:
        """Gives back the whole pages of a free block.

        Source: unmap_block; ExpandableSegment.unmap; release_expandable_segment.
        """
        pool = block.pool
        page = pool.page_bytes
        start = segment.address + ceil_div(block.address - segment.address, page) * page
        end = segment.address + (block.address + block.size - segment.address) // page * page
        if start >= end:
            return
        pool.remove(block)
        before, after = start - block.address, block.address + block.size - end
        if before:
            front = Block(block.address, before, block.stream, pool, segment)
            _link(front, block.prev, block)
            pool.add(front)
        if after:
            back = Block(end, after, block.stream, pool, segment)
            _link(back, block, block.next)
            pool.add(back)
        block.address, block.size, block.is_mapped = start, end - start, False
        self._merge(block, block.prev)
        self._merge(block, block.next)
        self.reserved_bytes -= end - start
        self.num_device_free += 1
        if block.is_split:
            pool.add_unmapped(block)


def _link(block: Block, before: Block | None, after: Block | None) -> None:
    """Source: Block.splice."""
    block.prev, block.next = before, after
    if before is not None:
        before.next = block
    if after is not None:
        after.prev = block


def _mapped_from(block: Block | None) -> Iterator[Block]:
    while block is not None and block.is_mapped:
        yield block
        block = block.next


def _expandable_bytes(block: Block) -> int:
    """What a block can grow to [bytes]."""
    following = block.next
    return block.size + (following.size if following is not None and not following.is_mapped else 0)


def _free_bytes_from(block: Block | None, wanted: int) -> int:
    """Free and unmapped addresses in a row, counted until there are enough [bytes]."""
    found = 0
    while found < wanted and block is not None and not block.is_allocated:
        found += block.size
        block = block.next
    return found
