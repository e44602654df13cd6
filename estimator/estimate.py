"""The answer: what is alive in each phase, and the peak."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, NamedTuple, TypeVar

from estimator.kernels import Kernel
from estimator.phases import Basis, Item, Phase

T = TypeVar("T")


class Engine(StrEnum):
    """What the step was worked out with."""

    ANALYTIC = "analytic"  # closed forms of the architecture
    TRACE = "trace"  # the libraries' own step on tensors without content


class LineItem(NamedTuple):
    """What one item takes in one phase."""

    # Made by position, and no dataclass as the others are: even an answer from what is kept makes some forty of them, and a
    # frozen dataclass with keywords takes over twice as long.
    item: Item
    num_bytes: int
    """Sum over its tensors of the size rounded up to 512 [bytes]."""
    basis: Basis


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEstimate:
    """What is alive at the worst instant of one phase."""

    phase: Phase
    items: tuple[LineItem, ...]

    @property
    def allocated_bytes(self) -> int:
        return sum(item.num_bytes for item in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A warning: a stable code and a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Bounds that hold for `coverage` of the cases like this one."""

    coverage: float
    allocated_low_bytes: int
    allocated_high_bytes: int
    device_low_bytes: int
    device_high_bytes: int
    basis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCounts:
    """Logical scalars, before packing."""

    total: int
    trainable: int
    adapter: int
    quantized: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What allocator and driver hold at the peak."""

    reserved_bytes: int
    """Segments of the caching allocator [bytes]."""
    device_bytes: int
    """What nvidia-smi shows [bytes]."""
    basis: Basis
    """`replayed`: the run's own allocations on the allocator; `modelled`: a share of what comes and goes."""
    without_pressure_bytes: int
    """What nvidia-smi would show on a card with room for all that is cached; more than `device_bytes` only where the run fits because the
    allocator gives its cache back [bytes]."""
    num_alloc_retries: int = 0
    """How often every step gives it back, once steps repeat each other; 0 where the first steps alone do."""


class Deferred(Generic[T]):
    """A value that is made at the first look."""

    __slots__ = ("_made", "_make")

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: T | None = None

    @classmethod
    def of(cls, value: T) -> "Deferred[T]":
        """One that is made already."""
        return cls(lambda: value)

    def get(self) -> T:
        if self._made is None:
            self._made = self._make()
        return self._made


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEstimate:
    """What one of several unequal cards holds at its worst."""

    rank: int
    phase: Phase
    allocated_bytes: int
    reserved_bytes: int | None
    device_bytes: int | None
    holds: str
    """What lies there, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Every phase with its items. `phases` holds only `load` when the step is not modelled."""

    parameters: ParameterCounts
    phases: tuple[PhaseEstimate, ...]
    steady_state_bytes: int | None
    """Allocated between steps, after the first one; None when the step is not modelled [bytes]."""
    holding: Deferred[Holding] = field(compare=False)
    """Worked out at the first look: a replay takes longer than the rest."""
    quick_device_bytes: int
    """What nvidia-smi shows, with what the allocator caches modelled as a share of what comes and goes: for searches [bytes]."""
    least_device_bytes: int
    """What nvidia-smi shows at least: without anything cached [bytes]."""
    unpressed: Callable[[int | None], int] | None = field(default=None, compare=False)
    """See `without_pressure_bytes`; None where the holding says it as fast."""
    paged_bytes: int = 0
    """Managed memory of paged optimizers, outside allocated and reserved [bytes]."""
    notices: tuple[Notice, ...] = ()
    engine: Engine = Engine.ANALYTIC
    engine_reason: str = ""
    """Why this engine answered."""
    kernels: frozenset[Kernel] = frozenset()
    """What the step runs, where it is modelled."""
    ranks: tuple[RankEstimate, ...] = ()
    """All cards, where they are unequal; the rest of the answer is that of the one that needs most. Empty where all are alike."""
    host_bytes: int = 0
    """Pinned memory of the host, for one rank [bytes]."""

    @property
    def reserved_bytes(self) -> int:
        """Segments held by the caching allocator at the peak [bytes]."""
        return self.holding.get().reserved_bytes

    @property
    def device_bytes(self) -> int:
        """What nvidia-smi shows at the peak [bytes]."""
        return self.holding.get().device_bytes

    def without_pressure_bytes(self, enough_bytes: int | None = None) -> int:
        """What nvidia-smi would show at the peak on a card with room for all that is cached [bytes].

        Args:
            enough_bytes: the answer may be too low where it is above this, and comes faster then [bytes].
        """
        return self.unpressed(enough_bytes) if self.unpressed is not None else self.holding.get().without_pressure_bytes

    @property
    def peak(self) -> PhaseEstimate:
        """The phase that needs most."""
        return max(self.phases, key=lambda p: p.allocated_bytes)
