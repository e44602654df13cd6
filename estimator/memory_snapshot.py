"""The allocator's state in the form of `torch.cuda.memory_snapshot()`, which PyTorch's memory viewers read."""

from collections.abc import Iterable
from typing import Any

from estimator.caching_allocator import Segment

Json = dict[str, Any]


def segments_of(segments: Iterable[Segment], *, device: int = 0) -> list[Json]:
    """Segments and blocks as PyTorch writes them; without call stacks, which a replay has not.

    Source: torch, csrc/cuda/Module.cpp, THCPModule_memorySnapshot; cuda/memory.py, memory_snapshot.
    """
    return [_segment(segment, device) for segment in segments]


def _segment(segment: Segment, device: int) -> Json:
    allocated = segment.allocated_bytes
    return {
        "device": device,
        "address": segment.address,
        "total_size": segment.num_bytes,
        "allocated_size": allocated,
        "active_size": allocated,
        "requested_size": sum(block.requested_bytes for block in segment.blocks if block.is_allocated),
        "stream": segment.stream,
        "segment_type": "small" if segment.is_small else "large",
        "segment_pool_id": (0, 0),
        "is_expandable": segment.is_expandable,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.num_bytes,
                "requested_size": block.requested_bytes,
                "state": "active_allocated" if block.is_allocated else "inactive",
                "frames": [],
            }
            for block in segment.blocks
        ],
    }
