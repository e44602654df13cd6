"""Sizes as they depend on the batch: B sequences of S tokens, K keys of a cache.

Legend: B micro-batch, S sequence length, K keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

from estimator.phases import Item
from estimator.units import allocated


class Extent(NamedTuple):
    """`coefficient · B^batch · (S + shift)^sequence · (K + offset)^keys` elements (of a tensor) or bytes (of a storage)."""

    coefficient: int
    batch: int = 0
    sequence: int = 0
    label: str = ""
    """What the tensor is, on a tape that names its tensors."""
    keys: int = 0
    """0 or 1."""
    offset: int = 0
    """How many keys more than K, where there is a power of it."""
    shift: int = 0
    """How many positions more than S, where there is one power of it."""

    def at(self, batch: int, sequence: int, keys: int = 0) -> int:
        size = self.coefficient * int(batch**self.batch) * int((sequence + self.shift) ** self.sequence)
        return size * (keys + self.offset) if self.keys else size

    def scaled(self, numerator: int, denominator: int = 1, label: str = "") -> "Extent":
        """The same with the coefficient multiplied by a fraction that leaves it whole.

        Raises:
            NotImplementedError: if it does not, as halves of a head of odd size: a config can say so, and no formula is meant for it.
        """
        if denominator == 0 or self.coefficient * numerator % denominator:
            raise NotImplementedError(f"{self.coefficient * numerator} elements a token, which {denominator} does not divide")
        scaled = self.coefficient * numerator // denominator
        return Extent(scaled, self.batch, self.sequence, label, self.keys, self.offset, self.shift)

    def times(self, other: "Extent") -> "Extent":
        """The product of two extents, of which one at most knows K."""
        assert not (self.keys and other.keys), (self, other)
        assert (self.shift, other.shift) == (0, 0), (self, other)
        keyed = other if other.keys else self
        batch, sequence = self.batch + other.batch, self.sequence + other.sequence
        return Extent(self.coefficient * other.coefficient, batch, sequence, "", keyed.keys, keyed.offset)

    def totals(self) -> list[int]:
        """The coefficient in the order of `POWERS`."""
        return Polynomial((self,)).totals()


# Powers of (B, S, K) that occur, in the order of a snapshot's totals.
POWERS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (1, 2, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1))
POWER_INDEX = {power: i for i, power in enumerate(POWERS)}


class Polynomial(NamedTuple):
    """A size that is a sum of extents: `8·B·S + 8·B` for labels with one position more."""

    terms: tuple[Extent, ...]
    label: str = ""

    def at(self, batch: int, sequence: int, keys: int = 0) -> int:
        return sum(term.at(batch, sequence, keys) for term in self.terms)

    def totals(self) -> list[int]:
        """Coefficients in the order of `POWERS`."""
        sums = [0] * len(POWERS)
        for term in self.terms:
            sums[POWER_INDEX[term.batch, term.sequence, 0]] += term.coefficient
            if term.shift:
                sums[POWER_INDEX[term.batch, 0, 0]] += term.coefficient * term.shift
        return sums


Size = Extent | Polynomial


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was alive at one instant: each kind of storage and how many of it."""

    totals: tuple[int, ...]
    """Bytes per power of (B, S, K), in the order of `POWERS`."""
    held: tuple[tuple[tuple[Item, Size], int], ...]

    def at(self, batch: int, sequence: int, keys: int = 0) -> int:
        """Bytes before rounding [bytes]."""
        c, b, s, bs, ss, bss, k, bk, sk, bsk = self.totals
        tokens = batch * sequence
        alone = c + b * batch + s * sequence + tokens * (bs + bss * sequence) + ss * sequence * sequence
        return alone + keys * (k + bk * batch + sk * sequence + bsk * tokens) if keys else alone

    def unnamed(self) -> "Snapshot":
        """The same without labels: what differs by them alone is counted together."""
        held: dict[tuple[Item, Size], int] = {}
        for (item, size), number in self.held:
            key = item, size._replace(label="")
            held[key] = held.get(key, 0) + number
        return Snapshot(self.totals, tuple(held.items()))

    def items(self, batch: int, sequence: int, keys: int = 0) -> dict[Item, int]:
        """Bytes per item, each storage rounded up as the allocator does [bytes]."""
        sums: dict[Item, int] = {}
        for (item, extent), number in self.held:
            sums[item] = sums.get(item, 0) + number * allocated(extent.at(batch, sequence, keys))
        return sums
