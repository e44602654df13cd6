"""From single tensors to rows: names that differ only in numbers become one pattern."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from estimator.dtypes import DType
from estimator.inventory import ModuleKind, TensorRole, TensorRow

Numbers = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of the built model."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    role: TensorRole
    module_kind: ModuleKind
    module_class: str
    tied_to: str | None
    dtype_is_fixed: bool
    is_frozen: bool = False


def group(tensors: Iterable[Tensor]) -> tuple[TensorRow, ...]:
    """Rows in the order of their first tensor; a set of indices that is no cartesian product becomes several rows."""
    members: dict[tuple[str, Tensor], list[Numbers]] = {}
    for tensor in tensors:
        pattern, numbers = split_name(tensor.name)
        # The name is replaced by the pattern, so that equal keys are tensors that differ in their numbers only.
        key = Tensor(
            name=pattern,
            shape=tensor.shape,
            dtype=tensor.dtype,
            role=tensor.role,
            module_kind=tensor.module_kind,
            module_class=tensor.module_class,
            tied_to=tensor.tied_to,
            dtype_is_fixed=tensor.dtype_is_fixed,
            is_frozen=tensor.is_frozen,
        )
        members.setdefault((pattern, key), []).append(numbers)
    return tuple(
        TensorRow(
            pattern=pattern,
            indices=indices,
            shape=key.shape,
            dtype=key.dtype,
            role=key.role,
            module_kind=key.module_kind,
            module_class=key.module_class,
            tied_to=key.tied_to,
            dtype_is_fixed=key.dtype_is_fixed,
            is_frozen=key.is_frozen,
        )
        for (pattern, key), numbers in members.items()
        for indices in products(numbers)
    )


def split_name(name: str) -> tuple[str, Numbers]:
    """`model.layers.3.mlp.weight` as `model.layers.{}.mlp.weight` and `(3,)`."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if part.isdecimal())
    # Braces cannot occur in a module's attribute name, but may in a ModuleDict's key.
    escaped = (part.replace("{", "{{").replace("}", "}}") for part in parts)
    return ".".join("{}" if part.isdecimal() else part for part in escaped), numbers


def products(tuples: Sequence[Numbers]) -> list[tuple[Numbers, ...]]:
    """Cartesian products whose disjoint union is the set of tuples, all of one length.

    >>> products([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)])
    [((0, 1), (0, 1)), ((2,), (0,))]
    """
    if not tuples[0]:
        return [()]
    rests: dict[int, list[Numbers]] = {}
    for numbers in tuples:
        rests.setdefault(numbers[0], []).append(numbers[1:])
    firsts: dict[tuple[Numbers, ...], list[int]] = {}
    for first, tails in rests.items():
        firsts.setdefault(tuple(tails), []).append(first)
    return [(tuple(numbers), *tail) for tails, numbers in firsts.items() for tail in products(tails)]
