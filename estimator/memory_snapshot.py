"""A run, and the allocator's state, in the form of `torch.cuda.memory._snapshot()`, which PyTorch's memory viewers read."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from estimator.caching_allocator import BlockState, Segment
from estimator.replay import Replay
from estimator.timeline import Allocation, Timeline

Json = dict[str, Any]
Frames = list[Json]

_POOL = (0, 0)


def memory_snapshot(timeline: Timeline, replay: Replay, settings: str = "") -> Json:
    """The snapshot of one card: history of allocations, and segments at the end of the run.

    Args:
        timeline: the run.
        replay: of the same run.
        settings: `PYTORCH_CUDA_ALLOC_CONF` of the replay.

    Returns:
        What `torch.cuda.memory._snapshot()` returns. The time of an event is its number; frames name operator, module and item.

    Source: torch 2.13, cuda/memory.py, _snapshot; c10/cuda/CUDACachingAllocator.h, TraceEntry.
    """
    frames = [_frames(allocation) for allocation in timeline.allocations]
    trace: list[Json] = []
    owners: dict[int, Frames] = {}
    for position, address in enumerate(replay.addresses):
        event = timeline.events[position]
        index = event if event >= 0 else ~event
        entry = {
            "addr": address,
            "size": timeline.allocations[index].num_bytes,
            "stream": 0,
            "device": 0,
            "pool_id": _POOL,
            "time_us": position,
            "frames": frames[index],
        }
        if event >= 0:
            owners[address] = frames[index]
            trace.append({"action": "alloc", **entry})
        else:
            owners.pop(address, None)
            trace += [{"action": "free_requested", **entry}, {"action": "free_completed", **entry}]
    return {
        "segments": segments_of(replay.segments, frames=owners),
        "device_traces": [trace],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": settings},
        "external_annotations": [],
    }


def _frames(allocation: Allocation) -> Frames:
    named = ((allocation.operator, "operator"), (allocation.module, "module"), (f"{allocation.item} in {allocation.phase}", "vramplan"))
    return [{"name": name, "filename": kind, "line": 0} for name, kind in named if name]


def segments_of(segments: Iterable[Segment], *, device: int = 0, frames: Mapping[int, Frames] | None = None) -> list[Json]:
    """Segments and blocks as PyTorch writes them.

    Args:
        segments: of one card.
        device: its number.
        frames: address → call stack of the allocation that lives there.

    Source: torch, csrc/cuda/Module.cpp, THCPModule_memorySnapshot; cuda/memory.py, memory_snapshot.
    """
    return [_segment(segment, device, frames or {}) for segment in segments]


def _segment(segment: Segment, device: int, frames: Mapping[int, Frames]) -> Json:
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
        "segment_pool_id": _POOL,
        "is_expandable": segment.is_expandable,
        "frames": [],
        "blocks": _blocks(segment.blocks, frames),
    }


def _blocks(blocks: Sequence[BlockState], frames: Mapping[int, Frames]) -> list[Json]:
    return [
        {
            "address": block.address,
            "size": block.num_bytes,
            "requested_size": block.requested_bytes,
            "state": "active_allocated" if block.is_allocated else "inactive",
            "frames": frames.get(block.address, []) if block.is_allocated else [],
        }
        for block in blocks
    ]
