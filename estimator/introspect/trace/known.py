"""The few values a model looks at while it runs (masks, positions, lengths, routing): computed beside the tensors that have no content."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from estimator.introspect.trace.errors import NeedsValuesError
from estimator.introspect.trace.routing import Routing

# Masks, positions and choices of experts; a larger tensor has no known value.
_LARGEST = 2**26
_LARGEST_FLOAT = 2**20

_READ = torch.ops.aten._local_scalar_dense.default
_INDEX = torch.ops.aten.index.Tensor
_TOPK = torch.ops.aten.topk.default

# Their results depend on the shape of what they are given alone.
_CONTENT_FREE = (
    torch.ops.aten.zeros_like.default,
    torch.ops.aten.ones_like.default,
    torch.ops.aten.full_like.default,
    torch.ops.aten.new_zeros.default,
    torch.ops.aten.new_ones.default,
    torch.ops.aten.new_full.default,
)

# What they return has no values yet.
_EMPTY = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
)

# Operations whose results have as many elements as the values say.
_SIZED_BY_VALUES = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


def give(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Makes a tensor's value known."""
    tensor._vramplan_value = value  # type: ignore[attr-defined]
    return tensor


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The value of a tensor where it is known; a tensor with content is its own."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    value: torch.Tensor | None = getattr(tensor, "_vramplan_value", None)
    return None if value is not None and hasattr(tensor.untyped_storage(), "_vramplan_overwritten") else value


class Values:
    """What is known of a run's values, and what had to be assumed.

    Args:
        routing: how routers are taken to choose.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.routing_matters = False
        """Whether the program looked at a choice of experts."""

    def read(self, func: Any, args: tuple[Any, ...]) -> Any:
        """What Python reads off a tensor (`item`, `bool`), or None when `func` is another operation.

        Raises:
            NeedsValuesError: if the value depends on weights or activations, which have none.
        """
        if func is not _READ:
            return None
        value = value_of(args[0])
        if value is None:
            raise NeedsValuesError("the program reads a value that depends on weights or activations")
        self._look(value)
        with _disable_current_modes():
            return value.item()

    def sized(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The results of an operation that makes as many elements as the values of its arguments say, or None for any other.

        Where an argument is not known either, the operation itself refuses.
        """
        if func is _INDEX:
            return self._indexed(args)
        if not any(tag in func.tags for tag in _SIZED_BY_VALUES):
            return None
        found = _computed(func, args, kwargs)
        if not found:
            return None
        for value in _tensors(args, kwargs):
            self._look(value_of(value))
        results = [give(torch.empty(value.shape, dtype=value.dtype), value) for value in found]
        return results if len(results) > 1 or func is torch.ops.aten.nonzero_numpy.default else results[0]

    def _indexed(self, args: tuple[Any, ...]) -> Any:
        """`x[mask]`: the positions where the mask holds, then a gather; the kernel does the same.

        Source: torch, ATen/native/IndexingUtils.h, expandTensors.
        """
        tensor, indices = args
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        if not masks or any(value_of(m) is None for m in masks):
            return None
        expanded: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                expanded.append(index)
                continue
            value = value_of(index)
            assert value is not None
            self._look(value)
            with _disable_current_modes():
                places = value.nonzero(as_tuple=True)
            expanded += [give(torch.empty(place.shape, dtype=place.dtype), _marked(place, [value])) for place in places]
        return _INDEX(tensor, expanded)

    def _look(self, value: torch.Tensor | None) -> None:
        self.routing_matters |= _is_assumed(value)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[torch.Tensor]) -> None:
        """Computes the values of the results where those of all arguments are known."""
        given = _tensors(args, kwargs)
        if not results and func._schema.is_mutable and all(value_of(t) is not None for t in given):
            _computed(func, args, kwargs)  # several tensors changed in place: their values with them
            return
        if func is _TOPK and value_of(args[0]) is None:
            self._choose(args, results)
            return
        if func in _CONTENT_FREE and _is_worth_knowing(results[0]):
            with _disable_current_modes():
                like = torch.empty((), dtype=args[0].dtype).expand(args[0].shape)
                give(results[0], func(like, *args[1:], **kwargs).contiguous())
            return
        if any(value_of(t) is None for t in given) or not results or not all(map(_is_worth_knowing, results)):
            _forget(func, args, kwargs)
            return
        if func in _EMPTY or (not given and torch.Tag.nondeterministic_seeded in func.tags):
            return
        for result, value in zip(results, _computed(func, args, kwargs), strict=False):
            give(result, value)

    def _choose(self, args: tuple[Any, ...], results: Sequence[torch.Tensor]) -> None:
        scores, k, *rest = args
        if (rest and rest[0] not in (-1, scores.dim() - 1)) or not _is_worth_knowing(results[1]):
            return
        with _disable_current_modes():
            value = self.routing.choice(scores.shape, k)
            value._vramplan_assumed = True  # type: ignore[attr-defined]
        give(results[1], value)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The values an operation yields, none where one of its arguments has none."""
    given = [value_of(t) for t in _tensors(args, kwargs)]
    if any(value is None for value in given):
        return []
    with _disable_current_modes(), torch.no_grad():
        found = func(*tree_map_only(torch.Tensor, value_of, args), **tree_map_only(torch.Tensor, value_of, kwargs))
        return [_marked(value, given) for value in tree_leaves(found) if isinstance(value, torch.Tensor)]


def _marked(value: torch.Tensor, sources: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """What is computed from an assumption is one."""
    if any(map(_is_assumed, sources)):
        value._vramplan_assumed = True  # type: ignore[attr-defined]
    return value


def _is_assumed(value: torch.Tensor | None) -> bool:
    return getattr(value, "_vramplan_assumed", False)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, torch.Tensor)]
    return found


def _is_worth_knowing(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (_LARGEST_FLOAT if tensor.dtype.is_floating_point else _LARGEST)


def _forget(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A tensor written to with unknown values is itself unknown, and so is all that shares its memory."""
    if not func._schema.is_mutable:
        return
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written = args[position] if position < len(args) else kwargs.get(argument.name)
        for tensor in tree_leaves(written):
            if isinstance(tensor, FakeTensor):
                tensor.untyped_storage()._vramplan_overwritten = True  # type: ignore[attr-defined]
