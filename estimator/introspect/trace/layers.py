"""Which layers of a model are alike, so that a few of each kind stand for all."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import nn

_PLAIN = (str, int, float, bool, type(None), tuple, list)

_Attribute = tuple[str, str]
"""A module's name within its layer, and the name of one of its attributes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Some layers of a list, and which of them stands for each."""

    kept: tuple[int, ...]
    """Positions in the whole list, in order."""
    stands_for: tuple[int, ...]
    """For every layer of the whole list an index into `kept`."""
    kinds: tuple[int, ...]
    """For every layer of `kept` a number that those of its kind share."""


def whole(number: int) -> Sample:
    """Every layer for itself."""
    return Sample(kept=tuple(range(number)), stands_for=tuple(range(number)), kinds=tuple(range(number)))


def sample(layers: Sequence[nn.Module], every_n: int = 1) -> Sample:
    """The first and last layer, and of each kind one in the middle and the last.

    Args:
        layers: all of them.
        every_n: only every n-th is checkpointed, which makes kinds of its own.
    """
    numbering = _numbering(layers)
    holders = Counter(key for layer in layers for key in {id(p) for p in layer.parameters()})
    # What layers share gets one gradient for all of them: none of these stands for another.
    shares = [any(holders[id(p)] > 1 for p in layer.parameters()) for layer in layers]
    kinds = [(kind_of(layer, numbering), index % every_n == 0, index if shares[index] else None) for index, layer in enumerate(layers)]
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
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return Sample(kept=tuple(kept), stands_for=stands_for, kinds=tuple(numbers[kinds[index]] for index in kept))


def kind_of(layer: nn.Module, numbering: AbstractSet[_Attribute] = frozenset()) -> object:
    """What a layer is: its modules, their plain attributes and the shapes of their tensors.

    Args:
        numbering: attributes that only tell layers apart.
    """
    return tuple(
        (name, type(module).__name__, _attributes(name, module, numbering), _tensors(module)) for name, module in layer.named_modules()
    )


def _numbering(layers: Sequence[nn.Module]) -> AbstractSet[_Attribute]:
    """Attributes that grow by the same step from every layer to the next that has them: `layer_idx` and what is made of it."""
    seen: dict[_Attribute, list[tuple[int, int]]] = defaultdict(list)
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool):
                    seen[name, key].append((index, value))
    return {attribute for attribute, values in seen.items() if _is_numbering(values)}


def _is_numbering(values: Sequence[tuple[int, int]]) -> bool:
    if len(values) < 2:
        return False
    (first, start), (second, following) = values[:2]
    step, rest = divmod(following - start, second - first)
    return rest == 0 and step > 0 and all(value == start + step * (index - first) for index, value in values)


def _attributes(name: str, module: nn.Module, numbering: AbstractSet[_Attribute]) -> tuple[tuple[str, object], ...]:
    found: Mapping[str, Any] = vars(module)
    return tuple(
        (key, _plain(value))
        for key, value in sorted(found.items())
        if isinstance(value, _PLAIN) and (name, key) not in numbering and not key.startswith("__")
    )


def _plain(value: object) -> object:
    """A value as far as it can decide what a layer does: fractions scale, and only none or all of something is a path of its own."""
    if isinstance(value, float):
        return value if value in (0.0, 1.0) else float
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value


def _tensors(module: nn.Module) -> tuple[tuple[Any, ...], ...]:
    parameters = ((k, tuple(p.shape), str(p.dtype), p.requires_grad) for k, p in module._parameters.items() if p is not None)
    buffers = ((k, tuple(b.shape), str(b.dtype), False) for k, b in module._buffers.items() if b is not None)
    return (*parameters, *buffers)
