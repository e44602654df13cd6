"""Operations whose result is as long as a mask has ones: the mask's value is known, see `known`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from estimator.introspect.trace.errors import NeedsValuesError
from estimator.introspect.trace.known import value_of

aten = torch.ops.aten


def _count(mask: Tensor) -> int:
    value = value_of(mask)
    if value is None:
        raise NeedsValuesError("how many positions are chosen depends on weights or activations")
    with _disable_current_modes():
        return int(value.count_nonzero())


def _is_mask(index: object) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _index(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    """`tensor[mask]`, the mask over the first dimensions."""
    first, *rest = indices
    if not _is_mask(first) or rest:
        result: Tensor = aten.index.Tensor(tensor, indices)
        return result
    assert first is not None
    return tensor.new_empty((_count(first), *tensor.shape[first.dim() :]))


def _index_put(tensor: Tensor, indices: list[Tensor | None], values: Tensor, accumulate: bool = False, unsafe: bool = False) -> Tensor:
    if any(map(_is_mask, indices)):
        return tensor
    result: Tensor = aten._index_put_impl_.default(tensor, indices, values, accumulate, unsafe)
    return result


def _masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor.new_empty(_count(mask))


def _masked_scatter_backward(gradient: Tensor, mask: Tensor, sizes: list[int]) -> Tensor:
    """The gradient at the mask's ones; none is missing, since the source was as long as there are ones."""
    return gradient.new_empty(sizes)


KERNELS: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: _index,
    aten._index_put_impl_.default: _index_put,
    aten.masked_select.default: _masked_select,
    aten.masked_scatter_backward.default: _masked_scatter_backward,
}
"""Handed to `Watch`."""
