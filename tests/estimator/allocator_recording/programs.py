"""The recorded programs: allocations and frees of mixed sizes, the same on every machine."""

from dataclasses import dataclass

from estimator.units import MIB

OPTIONS = (
    "",
    "expandable_segments:True",
    "max_split_size_mb:20",
    "max_split_size_mb:64,max_non_split_rounding_mb:40",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:[1:2,8:4,32:8,>:2]",
    "large_segment_size_mb:32",
    "large_segment_size_mb:40,expandable_segments:True",
    "per_process_memory_fraction:0.6",
    "per_process_memory_fraction:0.7,garbage_collection_threshold:0.5",
    "garbage_collection_threshold:0.3,max_split_size_mb:30,per_process_memory_fraction:0.9",
    "expandable_segments:True,max_split_size_mb:32",
    "expandable_segments:True,per_process_memory_fraction:0.8",
)
_CAPACITIES = (200, 500, 1200, 5000, 100_000)  # [MiB]
_NUM_PROGRAMS = 10
_NUM_EVENTS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What was run, and under which conditions."""

    options: str
    capacity_bytes: int
    lines: tuple[str, ...]
    """Events as `driver.cpp` reads them."""


def programs() -> list[Program]:
    """All of them, each with one or two streams, some with the cache emptied now and then."""
    found = []
    for number in range(_NUM_PROGRAMS):
        for options in OPTIONS:
            seed = len(found)
            found.append(
                Program(
                    options=options,
                    capacity_bytes=_CAPACITIES[number % len(_CAPACITIES)] * MIB,
                    lines=_lines(_Numbers(seed), num_streams=1 + (number % 3 == 2), empties=number % 2 == 1),
                )
            )
    return found


class _Numbers:
    """Knuth's MMIX generator: numbers that no library version changes."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, limit: int) -> int:
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % limit


def _lines(numbers: _Numbers, *, num_streams: int, empties: bool) -> tuple[str, ...]:
    live: list[int] = []
    lines: list[str] = []
    common = [_size(numbers) for _ in range(8)]
    for event in range(_NUM_EVENTS):
        grows = numbers.below(100) < (62 if event // 40 % 2 == 0 else 35)
        if live and not grows:
            lines.append(f"f {live.pop(numbers.below(len(live)))}")
        elif empties and numbers.below(50) == 0:
            lines.append("e")
        else:
            size = common[numbers.below(8)] if numbers.below(10) < 4 else _size(numbers)
            lines.append(f"a {event} {size} {numbers.below(num_streams)}")
            live.append(event)
    return tuple(lines)


def _size(numbers: _Numbers) -> int:
    limit = (4096, 2 * MIB, 12 * MIB, 30 * MIB, 80 * MIB, 200 * MIB)[(0, 0, 0, 1, 1, 2, 3, 3, 4, 5)[numbers.below(10)]]
    size = 1 + numbers.below(limit)
    unit = (1, 512, MIB)[numbers.below(3)]
    return -(-size // unit) * unit
