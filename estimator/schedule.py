"""A training step as the allocator sees it: what is asked for and given back, in order, at every batch and length of a regime.

Legend: B micro-batch, S sequence length.
"""

import base64
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from estimator.extent import Extent, Polynomial, Size

_CODE = "i"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Forward, loss and backward pass of one micro-batch.

    Whole models have tens of thousands of events that repeat from layer to layer: they are held compressed.
    """

    sizes: tuple[Size, ...]
    """Those that occur [bytes]."""
    packed_kinds: bytes
    packed_events: bytes
    backward: int
    """Index of the event at which the backward pass begins."""
    kept: tuple[int, ...]
    """What stays until the optimizer has stepped: gradients. All else goes with the micro-batch."""

    @classmethod
    def of(cls, sizes: Iterable[Size], events: Sequence[int], *, backward: int, kept: Sequence[int]) -> "MicroBatch":
        """From the size of every storage, and `i` where storage `i` is made, `~i` where it is released."""
        known, kinds = told_apart(sizes)
        return cls.made_of(known, kinds, events, backward=backward, kept=kept)

    @classmethod
    def made_of(
        cls, sizes: Sequence[Size], kinds: Sequence[int], events: Sequence[int], *, backward: int, kept: Sequence[int]
    ) -> "MicroBatch":
        """From the sizes that occur, which of them every storage has, and events."""
        return cls(sizes=tuple(sizes), packed_kinds=_packed(kinds), packed_events=_packed(events), backward=backward, kept=tuple(kept))

    @property
    def kinds(self) -> Sequence[int]:
        """For every storage, which of the sizes it has."""
        return _unpacked(self.packed_kinds)

    @property
    def events(self) -> Sequence[int]:
        """`i` where storage `i` is made, `~i` where it is released."""
        return _unpacked(self.packed_events)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schedule:
    """The micro-batches of a step: the first, and all others, which find the gradients there."""

    first: MicroBatch
    later: MicroBatch


def told_apart(sizes: Iterable[Size]) -> tuple[list[Size], list[int]]:
    """The sizes that occur, and for every one which of them it is."""
    known: dict[Size, int] = {}
    kinds = [known.setdefault(size, len(known)) for size in sizes]
    return list(known), kinds


def _packed(numbers: Sequence[int]) -> bytes:
    return zlib.compress(array(_CODE, numbers).tobytes(), 1)


def _unpacked(content: bytes) -> Sequence[int]:
    numbers = array(_CODE)
    numbers.frombytes(zlib.decompress(content))
    return numbers


def encode_schedule(schedule: Schedule) -> dict[str, object]:
    """As JSON values."""
    same = schedule.later is schedule.first
    return {"first": _encoded(schedule.first), "later": None if same else _encoded(schedule.later)}


def _encoded(part: MicroBatch) -> dict[str, object]:
    return {
        "sizes": [[[t.coefficient, t.batch, t.sequence] for t in (s.terms if isinstance(s, Polynomial) else (s,))] for s in part.sizes],
        "kinds": base64.b64encode(part.packed_kinds).decode(),
        "events": base64.b64encode(part.packed_events).decode(),
        "backward": part.backward,
        "kept": list(part.kept),
    }


def decode_schedule(data: Mapping[str, Any]) -> Schedule:
    """The inverse of `encode_schedule`.

    Raises:
        ValueError, KeyError, TypeError: if the values are not of that form.
    """
    first = _decoded(data["first"])
    return Schedule(first=first, later=first if data["later"] is None else _decoded(data["later"]))


def _decoded(data: Mapping[str, Any]) -> MicroBatch:
    return MicroBatch(
        sizes=tuple(Polynomial(tuple(Extent(*term) for term in terms)) for terms in data["sizes"]),
        packed_kinds=base64.b64decode(data["kinds"], validate=True),
        packed_events=base64.b64decode(data["events"], validate=True),
        backward=int(data["backward"]),
        kept=tuple(map(int, data["kept"])),
    )
