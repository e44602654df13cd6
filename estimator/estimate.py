"""The answer: what is alive in each phase, and the peak."""

from dataclasses import dataclass
from enum import StrEnum

from estimator.kernels import Kernel
from estimator.phases import Basis, Item, Phase


class Engine(StrEnum):
    """What the step was worked out with."""

    ANALYTIC = "analytic"  # closed forms of the architecture
    TRACE = "trace"  # the libraries' own step on tensors without content


@dataclass(frozen=True, slots=True, kw_only=True)
class LineItem:
    """What one item takes in one phase."""

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
    reserved_bytes: int | None
    """Segments held by the caching allocator at the peak [bytes]."""
    device_bytes: int | None
    """What nvidia-smi shows at the peak [bytes]."""
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
    def peak(self) -> PhaseEstimate:
        """The phase that needs most."""
        return max(self.phases, key=lambda p: p.allocated_bytes)
