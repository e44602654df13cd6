"""A program replayed on the caching allocator: what was reserved at every instant, how much of it lay idle, and whether it fitted."""

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from estimator.allocator_settings import AllocatorSettings
from estimator.caching_allocator import Block, CachingAllocator, Segment
from estimator.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """The allocator after one event, in the words of `torch.cuda.memory_stats`."""

    event: int
    """Index into the program's events; -1 before the first."""
    allocated_bytes: int
    """Blocks in use, each with the remainder that was not split off: `memory_allocated` [bytes]."""
    requested_bytes: int
    """What the tensors in them asked for [bytes]."""
    reserved_bytes: int
    """Segments held: `memory_reserved` [bytes]."""
    inactive_split_bytes: int
    """Free blocks whose segment is in use, so that only the program itself can have them [bytes]."""

    @property
    def active_bytes(self) -> int:
        """In use by the program or by a stream; the same as allocated, since a replay knows no events of other streams [bytes]."""
        return self.allocated_bytes

    @property
    def idle_bytes(self) -> int:
        """Reserved but not allocated [bytes]."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def fragmentation(self) -> float:
        """Share of what is reserved that is not allocated."""
        return self.idle_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutOfMemory:
    """The allocation that found no room, even with everything idle given back."""

    requested_bytes: int
    before: Instant
    """What was held when it failed; its event is the one that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A program as far as it ran."""

    allocated_bytes: Sequence[int]
    """After each event [bytes]."""
    requested_bytes: Sequence[int]
    reserved_bytes: Sequence[int]
    inactive_split_bytes: Sequence[int]
    addresses: Sequence[int]
    """Of the block that each event made or released; 0 for an empty tensor."""
    segments: tuple[Segment, ...]
    """At the end."""
    snapshots: Mapping[int, tuple[Segment, ...]]
    """After the events that were asked for."""
    num_device_alloc: int
    """Calls of cudaMalloc, and of cuMemMap for expandable segments."""
    num_device_free: int
    num_alloc_retries: int
    """How often the cache had to be given back before an allocation succeeded or failed."""
    out_of_memory: OutOfMemory | None

    def at(self, event: int) -> Instant:
        """The allocator after an event; -1 for the start."""
        if event < 0:
            return Instant(event=-1, allocated_bytes=0, requested_bytes=0, reserved_bytes=0, inactive_split_bytes=0)
        return Instant(
            event=event,
            allocated_bytes=self.allocated_bytes[event],
            requested_bytes=self.requested_bytes[event],
            reserved_bytes=self.reserved_bytes[event],
            inactive_split_bytes=self.inactive_split_bytes[event],
        )

    def peak(self, start: int = 0, end: int | None = None) -> Instant:
        """The first instant at which most is allocated, between two events (the second left out).

        What is alive before the first event counts: a phase that only frees has its peak there.
        """
        stop = len(self.allocated_bytes) if end is None else min(end, len(self.allocated_bytes))
        before = self.allocated_bytes[start - 1] if start > 0 else 0
        inside = self.allocated_bytes[start:stop]
        worst = max(inside, default=0)
        return self.at(start - 1 if before >= worst else start + inside.index(worst))

    @property
    def max_reserved_bytes(self) -> int:
        """`max_memory_reserved` [bytes]."""
        return max(self.reserved_bytes, default=0)


def replay(
    timeline: Timeline,
    settings: AllocatorSettings | None = None,
    *,
    capacity_bytes: int | None = None,
    snapshots_after: Collection[int] = (),
    cache_emptied_after: Collection[int] = (),
) -> Replay:
    """A traced run on the allocator.

    Args:
        timeline: the run, from its first tensor to its last.
        settings: the allocator's options; PyTorch's defaults where none are given.
        capacity_bytes: what the driver can give in all; None for a card without a limit [bytes].
        snapshots_after: events after which the state of all segments is wanted.
        cache_emptied_after: events that `torch.cuda.empty_cache()` follows.

    Returns:
        The counters after each event, up to the first allocation that fails.
    """
    return replay_events(
        [allocation.num_bytes for allocation in timeline.allocations],
        timeline.events,
        settings,
        capacity_bytes=capacity_bytes,
        snapshots_after=snapshots_after,
        cache_emptied_after=cache_emptied_after,
    )


def replay_events(
    sizes: Sequence[int],
    events: Sequence[int],
    settings: AllocatorSettings | None = None,
    *,
    capacity_bytes: int | None = None,
    snapshots_after: Collection[int] = (),
    cache_emptied_after: Collection[int] = (),
) -> Replay:
    """A program of plain numbers on the allocator; see `replay`.

    Args:
        sizes: what each allocation asks for [bytes].
        events: `i` where allocation `i` is made, `~i` where it is released.
    """
    allocator = CachingAllocator(settings, capacity_bytes=capacity_bytes)
    allocated, requested, reserved, inactive, addresses = (array("q") for _ in range(5))
    wanted, emptied = frozenset(snapshots_after), frozenset(cache_emptied_after)
    snapshots: dict[int, tuple[Segment, ...]] = {}
    blocks: dict[int, Block] = {}
    failed: OutOfMemory | None = None
    for position, event in enumerate(events):
        block: Block | None = None
        if event < 0:
            block = blocks.pop(~event, None)
            address = block.address if block is not None else 0
            if block is not None:
                allocator.free(block)
        elif sizes[event] == 0:
            # Source: torch, c10/cuda/CUDACachingAllocator.cpp, NativeCachingAllocator.allocate: no block for no bytes.
            address = 0
        else:
            block = allocator.allocate(sizes[event])
            if block is None:
                failed = OutOfMemory(requested_bytes=sizes[event], before=_instant(allocator, position))
                break
            blocks[event] = block
            address = block.address
        if position in emptied:
            allocator.empty_cache()
        allocated.append(allocator.allocated_bytes)
        requested.append(allocator.requested_bytes)
        reserved.append(allocator.reserved_bytes)
        inactive.append(allocator.inactive_split_bytes)
        addresses.append(address)
        if position in wanted:
            snapshots[position] = allocator.segments()
    return Replay(
        allocated_bytes=allocated,
        requested_bytes=requested,
        reserved_bytes=reserved,
        inactive_split_bytes=inactive,
        addresses=addresses,
        segments=allocator.segments(),
        snapshots=snapshots,
        num_device_alloc=allocator.num_device_alloc,
        num_device_free=allocator.num_device_free,
        num_alloc_retries=allocator.num_alloc_retries,
        out_of_memory=failed,
    )


def _instant(allocator: CachingAllocator, event: int) -> Instant:
    return Instant(
        event=event,
        allocated_bytes=allocator.allocated_bytes,
        requested_bytes=allocator.requested_bytes,
        reserved_bytes=allocator.reserved_bytes,
        inactive_split_bytes=allocator.inactive_split_bytes,
    )
