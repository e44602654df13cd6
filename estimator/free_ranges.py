"""The caching allocator at its default options, by the ranges of addresses that are free: no blocks, and few counters.

Segments lie apart, so that free ranges merge inside their segment alone. Long programs take half the time that they take on blocks, and
on a card without a limit a pool does not play again what it has played before from the same state.

Source: as `caching_allocator`, whose answers it gives (`tests/estimator/test_free_ranges.py`).
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from estimator.allocator import SMALL_REQUEST_BYTES, UNSPLIT_REMAINDER_BYTES, segment_bytes
from estimator.streams import Stream
from estimator.units import ALLOCATION_GRANULARITY_BYTES

Range: TypeAlias = tuple[int, int]
"""Where a block begins, and where it ends."""

_GRANULARITY = ALLOCATION_GRANULARITY_BYTES
_GAP = _GRANULARITY
# A free range in the order in which ranges are looked for, by size and address, as one number.
_SIZE = 1 << 60
_ADDRESS = _SIZE - 1


class FreeRanges:
    """The allocator of one card. Names are those of `CachingAllocator`."""

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
        self._small = _Pool(self._from_driver, least_rest=_GRANULARITY)
        self._large = _Pool(self._from_driver, least_rest=UNSPLIT_REMAINDER_BYTES + 1)

    def allocate(self, num_bytes: int) -> Range | None:
        """A block for a tensor of at least one byte; None where PyTorch would raise `OutOfMemoryError`."""
        size = -(-num_bytes // _GRANULARITY) * _GRANULARITY
        return self._pool(size).take(size)

    def free(self, block: Range) -> None:
        """Takes a block back, merged with its free neighbours."""
        start, end = block
        # A block of the large pool is larger than any request to the small one, and one of the small pool is what was asked for.
        self._pool(end - start).give(start, end)

    def play(self, small: Stream, large: Stream) -> list[Range] | None:
        """A whole program, for which the card has room in any case; what it hands over. None where the card has not.

        Not for a card whose limit may matter: there what one pool asks for makes the other give its cache back.
        """
        of_small = self._small.play(small)
        of_large = None if of_small is None else self._large.play(large)
        return None if of_small is None or of_large is None else of_small + of_large

    def empty_cache(self) -> None:
        """Gives every segment that is free as a whole back to the driver."""
        for pool in (self._large, self._small):
            for start, end in pool.ranges():
                if self._segments.get(start) == end:
                    pool.drop(start, end)
                    del self._segments[start]
                    self.reserved_bytes -= end - start

    def _pool(self, size: int) -> "_Pool":
        return self._small if size <= SMALL_REQUEST_BYTES else self._large

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


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a stream came to."""

    keys: tuple[int, ...]
    handed_over: tuple[Range, ...]


class _Pool:
    """The free ranges of one size class."""

    def __init__(self, from_driver: Callable[[int], Range | None], *, least_rest: int) -> None:
        """A pool that holds nothing.

        Args:
            from_driver: a new segment of some size; None where there is no room.
            least_rest: a range is split where this would remain [bytes].
        """
        self._from_driver = from_driver
        self._least_rest = least_rest
        self._keys: list[int] = []
        self._ends: dict[int, int] = {}  # start → end
        self._starts: dict[int, int] = {}  # end → start
        self._outcomes: dict[tuple[Stream, tuple[int, ...]], _Outcome] = {}
        self._num_segments = 0

    def take(self, size: int) -> Range | None:
        """The smallest range that holds a block, or a new segment, cut where enough would remain; None where there is no room."""
        keys = self._keys
        at = bisect_left(keys, size * _SIZE)
        if at < len(keys):
            start = keys.pop(at) & _ADDRESS
            end = self._ends.pop(start)
        else:
            segment = self._from_driver(segment_bytes(size))
            if segment is None:
                return None
            self._num_segments += 1
            start, end = segment
        middle = start + size
        if end - middle >= self._least_rest:
            self._ends[middle] = end
            self._starts[end] = middle
            insort(keys, (end - middle) * _SIZE + middle)
            return start, middle
        self._starts.pop(end, None)
        return start, end

    def give(self, start: int, end: int) -> None:
        """Takes a range back, merged with its free neighbours."""
        keys, starts, ends = self._keys, self._starts, self._ends
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

    def play(self, stream: Stream) -> list[Range] | None:
        """A whole stream; what it hands over. None where there is no room.

        From the same free ranges it comes to the same, where it finds room among them for all that it makes.
        """
        state = (stream, tuple(self._keys))
        known = self._outcomes.get(state)
        if known is not None:
            self._keys = list(known.keys)
            self._ends = {key & _ADDRESS: (key & _ADDRESS) + key // _SIZE for key in known.keys}
            self._starts = {end: start for start, end in self._ends.items()}
            return list(known.handed_over)
        num_segments = self._num_segments
        take, give = self.take, self.give
        made: list[Range] = []
        for event in stream.events:
            if event > 0:
                block = take(event)
                if block is None:
                    return None
                made.append(block)
            else:
                give(*made[~event])
        handed_over = [made[index] for index in stream.handed_over]
        if self._num_segments == num_segments:
            self._outcomes[state] = _Outcome(tuple(self._keys), tuple(handed_over))
        return handed_over

    def ranges(self) -> list[Range]:
        """All that is free, smallest first."""
        return [(key & _ADDRESS, self._ends[key & _ADDRESS]) for key in self._keys]

    def drop(self, start: int, end: int) -> None:
        """Forgets a free range."""
        self._keys.remove((end - start) * _SIZE + start)
        del self._ends[start], self._starts[end]
