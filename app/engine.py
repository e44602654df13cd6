"""Which engine answers: closed forms where the architecture has them, a trace of the libraries' own step elsewhere."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from app.corrections import applied
from app.versions import installed, shown
from estimator.engine import UNLIMITED, Device, has_closed_forms, loaded, why_not_modelled
from estimator.engine import estimate as analytic
from estimator.errors import InspectionError, RequestError, SourceUnavailableError, TraceError, VramplanError
from estimator.estimate import Estimate, Notice
from estimator.inventory import Inventory
from estimator.parallelism.options import Parallel, Strategy
from estimator.recipe import Loss, ObjectiveKind, Recipe
from estimator.sources.tracing import Subject, TracedStep, Tracer, default_tracer
from estimator.stack import Stack
from estimator.units import gib

if TYPE_CHECKING:
    from estimator.fitted import Corrections

_TRACED_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
_ENCODER_DECODER = ("seq2seq_lm", "speech_seq2seq")
_NOT_MODELLED = "not_modelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answerer:
    """Estimates for one model, by the engine that was asked for."""

    engine: str
    """`auto`, `analytic` or `trace`."""
    subject: Subject
    device: Device = UNLIMITED
    tracer: Callable[[], Tracer] = default_tracer
    corrections: "Corrections | None" = None
    """Scale what is not exact."""

    @property
    def inventory(self) -> Inventory:
        return self.subject.inventory

    def estimate(self, recipe: Recipe) -> Estimate:
        """Memory of one run, corrected where there are corrections.

        Raises:
            as `as_modelled`.
        """
        return applied(self.as_modelled(recipe), recipe, self.corrections)

    def as_modelled(self, recipe: Recipe) -> Estimate:
        """Memory of one run, before any correction.

        Raises:
            RequestError: if the libraries would refuse the combination, or if a trace was asked for and cannot stand for the request.
            TraceError, InspectionError, SourceUnavailableError: if a trace was asked for and failed.
        """
        if self.engine == "trace":
            return replace(self._traced(recipe), engine_reason="asked for")
        found = analytic(self.inventory, recipe, device=self.device)
        if self.engine == "analytic":
            return replace(found, engine_reason="asked for")
        if all(notice.code != _NOT_MODELLED for notice in found.notices):
            return replace(found, engine_reason=f"closed forms of {self.inventory.model_type}, held to the trace by tests")
        return self._traced_instead(recipe, found)

    def has_closed_forms(self, recipe: Recipe) -> bool:
        """Whether `estimate` answers for a training step from closed forms.

        Raises:
            RequestError: if the libraries would refuse the combination.
        """
        return self.engine != "trace" and has_closed_forms(self.inventory, recipe)

    def has_to_trace(self, recipe: Recipe) -> bool:
        """Whether `estimate` would have to trace the step first, which takes seconds."""
        traces = self.engine == "trace" or (self.engine == "auto" and why_not_modelled(self.inventory, recipe) is not None)
        if not traces or self._why_no_trace(recipe) is not None:
            return False
        return not self.tracer().has_step(self.subject, replace(recipe, parallel=Parallel()))

    def loaded(self, recipe: Recipe) -> Estimate:
        """The load alone, which is exact and takes no trace."""
        return loaded(self.inventory, recipe)

    def step(self, recipe: Recipe, *, routing: str = "balanced") -> TracedStep:
        """The traced step.

        Raises:
            RequestError: if a trace cannot stand for the request.
            TraceError, InspectionError, SourceUnavailableError: if it failed.
        """
        self.check_traceable(recipe)
        # The step of one rank: how many there are is no matter of the trace.
        return self.tracer().step(self.subject, replace(recipe, parallel=Parallel()), routing=routing)

    def _traced(self, recipe: Recipe) -> Estimate:
        step = self.step(recipe)
        found = analytic(self.inventory, recipe, step.program, self.device)
        return replace(found, notices=(*found.notices, *self._caveats(recipe, step, found)))

    def _caveats(self, recipe: Recipe, step: TracedStep, balanced: Estimate) -> Iterator[Notice]:
        if step.is_outline:
            yield Notice(
                code="trace_outlined",
                message="without kernels of its own the model goes over its tokens one by one in Python: the trace followed short "
                "sequences and carried on from them; with mamba-ssm, causal-conv1d or flash-linear-attention installed a run takes less.",
            )
        if step.routing_matters:
            yield routing_notice(lambda: self._worst_bytes(recipe), balanced.peak.allocated_bytes)

    def _worst_bytes(self, recipe: Recipe) -> int:
        """Allocated at the peak if all tokens chose the same experts [bytes]."""
        return analytic(self.inventory, recipe, self.step(recipe, routing="worst").program).peak.allocated_bytes

    def check_traceable(self, recipe: Recipe) -> None:
        """Refuses what a trace cannot stand for.

        Raises:
            RequestError: if it cannot.
        """
        reason = self._why_no_trace(recipe)
        if reason is not None:
            raise RequestError(f"engine: 'trace' {reason}", field="engine")

    def _why_no_trace(self, recipe: Recipe) -> str | None:
        """What keeps a trace from standing for a recipe; it continues a sentence."""
        if recipe.training is None:
            return "covers training steps only; accepted here: 'auto', 'analytic'"
        if recipe.parallel.is_spread and recipe.parallel.strategy is not Strategy.DDP:
            return f"is of a model that lies on one card, and not of {recipe.parallel.strategy.value!r}"
        if self.inventory.is_stored:
            return f"runs a class of transformers, and of {self.inventory.model_class} only the checkpoint's files are known"
        if self.inventory.config.get("auto_class") in _ENCODER_DECODER:
            return f"covers models of one stack of layers, and {self.inventory.model_class} reads with an encoder and writes with a decoder"
        runs_trl = recipe.training.loss is Loss.TRL_TILED or recipe.training.objective.kind is ObjectiveKind.REWARD
        libraries = (*_TRACED_LIBRARIES, "trl") if runs_trl else _TRACED_LIBRARIES
        other = [name for name in libraries if not _is_installed(name, recipe.stack)]
        if other:
            asked = ", ".join(f"{name} {shown(getattr(recipe.stack, name))}" for name in other)
            here = ", ".join(f"{name} {shown(installed()[name])}" if name in installed() else f"no {name}" for name in other)
            return f"runs the installed versions ({here}), and the request is for {asked}"
        return None

    def _traced_instead(self, recipe: Recipe, load_only: Estimate) -> Estimate:
        reason = self._why_no_trace(recipe)
        if reason is None:
            try:
                found = self._traced(recipe)
            except (TraceError, InspectionError, SourceUnavailableError) as error:
                reason = f"failed: {error.message}"
            else:
                return replace(found, engine_reason=f"there are no closed forms of {self._unmodelled(recipe)}")
        if recipe.training is None:
            return load_only
        notice = Notice(code="not_traced", message=f"A trace of the step, which could have answered instead, {reason}.")
        return replace(load_only, notices=(*load_only.notices, notice))

    def _unmodelled(self, recipe: Recipe) -> str:
        """What there are no closed forms of."""
        if recipe.training is not None and recipe.training.objective.kind is not ObjectiveKind.SFT:
            return f"objective {recipe.training.objective.kind.value!r}"
        modelled = why_not_modelled(self.inventory, recipe) is None
        return f"this recipe on {self.inventory.model_type}" if modelled else self.inventory.model_type


def routing_notice(worst: Callable[[], int], balanced_bytes: int) -> Notice:
    """Says what tokens that all go to the same experts would take, or why that is not known: the answer stands without it.

    Args:
        worst: finds what is allocated at the peak then, by a trace of its own [bytes].
        balanced_bytes: allocated at the peak that is answered, with tokens spread evenly [bytes].
    """
    try:
        told = f"if all chose the same experts, the peak would be {_instead(gib(worst()), gib(balanced_bytes))}."
    except VramplanError as error:
        told = f"what it would be if all chose the same experts is not known, since that trace failed: {error.message.rstrip('.')}."
    return Notice(
        code="expert_routing",
        message=f"sizes depend on which experts the routers choose: this is for tokens spread evenly; {told}",
    )


def _instead(other: str, this: str) -> str:
    return f"{other} too" if other == this else f"{other} instead of {this}"


def _is_installed(name: str, stack: Stack) -> bool:
    here = installed().get(name)
    return here is not None and _padded(here) == _padded(getattr(stack, name))


def _padded(version: tuple[int, ...]) -> tuple[int, ...]:
    return (*version, 0, 0, 0)[:3]
