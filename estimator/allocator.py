"""CUDA's caching allocator: how requests become blocks, blocks become segments, and how much it holds beyond what is allocated."""

from enum import StrEnum

from estimator.units import MIB, allocated

# Source: torch, c10/core/AllocatorConfig.h: kSmallSize, kSmallBuffer, kMinLargeAlloc, kLargeBuffer, kRoundLarge.
SMALL_REQUEST_BYTES = 1 * MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_REQUEST_BYTES = 10 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
SEGMENT_GRANULARITY_BYTES = 2 * MIB
# A large block is split only when more than this would remain; a small one when at least 512 bytes would.
UNSPLIT_REMAINDER_BYTES = 1 * MIB


class Head(StrEnum):
    """How the loss is computed, as far as fragmentation goes."""

    FULL_LOGITS = "full_logits"
    FUSED = "fused"


# For runs whose allocations are not known one by one: generation, and loops over tokens that a trace follows in outline.
# Share of the memory that comes and goes within a step (peak − steady state) that lies idle in cached segments at the peak: blocks of the
# size of the logits are freed and cannot serve requests of another size. Medians over published training runs, after the context is taken
# off: fms-accel-0125, 0127, 0137, 0139, 0145, 0147, 0214, 0216, 0250, 0252, 0262, 0264, 0274 and 0276 with full logits; with a fused loss
# 0561 to 0563 and 0569 to 0571.
IDLE_SHARE = {Head.FULL_LOGITS: 0.30, Head.FUSED: 0.12}


def segment_bytes(request_bytes: int, large_segment_bytes: int = LARGE_SEGMENT_BYTES) -> int:
    """Size of the segment that the allocator asks the driver for when nothing cached fits.

    Args:
        request_bytes: size of one tensor [bytes].
        large_segment_bytes: option `large_segment_size_mb` [bytes].

    Returns:
        2 MiB up to 1 MiB, 20 MiB (or what the option says) below 10 MiB, else the request rounded up to 2 MiB [bytes].

    Source: torch, c10/cuda/CUDACachingAllocator.cpp, get_allocation_size.
    """
    size = allocated(request_bytes)
    if size == 0:
        return 0
    if size <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < LARGE_REQUEST_BYTES:
        return large_segment_bytes
    return -(-size // SEGMENT_GRANULARITY_BYTES) * SEGMENT_GRANULARITY_BYTES


def fresh_block_bytes(request_bytes: int) -> int:
    """What a tensor counts in `memory_allocated` when it gets a segment of its own.

    The rest of a segment is split off only when it exceeds 1 MiB (512 bytes in the small pool); otherwise the tensor is charged with it.

    Args:
        request_bytes: size of one tensor [bytes].

    Returns:
        The block's size [bytes].

    Source: torch, c10/cuda/CUDACachingAllocator.cpp, should_split.
    """
    size = allocated(request_bytes)
    segment = segment_bytes(size)
    splits = segment > size if size <= SMALL_REQUEST_BYTES else segment - size > UNSPLIT_REMAINDER_BYTES
    return size if splits else segment


def reserved_bytes(*, peak_bytes: int, steady_bytes: int, head: Head = Head.FULL_LOGITS) -> int:
    """Segments held at the peak, without a replay: what is allocated, plus idle blocks in proportion to what comes and goes in a step.

    Args:
        peak_bytes: allocated at the peak [bytes].
        steady_bytes: allocated between steps [bytes].
        head: whether logits exist in full.

    Returns:
        Reserved bytes, a multiple of 2 MiB.
    """
    moving = max(0, peak_bytes - steady_bytes)
    held = peak_bytes + round(moving * IDLE_SHARE[head])
    return -(-held // SEGMENT_GRANULARITY_BYTES) * SEGMENT_GRANULARITY_BYTES


def reserved_loaded_bytes(loaded_bytes: int) -> int:
    """Segments held once a model is loaded: weights stay, so that little lies idle [bytes]."""
    return -(-loaded_bytes // SEGMENT_GRANULARITY_BYTES) * SEGMENT_GRANULARITY_BYTES
