"""Kernels whose memory differs so much that measurements of one say little about another."""

from enum import StrEnum


class Kernel(StrEnum):
    """What a step ran, beside plain operators."""

    FLASH = "flash attention"
    MEMORY_EFFICIENT = "memory-efficient attention"
    WRITTEN_OUT = "written-out attention"  # sdpa's fallback: float32 scores of S x S
    EAGER = "eager attention"
    EXPERTS = "grouped experts"
