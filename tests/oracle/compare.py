"""Peaks of whole steps, tape against real model, over a grid of families, modes and options: a table with the worst cell first."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from estimator.blocks.families import FAMILIES as BLOCKS
from estimator.errors import VramplanError
from estimator.phases import Phase
from tests.oracle.estimates import live_bytes
from tests.oracle.models import FAMILIES, MODES, Mode
from tests.oracle.run import step

PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)
MODELLED = tuple(name for name, family in FAMILIES.items() if family.config(2).model_type in BLOCKS)
GC_NAMES = {None: "off", False: "on", True: "reentrant"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One step to compare."""

    family: str
    mode: str
    gc: bool | None = None
    attention: str | None = None
    """The family's default if None."""
    padded: bool = False
    dropout: float = 0.0
    """Of the adapter."""
    B: int = 3
    S: int = 48
    layers: int = 4

    def __str__(self) -> str:
        words = [self.family, self.mode, f"gc {GC_NAMES[self.gc]}"]
        words += [self.attention] if self.attention else []
        words += ["padded"] if self.padded else []
        words += [f"dropout {self.dropout}"] if self.dropout else []
        return f"{' '.join(words)} {self.B}×{self.S}"

    def run(self) -> "Outcome":
        """The peaks of both."""
        mode: Mode = MODES[self.mode]
        if self.dropout:
            mode = mode.with_adapter(dropout=self.dropout)
        options: dict[str, Any] = {"gc": self.gc, "attention": self.attention, "padded": self.padded}
        try:
            said = live_bytes(self.family, mode, self.B, self.S, self.layers, **options)
        except (VramplanError, NotImplementedError) as error:
            return Outcome(cell=self, refused=f"{type(error).__name__}: {error}")
        try:
            return self._compared(mode, said, options)
        except (ValueError, RuntimeError) as error:  # a kernel that the class refuses, sizes that it cannot be run at
            return Outcome(cell=self, refused=f"the real step: {error}")

    def _compared(self, mode: Mode, said: Mapping[Phase, int], options: Mapping[str, Any]) -> "Outcome":
        report = step(self.family, mode, self.B, self.S, self.layers, granularity_bytes=1, **options)
        return Outcome(cell=self, peaks=tuple((said[phase], report.first[phase.value].live_bytes) for phase in PHASES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came out of one cell."""

    cell: Cell
    peaks: tuple[tuple[int, int], ...] = ()
    """(said, real) of every phase, above static memory [bytes]."""
    refused: str = ""
    """Why there is nothing to compare."""

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative to what is real, by phase."""
        return tuple(said / real - 1 for said, real in self.peaks)

    @property
    def worst(self) -> float:
        return max(map(abs, self.errors), default=0.0)

    def __str__(self) -> str:
        if self.refused:
            return f"{self.cell}: {self.refused}"
        return " ".join(f"{100 * error:>+8.2f}" for error in self.errors) + f"   {self.cell}"


def grid(
    *,
    families: Sequence[str] = MODELLED,
    modes: Sequence[str] = tuple(MODES),
    gcs: Sequence[bool | None] = (None, False, True),
    attentions: Sequence[str | None] = (None,),
    padded: Sequence[bool] = (False,),
    dropouts: Sequence[float] = (0.0,),
    sizes: Sequence[tuple[int, int]] = ((3, 48),),
) -> Iterator[Cell]:
    """Every combination; dropout only where there is an adapter."""
    for family, mode, gc, attention, pads, dropout, (B, S) in itertools.product(families, modes, gcs, attentions, padded, dropouts, sizes):
        if dropout and MODES[mode].adapter is None:
            continue
        yield Cell(family=family, mode=mode, gc=gc, attention=attention, padded=pads, dropout=dropout, B=B, S=S)


def sample(cells: Sequence[Cell], number: int, seed: int = 0) -> list[Cell]:
    """As many of them, the same ones for the same seed."""
    return random.Random(seed).sample(list(cells), min(number, len(cells)))


def report(outcomes: Sequence[Outcome], lines: int) -> str:
    """The worst cells first, then what was refused and how the errors are spread."""
    done = sorted((o for o in outcomes if not o.refused), key=lambda o: -o.worst)
    head = " ".join(f"{phase.value:>8}" for phase in PHASES) + "   [% of the real peak above static memory]"
    errors = sorted(abs(e) for o in done for e in o.errors)
    spread = (
        ", ".join(f"{100 * q} % of phases within {100 * errors[int(q * (len(errors) - 1))]:.3f} %" for q in (0.5, 0.9, 0.99, 1))
        if errors
        else ""
    )
    refused = sorted({f"{o.cell.family}: {o.refused}" for o in outcomes if o.refused})
    return "\n".join([head, *map(str, done[:lines]), f"{len(done)} cells: {spread}", *(f"not compared: {text}" for text in refused)])
