"""A program of the caching allocator, apart for its two pools, neither of which knows of the other on a card without a limit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from estimator.allocator import SMALL_REQUEST_BYTES
from estimator.units import allocated


@dataclass(frozen=True, slots=True)
class Stream:
    """What a program asks of one pool, in order. Programs that ask the same have equal streams, however their storages are numbered."""

    events: tuple[int, ...]
    """A size where a block is made [bytes, rounded up]; `~i` where the i-th that was made is released."""
    handed_over: tuple[int, ...]
    """Which of those made are still there at the end. What is neither released nor handed over stays for good."""


@dataclass(slots=True)
class _Part:
    events: list[int] = field(default_factory=list)
    num_made: int = 0
    alive: dict[int, int] = field(default_factory=dict)
    """By storage, which of those made it is."""

    def make(self, size: int) -> int:
        self.events.append(size)
        self.num_made += 1
        return self.num_made - 1

    def finished(self, kept: Iterable[int]) -> Stream:
        handed_over = tuple(self.alive.pop(storage) for storage in kept if storage in self.alive)
        self.events += [~made for made in self.alive.values()]
        return Stream(tuple(self.events), handed_over)


def apart(sizes: Sequence[int], events: Iterable[int], kept: Sequence[int], staying: Mapping[int, int]) -> tuple[Stream, Stream]:
    """A program, in the small pool and in the large one.

    Args:
        sizes: of every storage; one without bytes takes no block [bytes].
        events: `i` where storage `i` is made, `~i` where it is released. What is left at the end is released then.
        kept: storages that are handed over instead.
        staying: by event, the size of a block that is made before it and stays for good [bytes].
    """
    small, large = _Part(), _Part()
    by_size = {size: allocated(size) for size in set(sizes)}  # few sizes, many storages
    rounded = [by_size[size] for size in sizes]
    parts = [small if size <= SMALL_REQUEST_BYTES else large for size in rounded]
    for position, event in enumerate(events):
        if position in staying:
            size = allocated(staying[position])
            (small if size <= SMALL_REQUEST_BYTES else large).make(size)
        if event < 0:
            part = parts[~event]
            if (made := part.alive.pop(~event, None)) is not None:
                part.events.append(~made)
        elif rounded[event]:
            part = parts[event]
            part.alive[event] = part.make(rounded[event])
    return small.finished(kept), large.finished(kept)
