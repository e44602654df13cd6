"""Which layers of a model are alike, so that a few of each kind stand for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

# What numbers a layer without changing what it does.
_POSITIONS = ("layer_idx", "layer_id", "layer_number", "idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Some layers of a list, and which of them stands for each."""

    kept: tuple[int, ...]
    """Positions in the whole list, in order."""
    stands_for: tuple[int, ...]
    """For every layer of the whole list an index into `kept`."""


def sample(layers: Sequence[nn.Module], every_n: int = 1) -> Sample:
    """The first and last layer, and of each kind one in the middle and the last.

    Args:
        layers: all of them.
        every_n: only every n-th is checkpointed, which makes kinds of its own.
    """
    kinds = [(kind_of(layer), index % every_n == 0) for index, layer in enumerate(layers)]
    # The first layer is no model for others: the embedding that enters it outlives it.
    inner: dict[object, int] = {}
    last: dict[object, int] = {}
    for index, kind in enumerate(kinds):
        if index:
            inner.setdefault(kind, index)
        last[kind] = index
    kept = sorted({0, len(kinds) - 1, *inner.values(), *last.values()}) if kinds else []
    place = {index: position for position, index in enumerate(kept)}
    stands_for = tuple(place[index] if index in place else place[inner[kind]] for index, kind in enumerate(kinds))
    return Sample(kept=tuple(kept), stands_for=stands_for)


def kind_of(layer: nn.Module) -> object:
    """What a layer is: its modules, their plain attributes and the shapes of their tensors, whatever its position."""
    return tuple((name, type(module).__name__, _attributes(module), _tensors(module)) for name, module in layer.named_modules())


def _attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    plain = (str, int, float, bool, type(None), tuple)
    found: Mapping[str, Any] = vars(module)
    return tuple((k, v) for k, v in sorted(found.items()) if isinstance(v, plain) and k not in _POSITIONS and not k.startswith("__"))


def _tensors(module: nn.Module) -> tuple[tuple[Any, ...], ...]:
    parameters = ((k, tuple(p.shape), str(p.dtype), p.requires_grad) for k, p in module._parameters.items() if p is not None)
    buffers = ((k, tuple(b.shape), str(b.dtype), False) for k, b in module._buffers.items() if b is not None)
    return (*parameters, *buffers)
