"""Names with numbers taken out: expanding them, and splitting the copies they stand for."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import product
from typing import TypeVar

Numbers = tuple[int, ...]
Indices = tuple[tuple[int, ...], ...]
Label = TypeVar("Label", bound=Hashable)


def copies(pattern: str, indices: Indices) -> Iterator[tuple[Numbers, str]]:
    """The numbers and the full name of every copy."""
    for numbers in product(*indices):
        yield numbers, pattern.format(*numbers)


def in_order(patterns: Iterable[tuple[str, Indices]]) -> list[tuple[int, str]]:
    """All copies in the order of the modules, one layer after the other, each with the position of its pattern.

    >>> in_order([("h.{}.a", ((0, 1),)), ("h.{}.b", ((0, 1),)), ("norm", ())])
    [(0, 'h.0.a'), (1, 'h.0.b'), (0, 'h.1.a'), (1, 'h.1.b'), (2, 'norm')]
    """
    listed = list(patterns)
    begins: dict[str, int] = {}
    parts = [pattern.split("{}")[:-1] for pattern, _ in listed]
    stems = [["{}".join(part[: n + 1]) for n in range(len(part))] for part in parts]
    for position, prefixes in enumerate(stems):
        for prefix in prefixes:
            begins.setdefault(prefix, position)
    found = [
        ((*(n for prefix, number in zip(stems[position], numbers, strict=True) for n in (begins[prefix], number)), position), name)
        for position, (pattern, indices) in enumerate(listed)
        for numbers, name in copies(pattern, indices)
    ]
    return [(place[-1], name) for place, name in sorted(found)]


def products(chosen: Iterable[Numbers]) -> list[Indices]:
    """Cartesian products that together hold each of the chosen tuples once.

    >>> products([(0, 0), (0, 1), (1, 0), (1, 1)])
    [((0, 1), (0, 1))]
    >>> products([(0, 0), (1, 1)])
    [((0,), (0,)), ((1,), (1,))]
    """
    rests: dict[int, list[Numbers]] = {}
    for numbers in chosen:
        if not numbers:
            return [()]
        rests.setdefault(numbers[0], []).append(numbers[1:])
    firsts: dict[tuple[Numbers, ...], list[int]] = {}
    for first, rest in rests.items():
        firsts.setdefault(tuple(rest), []).append(first)
    return [(tuple(numbers), *tail) for rest, numbers in firsts.items() for tail in products(rest)]


def partition(pattern: str, indices: Indices, label: Callable[[str], Label]) -> list[tuple[Label, Indices]]:
    """The copies of a pattern, split by what `label` says of each full name.

    Args:
        pattern: name with `{}` for numbers.
        indices: for each `{}` the numbers it takes.
        label: called with the full name of each copy.

    Returns:
        pairs of a label and the indices of copies that have it; together they hold each copy once.
    """
    chosen: dict[Label, list[Numbers]] = {}
    for numbers, name in copies(pattern, indices):
        chosen.setdefault(label(name), []).append(numbers)
    if len(chosen) == 1:
        return [(only, indices) for only in chosen]
    return [(which, part) for which, members in chosen.items() for part in products(members)]


def parent(pattern: str) -> str:
    """Name of the module that owns a tensor."""
    return pattern.rpartition(".")[0]


def leaf(pattern: str) -> str:
    """Last component of a name."""
    return pattern.rpartition(".")[2]
