"""Options of CUDA's caching allocator, read as PyTorch reads `PYTORCH_CUDA_ALLOC_CONF`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from estimator.allocator import LARGE_REQUEST_BYTES, LARGE_SEGMENT_BYTES
from estimator.errors import RequestError, UnknownNameError
from estimator.units import ALLOCATION_GRANULARITY_BYTES, MIB, ceil_div

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"

# Intervals of request sizes that may be rounded up differently: from 1 MiB to 32 GiB, each twice the last.
# Source: torch, c10/core/AllocatorConfig.cpp, kRoundUpPowerOfTwoIntervals, kRoundUpPowerOfTwoStart.
_NUM_INTERVALS = 16
_FIRST_INTERVAL_BITS = 20

# What changes neither how much is held on the device nor when an allocation fails.
# Source: torch, c10/cuda/CUDAAllocatorConfig.h, CUDAAllocatorConfig.getKeys; c10/core/AllocatorConfig.h.
_WITHOUT_EFFECT = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "max_cached_size",
        "max_round_threshold",
        "pinned_free_catch_all",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "release_lock_on_cudamalloc",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """How the allocator rounds, splits, keeps and gives back."""

    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    """Segment for requests between 1 and 10 MiB; with expandable segments the page of the large pool [bytes]."""
    max_split_bytes: int | None = None
    """Blocks of this size and more are never split; None: all may be [bytes]."""
    max_non_split_rounding_bytes: int = LARGE_SEGMENT_BYTES
    """How much larger than its request a block that may not be split can be [bytes]."""
    roundup_power2_divisions: tuple[int, ...] = (0,) * _NUM_INTERVALS
    """Steps between two powers of two that requests are rounded up to, for each interval of sizes; 0 and 1: multiples of 512 bytes."""
    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old cached segments are given back; only acts under a memory fraction."""
    expandable_segments: bool = False
    """One segment for each pool and stream that grows by pages."""
    per_process_memory_fraction: float = 1.0
    """Share of the card that the allocator may reserve."""

    def rounded(self, num_bytes: int) -> int:
        """Size of the block that a request asks for [bytes].

        Args:
            num_bytes: size of one tensor, above 0 [bytes].

        Returns:
            The request rounded up to 512 bytes, or to the next of the steps between powers of two.

        Source: torch, c10/cuda/CUDACachingAllocator.cpp, round_size, roundup_power2_next_division.
        """
        granularity = ALLOCATION_GRANULARITY_BYTES
        if num_bytes <= granularity:
            return granularity
        floor_bits = num_bytes.bit_length() - 1
        divisions = self.roundup_power2_divisions[min(max(floor_bits - _FIRST_INTERVAL_BITS, 0), _NUM_INTERVALS - 1)]
        step = granularity
        if divisions > 1 and num_bytes > granularity * divisions:
            step = (1 << floor_bits) // divisions
        return ceil_div(num_bytes, step) * step


def parse_settings(text: str) -> AllocatorSettings:
    """Settings from the content of `PYTORCH_CUDA_ALLOC_CONF`, e.g. `expandable_segments:True,max_split_size_mb:128`.

    Raises:
        UnknownNameError: if PyTorch has no such option.
        RequestError: if a value is one that PyTorch refuses, or if the option leads to another allocator.

    Source: torch, c10/core/AllocatorConfig.cpp, AcceleratorAllocatorConfig.parseArgs; c10/cuda/CUDAAllocatorConfig.cpp, parseArgs.
    """
    options = dict(_options(text))
    large = _large_segment_bytes(options.pop("large_segment_size_mb", None))
    # The rounding of blocks that are not split follows the large segment unless it is set.
    settings: dict[str, Any] = {"large_segment_bytes": large, "max_non_split_rounding_bytes": large}
    for name, value in options.items():
        if name in _WITHOUT_EFFECT:
            continue
        if name not in _READERS:
            raise UnknownNameError.of(VARIABLE, name, (*_READERS, *_WITHOUT_EFFECT, "large_segment_size_mb"))
        settings |= _READERS[name](name, value, large)
    return AllocatorSettings(**settings)


def _options(text: str) -> Iterator[tuple[str, str]]:
    """(name, value) in order; commas inside brackets belong to the value."""
    rest = "".join(text.split())
    while rest:
        name, colon, rest = rest.partition(":")
        if not (name and colon and rest):
            raise _refused(f"{name!r} has no value; write name:value, separated by commas")
        if rest.startswith("["):
            value, bracket, rest = rest.partition("]")
            if not bracket:
                raise _refused(f"{name}: the bracket is not closed")
            value += bracket
        else:
            value, comma, rest = rest.partition(",")
            rest = comma + rest
        if rest and not (rest[0] == "," and len(rest) > 1):
            raise _refused(f"{rest!r} follows the value of {name}; options are separated by commas")
        yield name, value
        rest = rest[1:]


def _refused(message: str) -> RequestError:
    return RequestError(f"{VARIABLE}: {message}", field=VARIABLE)


def _whole(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise _refused(f"{name}: {value!r} is not a whole number")
    return int(value)


def _large_segment_bytes(value: str | None) -> int:
    if value is None:
        return LARGE_SEGMENT_BYTES
    size = _whole("large_segment_size_mb", value) * MIB
    if size <= LARGE_REQUEST_BYTES:
        raise _refused(f"large_segment_size_mb: {value} is not above {LARGE_REQUEST_BYTES // MIB}")
    return size


def _size(name: str, value: str, large: int) -> int:
    size = _whole(name, value) * MIB
    if size < large:
        raise _refused(f"{name}: {value} is below the size of a large segment, {large // MIB}")
    return size


def _max_split(name: str, value: str, large: int) -> dict[str, Any]:
    return {"max_split_bytes": _size(name, value, large)}


def _max_non_split_rounding(name: str, value: str, large: int) -> dict[str, Any]:
    return {"max_non_split_rounding_bytes": _size(name, value, large)}


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise _refused(f"{name}: {value!r} is not a number") from None


def _threshold(name: str, value: str, large: int) -> dict[str, Any]:
    share = _number(name, value)
    if not 0 < share < 1:
        raise _refused(f"{name}: {value} is not between 0 and 1")
    return {"garbage_collection_threshold": share}


def _fraction(name: str, value: str, large: int) -> dict[str, Any]:
    share = _number(name, value)
    if not 0 <= share <= 1:
        raise _refused(f"{name}: {value} is not from 0 to 1")
    return {"per_process_memory_fraction": share}


def _flag(name: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise _refused(f"{name}: {value!r} is neither True nor False")
    return value == "True"


def _expandable(name: str, value: str, large: int) -> dict[str, Any]:
    return {"expandable_segments": _flag(name, value)}


def _early_refusal(name: str, value: str, large: int) -> dict[str, Any]:
    if _flag(name, value):
        raise _refused(f"{name}: allocations that are refused before cudaMalloc is asked are not modelled; leave it out")
    return {}


def _backend(name: str, value: str, large: int) -> dict[str, Any]:
    if value != "native":
        raise _refused(f"{name}: {value} is another allocator, which is not modelled; accepted: native")
    return {}


def _divisions(name: str, value: str, large: int) -> dict[str, Any]:
    """One number for all sizes, or `[size in MiB:number,…,>:number]`; `>` stands for the intervals above the last that was named."""
    if not value.startswith("["):
        number = _power_of_two(name, value)
        if number == 0:
            raise _refused(f"{name}: 0 is only accepted in brackets, for some sizes")
        return {"roundup_power2_divisions": (number,) * _NUM_INTERVALS}
    found = [0] * _NUM_INTERVALS
    last, is_first = 0, True
    for pair in filter(None, value[1:-1].split(",")):
        boundary, colon, text = pair.partition(":")
        if not colon:
            raise _refused(f"{name}: {pair!r} is not size:divisions")
        number = _power_of_two(name, text)
        if boundary == ">":
            found[last + 1 :] = [number] * (_NUM_INTERVALS - last - 1)
            continue
        size = _power_of_two(name, boundary)
        if size == 0:
            raise _refused(f"{name}: a size of 0 MiB begins no interval")
        last = min(size.bit_length() - 1, _NUM_INTERVALS - 1)
        if is_first:
            found[:last] = [number] * last
        found[last], is_first = number, False
    return {"roundup_power2_divisions": tuple(found)}


def _power_of_two(name: str, value: str) -> int:
    number = _whole(name, value)
    if number & (number - 1):
        raise _refused(f"{name}: {value} is not a power of two")
    return number


_READERS = {
    "backend": _backend,
    "expandable_segments": _expandable,
    "garbage_collection_threshold": _threshold,
    "max_non_split_rounding_mb": _max_non_split_rounding,
    "max_split_size_mb": _max_split,
    "per_process_memory_fraction": _fraction,
    "roundup_power2_divisions": _divisions,
    "throw_on_cudamalloc_oom": _early_refusal,
}
