"""The caching allocator at its default options, by the ranges of addresses that are free: no blocks, and few counters.

Segments lie apart, so that free ranges merge inside their segment alone. Long programs take half the time that they take on blocks.

Source: as `caching_allocator`, whose answers it gives (`tests/estimator/test_free_ranges.py`).
"""

from bisect import bisect_left, insort
from typing import TypeAlias

from estimator.allocator import SMALL_REQUEST_BYTES, UNSPLIT_REMAINDER_BYTES, segment_bytes
from estimator.caching_allocator import CachingAllocator
from estimator.units import ALLOCATION_GRANULARITY_BYTES

Range: TypeAlias = tuple[int, int]
"""Where a block begins, and where it ends."""

_GRANULARITY = ALLOCATION_GRANULARITY_BYTES
_GAP = _GRANULARITY
# A free range in the order in which ranges are looked for, by size and address, as one number.
_SIZE = 1 << 60
_ADDRESS = _SIZE - 1


class FreeRanges:
    """The allocator of one card from some state on. Names are those of `CachingAllocator`."""

    def __init__(self, capacity_bytes: int | None = None) -> None:
        """An allocator that holds nothing.

        Args:
            capacity_bytes: what the driver can give in all; None for a card without a limit [bytes].
        """
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = 0
        self.max_reserved_bytes = 0
        self.num_alloc_retries = 0
        self._next = _GAP
        self._segments: dict[int, int] = {}  # start → end
        self._ends: dict[int, int] = {}  # of free ranges: start → end
        self._starts: dict[int, int] = {}  # end → start
        self._small: list[int] = []
        self._large: list[int] = []

    @classmethod
    def following(cls, allocator: CachingAllocator) -> "FreeRanges":
        """From the state of an allocator on, with its capacity; what it has handed out stays for good."""
        ranges = cls(allocator.capacity_bytes)
        for segment in allocator.segments():
            start = ranges._reserve(segment.num_bytes)
            for block in segment.blocks:
                if not block.is_allocated:
                    ranges._give(ranges._small if segment.is_small else ranges._large, start, start + block.num_bytes)
                start += block.num_bytes
        ranges.max_reserved_bytes = allocator.max_reserved_bytes
        ranges.num_alloc_retries = allocator.num_alloc_retries
        return ranges

    def allocate(self, num_bytes: int) -> Range | None:
        """A block for a tensor of at least one byte; None where PyTorch would raise `OutOfMemoryError`."""
        size = -(-num_bytes // _GRANULARITY) * _GRANULARITY
        is_small = size <= SMALL_REQUEST_BYTES
        keys = self._small if is_small else self._large
        at = bisect_left(keys, size * _SIZE)
        if at < len(keys):
            key = keys.pop(at)
            start = key & _ADDRESS
            end = self._ends.pop(start)
        else:
            reserved = self._from_driver(segment_bytes(size))
            if reserved is None:
                return None
            start, end = reserved
        middle = start + size
        if end - middle >= _GRANULARITY if is_small else end - middle > UNSPLIT_REMAINDER_BYTES:
            self._ends[middle] = end
            self._starts[end] = middle
            insort(keys, (end - middle) * _SIZE + middle)
            return start, middle
        self._starts.pop(end, None)
        return start, end

    def free(self, block: Range) -> None:
        """Takes a block back, merged with its free neighbours."""
        start, end = block
        # A block of the large pool is larger than any request to the small one, and one of the small pool is what was asked for.
        keys = self._small if end - start <= SMALL_REQUEST_BYTES else self._large
        self._give(keys, start, end)

    def empty_cache(self) -> None:
        """Gives every segment that is free as a whole back to the driver."""
        for keys in (self._large, self._small):
            for key in list(keys):
                start = key & _ADDRESS
                end = self._ends[start]
                if self._segments.get(start) == end:
                    keys.remove(key)
                    del self._ends[start], self._starts[end], self._segments[start]
                    self.reserved_bytes -= end - start

    def _give(self, keys: list[int], start: int, end: int) -> None:
        starts, ends = self._starts, self._ends
        before = starts.pop(start, None)
        if before is not None:
            del keys[bisect_left(keys, (start - before) * _SIZE + before)]
            start = before
        after = ends.pop(end, None)
        if after is not None:
            del keys[bisect_left(keys, (after - end) * _SIZE + end)]
            end = after
        ends[start] = end
        starts[end] = start
        insort(keys, (end - start) * _SIZE + start)

    def _from_driver(self, num_bytes: int) -> Range | None:
        if self.capacity_bytes is not None and self.reserved_bytes + num_bytes > self.capacity_bytes:
            self.empty_cache()
            self.num_alloc_retries += 1
            if self.reserved_bytes + num_bytes > self.capacity_bytes:
                return None
        start = self._reserve(num_bytes)
        return start, start + num_bytes

    def _reserve(self, num_bytes: int) -> int:
        start = self._next
        self._next += num_bytes + _GAP
        self._segments[start] = start + num_bytes
        self.reserved_bytes += num_bytes
        self.max_reserved_bytes = max(self.max_reserved_bytes, self.reserved_bytes)
        return start
