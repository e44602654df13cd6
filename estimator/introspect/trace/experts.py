"""The grouped product of experts: torch's shape function refuses types that its kernels multiply one expert after the other."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """An empty result of the right shape.

    Source: torch, ATen/native/GroupedMMUtils.h, create_grouped_gemm_output_tensor; cuda/GroupedBlas.cpp, _grouped_mm_cuda.
    """
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        shape: tuple[int, ...] = (offs.shape[0], a.shape[0], b.shape[1])
    elif a.dim() == 2:
        shape = (a.shape[0], b.shape[-1])
    elif b.dim() == 2:
        shape = (a.shape[1], b.shape[1])
    else:
        shape = (a.shape[0], a.shape[1], b.shape[-1])
    return torch.empty(shape, dtype=out_dtype or a.dtype)


EXPERT_KERNELS: dict[Any, Callable[..., Any]] = {torch.ops.aten._grouped_mm.default: grouped_mm}
