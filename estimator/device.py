"""What a process takes on the card beside the allocator's segments: CUDA context, library code, cuBLAS workspaces. All `modelled`."""

from estimator.units import KIB, MIB

# Architectures whose matrix units want large workspaces.
_LARGE_WORKSPACE_MAJORS = (9, 10, 12)
# Compute capability from which the flash kernels run: see `attention.scaled_dot_product`.
_FLASH_KERNELS = (8, 0)


def context_bytes(num_sms: int) -> int:
    """A bare CUDA context: local memory and printf buffers grow with the multiprocessors.

    Args:
        num_sms: streaming multiprocessors of the card.

    Returns:
        12.7 MiB + 2.9 MiB per multiprocessor [bytes].

    Source: straight line through four published figures: RTX 4060 Ti (34 SMs, 107 MiB) and RTX PRO 6000 (188, 555) in llama.cpp issue
    23604, RTX 3090 (82, 256) in InvokeAI issue 9413, RTX 6000 Ada (142, 426) in unsloth-zoo issue 1053. Within 4 % on each.
    """
    return int((12.7 + 2.9 * num_sms) * MIB)


def library_bytes() -> int:
    """Code and tables of cuBLAS, bitsandbytes and attention kernels once they are loaded lazily [bytes].

    A round figure without a measurement of its own: public reports speak of tens of MiB per library, and a training step loads a few.
    """
    return 128 * MIB


def workspace_bytes(compute_capability: tuple[int, int]) -> int:
    """One cuBLAS workspace, allocated through the caching allocator at the first matrix product of a thread and never freed.

    Args:
        compute_capability: of the card.

    Returns:
        32 MiB on compute capability 9, 10 and 12, else 2 × 4096 KiB + 8 × 16 KiB = 8.125 MiB [bytes].

    Source: torch, aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize.
    """
    if compute_capability[0] in _LARGE_WORKSPACE_MAJORS:
        return 32 * MIB
    return (2 * 4096 + 8 * 16) * KIB


def same_kernels(compute_capability: tuple[int, int]) -> tuple[int, int]:
    """One compute capability for all that run the same kernels with the same workspaces: what a step allocates is the same on them."""
    if compute_capability[0] in _LARGE_WORKSPACE_MAJORS:
        return 9, 0
    return (8, 0) if compute_capability >= _FLASH_KERNELS else (7, 0)


def workspaces_bytes(compute_capability: tuple[int, int], *, training: bool) -> int:
    """All cuBLAS workspaces of a process: handles belong to host threads, and the backward pass runs in a thread of its own [bytes].

    Source: torch, aten/src/ATen/cuda/CublasHandlePool.cpp, getCurrentCUDABlasHandle (a pool of handles per thread).
    """
    return workspace_bytes(compute_capability) * (2 if training else 1)


def device_bytes(*, reserved_bytes: int, context_bytes: int, paged_bytes: int = 0) -> int:
    """What nvidia-smi shows for the process [bytes].

    Args:
        reserved_bytes: segments of the caching allocator [bytes].
        context_bytes: CUDA context of the card [bytes].
        paged_bytes: managed memory while it is resident [bytes].
    """
    return reserved_bytes + context_bytes + library_bytes() + paged_bytes
