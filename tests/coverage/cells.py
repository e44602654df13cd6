"""One cell of the table: an architecture under a recipe."""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import process_time
from types import FrameType
from typing import Any

from estimator.engine import why_not_modelled
from estimator.introspect.errors import BuildError
from estimator.introspect.trace.errors import NeedsValuesError, RefusedError
from estimator.introspect.trace.routing import Routing
from estimator.introspect.trace.tasks import Session
from estimator.phases import Phase
from estimator.recipe import Attention, Recipe
from estimator.sources.tracing import regime
from estimator.splice import spliced
from estimator.static_memory import stored_tensors
from estimator.step import Program, regime_of, run_step
from estimator.timeline import Timeline
from estimator.traced_step import NotOneProgramError
from tests.coverage.architectures import Architecture
from tests.coverage.stops import stops_in_reality
from tests.estimator.recipes import training

METHODS = ("full", "lora", "qlora")
ATTENTIONS = (Attention.EAGER, Attention.SDPA)

BATCH = 2
"""Where closed form and trace are compared, at the architecture's length."""
ODD_BATCH, ODD_LENGTH = 3, 777
"""Where few layers and all layers are compared; shorter for a model with fewer positions."""

_SECONDS = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A recipe of the table."""

    method: str
    attention: Attention
    checkpointing: bool

    @property
    def key(self) -> str:
        return f"{self.method}/{self.attention.value}/{'checkpointing' if self.checkpointing else 'plain'}"

    def recipe(self, length: int) -> Recipe:
        return training(BATCH, length, method=self.method, attention=self.attention, checkpointing=self.checkpointing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a cell."""

    outcome: str
    """`traced`, `refused` by a library, `values` needed, `failed`, `slow`."""
    reason: str = ""
    all_layers: bool = False
    """Whether every layer ran: all of different kinds, or a model that breaks where layers are missing."""
    routing_matters: bool = False
    worst: float | None = None
    """How much more the peak takes when all tokens go to the same experts; None where it does not matter."""
    closed_form: float | None = None
    """Largest difference of the closed form over phases, relative; None where there is none."""
    seconds: float = 0.0


class SlowError(BaseException):
    pass


def cells(architecture: Architecture) -> Iterator[Cell]:
    """Those that the class allows."""
    for method in METHODS:
        for attention in ATTENTIONS:
            if attention.value in architecture.inventory.supported_attention:
                for checkpointing in (False, True):
                    yield Cell(method=method, attention=attention, checkpointing=checkpointing)


def outcome(architecture: Architecture, cell: Cell) -> Outcome:
    """Traces a cell."""
    start = process_time()
    try:
        with limit():
            found = _traced(architecture, cell)
    except SlowError:
        return Outcome(outcome="slow", reason=f"more than {_SECONDS} s of processor time")
    except BuildError as error:
        kind = "refused" if isinstance(error, RefusedError) else "values" if isinstance(error, NeedsValuesError) else "failed"
        if kind == "failed" and stops_in_reality(architecture.name, cell.method, error.message, checkpointing=cell.checkpointing):
            kind = "refused"
        return Outcome(outcome=kind, reason=error.message, seconds=round(process_time() - start, 1))
    return Outcome(**found, seconds=round(process_time() - start, 1))


def _traced(architecture: Architecture, cell: Cell) -> dict[str, Any]:
    recipe = cell.recipe(architecture.length)
    payload = _payload(architecture, recipe)
    session = Session(payload)
    peaks = _peaks(session.at_size().program, architecture.length)
    result: dict[str, Any] = {"outcome": "traced", "all_layers": session.runs_all_layers, "routing_matters": session.values.routing_matters}
    if session.values.routing_matters:
        worst = _peaks(Session(payload | {"routing": Routing.WORST.value}).at_size().program, architecture.length)
        result["worst"] = round(max(worst.values()) / max(peaks.values()) - 1, 5)
    closed = _closed_form(architecture, recipe)
    if closed is not None:
        result["closed_form"] = round(max((closed[phase] / peaks[phase] - 1 for phase in peaks), key=abs), 6)
    return result


def _closed_form(architecture: Architecture, recipe: Recipe) -> dict[Phase, int] | None:
    """Peaks by closed forms; None where there are none of the architecture, or a block has no rule for something of the recipe."""
    inventory = architecture.inventory
    if why_not_modelled(inventory, recipe) is not None:
        return None
    try:
        program = run_step(inventory, recipe, stored_tensors(inventory, recipe), regime_of(recipe, inventory))
    except NotImplementedError:
        return None
    return _peaks(program, architecture.length)


def reach(architecture: Architecture, cell: Cell) -> str:
    """The lengths that one program of the cell holds for.

    Raises:
        BuildError: if it cannot be traced.
    """
    session = Session(_payload(architecture, cell.recipe(architecture.length)))
    try:
        found = session.program(*regime(architecture.inventory, architecture.length))
    except NotOneProgramError:
        found = session.exact_program()
    if found.is_outline:
        return "all (outline)"
    if found.multiple_of is None:
        return "one length" if found.any_batch else "one size"
    return "all" if found.multiple_of == 1 else f"multiples of {found.multiple_of}"


def _payload(architecture: Architecture, recipe: Recipe) -> dict[str, object]:
    return {"config": dict(architecture.config), "recipe": asdict(recipe), "layers_prefix": architecture.inventory.layers_prefix}


def _peaks(program: Program, length: int) -> dict[Phase, int]:
    return {phase: max(sum(s.items(BATCH, length).values()) for s in snapshots) for phase, snapshots in program.peaks.items()}


def splice_difference(architecture: Architecture, cell: Cell) -> float | None:
    """Largest difference over phases between a run of a few layers, spliced, and a run of all, relative; None
    where all layers run anyhow.

    Raises:
        BuildError: if one of them cannot be traced.
    """
    payload = _payload(architecture, cell.recipe(architecture.length))
    few = Session(payload)
    point = (ODD_BATCH, min(ODD_LENGTH, architecture.length - 1))
    ours = above_stored(spliced(few.run(point), few.sample.stands_for))
    if few.runs_all_layers:
        return None
    real = above_stored(Session(payload | {"all_layers": True}).run(point))
    return max((ours[phase] / real[phase] - 1 for phase in real), key=abs)


def above_stored(traced: Timeline) -> Mapping[str, int]:
    """Peak of each phase of the step above what is on the device between steps [bytes]."""
    first = next(mark.event for mark in traced.marks if mark.phase == Phase.FORWARD)
    there = sum(a.allocated_bytes for a in traced.alive(first - 1))
    phases = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)
    return {phase: peak.allocated_bytes - there for phase, peak in traced.peaks().items() if phase in phases}


@contextmanager
def limit() -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise SlowError

    # of the processor, so that what else a machine does is no reason
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
