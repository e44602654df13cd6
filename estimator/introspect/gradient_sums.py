"""Sums of gradients in the first one of them, which torch's engine leaves off under a dispatch mode."""

import sys
from typing import Any

import torch

ADD = torch.ops.aten.add.Tensor
ADD_IN_PLACE = torch.ops.aten.add_.Tensor

# References to a gradient that only the engine holds, and to its storage, seen from `__torch_dispatch__`: the engine's buffer, the
# arguments on their way here and the Python objects around them. A view is known by the base that it keeps alive.
_PRIVATE_TENSOR, _PRIVATE_STORAGE = 4, 2

# What lies between the engine's call and this module: the mode's own method and torch's wrappers around it.
_BETWEEN = ("sums_in_place", "_is_called_by_engine", "__torch_dispatch__", "_fn", "inner")


def sums_in_place(func: Any, args: Any) -> bool:
    """Whether this is the engine summing two gradients, and would do so in the first one were no dispatch mode around.

    Called from `__torch_dispatch__`. Under any mode the engine takes every tensor for a subclass and makes a third one.

    Source: torch, csrc/autograd/input_buffer.cpp, can_accumulate_inplace (subclass-like; last reference to tensor and storage; dense).
    """
    if func is not ADD or len(args) != 2 or torch.is_grad_enabled() or not _is_called_by_engine():
        return False
    old = args[0]
    storage = old.untyped_storage()
    return bool(
        isinstance(args[1], torch.Tensor)
        and old.shape == args[1].shape
        and old._use_count() == _PRIVATE_TENSOR
        and torch._C._storage_Use_Count(storage._cdata) == _PRIVATE_STORAGE
    )


def _is_called_by_engine() -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name in _BETWEEN:
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"
