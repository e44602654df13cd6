"""Bytes as integers, and the one rounding that CUDA's caching allocator applies to every tensor."""

KIB = 2**10
MIB = 2**20
GIB = 2**30

# Every block handed out by the caching allocator is a multiple of this.
# Source: torch, c10/core/AllocatorConfig.h, kMinBlockSize.
ALLOCATION_GRANULARITY_BYTES = 512


def allocated(raw_bytes: int) -> int:
    """Size of one tensor as `torch.cuda.memory_allocated` counts it.

    Args:
        raw_bytes: size of the tensor's storage [bytes].

    Returns:
        `raw_bytes` rounded up to 512 [bytes]; an empty tensor takes nothing.

    Source: torch, c10/cuda/CUDACachingAllocator.cpp, round_size.
    """
    return -(-raw_bytes // ALLOCATION_GRANULARITY_BYTES) * ALLOCATION_GRANULARITY_BYTES


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer not below `numerator / denominator`."""
    return -(-numerator // denominator)


def gib(num_bytes: int) -> str:
    """Bytes as people read them, e.g. `24.6 GiB`."""
    if abs(num_bytes) >= GIB // 10:
        return f"{num_bytes / GIB:,.2f} GiB"
    if abs(num_bytes) >= MIB // 10:
        return f"{num_bytes / MIB:,.1f} MiB"
    return f"{num_bytes:,} B"
