"""The few values a model looks at while it runs (masks, positions, lengths): computed beside the tensors that have no content."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from estimator.introspect.trace.errors import NotTraceableError

# Masks and positions; a larger tensor has no known value.
_LARGEST = 2**22

_READ = torch.ops.aten._local_scalar_dense.default


def give(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Makes a tensor's value known."""
    tensor._vramplan_value = value  # type: ignore[attr-defined]
    return tensor


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The value of a tensor where it is known; a tensor with content is its own."""
    return getattr(tensor, "_vramplan_value", None) if isinstance(tensor, FakeTensor) else tensor


def read(func: Any, args: tuple[Any, ...]) -> Any:
    """What Python reads off a tensor (`item`, `bool`), or None when `func` is another operation.

    Raises:
        NotTraceableError: if the value depends on weights or activations, which have none.
    """
    if func is not _READ:
        return None
    value = value_of(args[0])
    if value is None:
        raise NotTraceableError("the program reads a value that depends on weights or activations")
    with _disable_current_modes():
        return value.item()


def follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[torch.Tensor]) -> None:
    """Computes the values of the results where those of all arguments are known."""
    given = _tensors(args, kwargs)
    if not results and func._schema.is_mutable and all(value_of(t) is not None for t in given):
        with _disable_current_modes(), torch.no_grad():  # several tensors changed in place: their values with them
            func(*tree_map_only(torch.Tensor, value_of, args), **tree_map_only(torch.Tensor, value_of, kwargs))
        return
    if any(value_of(t) is None for t in given) or not results or not all(map(_is_worth_knowing, results)):
        _forget(func, args, results)
        return
    if not given and torch.Tag.nondeterministic_seeded in func.tags:
        return
    with _disable_current_modes(), torch.no_grad():
        found = func(*tree_map_only(torch.Tensor, value_of, args), **tree_map_only(torch.Tensor, value_of, kwargs))
    values = [v for v in (found if isinstance(found, (list, tuple)) else [found]) if isinstance(v, torch.Tensor)]
    for result, value in zip(results, values, strict=False):
        give(result, value)


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, torch.Tensor)]
    return found


def _is_worth_knowing(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= (1 if tensor.dtype.is_floating_point else _LARGEST)


def _forget(func: Any, args: tuple[Any, ...], results: list[torch.Tensor]) -> None:
    """A tensor written to with unknown values is itself unknown."""
    if not func._schema.is_mutable:
        return
    for result in results:
        if any(result is a for a in args) and hasattr(result, "_vramplan_value"):
            del result._vramplan_value
