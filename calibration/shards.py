"""A campaign divided between machines that know nothing of each other: each takes its share, and the records are merged afterwards."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from calibration.case import Case
from estimator.errors import RequestError

_SHARD = re.compile(r"([1-9]\d{0,4})/([1-9]\d{0,4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One of several shares, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """`2/8` is the second of eight.

        Raises:
            RequestError: if it is not of this form.
        """
        match = _SHARD.fullmatch(text.strip())
        if match is None or int(match[1]) > int(match[2]):
            raise RequestError(f"shard: {text!r} is not accepted; expected NUMBER/OF, such as 2/8", field="shard")
        return cls(number=int(match[1]), of=int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def take(self, cases: Sequence[Case], cost: Callable[[Case], float]) -> tuple[Case, ...]:
        """This share of the cases: dear ones are dealt out first, so that shares cost about the same.

        Every machine deals alike, whatever order it has the cases in.
        """
        return tuple(sorted(cases, key=lambda case: (-cost(case), case.hash)))[self.number - 1 :: self.of]
