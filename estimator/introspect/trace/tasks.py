"""What the worker is asked of traces: the program of a step for every size, and one whole timeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter
from torch._subclasses.fake_tensor import FakeTensorMode

from estimator.classification import with_head
from estimator.introspect.build import build
from estimator.introspect.prepared import TORCH_DTYPES
from estimator.introspect.trace.attention import CudaAttention
from estimator.introspect.trace.errors import LoopOverTokensError, NeedsValuesError, NotTraceableError, RefusedError
from estimator.introspect.trace.known import Values
from estimator.introspect.trace.layers import Sample, sample, whole
from estimator.introspect.trace.loop import cuda_program, run, warm_up
from estimator.introspect.trace.model import traced_model
from estimator.introspect.trace.objectives import reference_model
from estimator.introspect.trace.routing import Routing
from estimator.kernels import Kernel
from estimator.recipe import Attention, Recipe
from estimator.scoring import Rows
from estimator.splice import spliced
from estimator.step import Program
from estimator.timeline import Timeline, encode_timeline
from estimator.traced_step import (
    ALIGNMENTS,
    NotOneProgramError,
    Point,
    check_growth,
    encode_program,
    outline,
    outline_points,
    points,
    program,
)

# A scan over tokens written in Python takes several operations per token; a scan over chunks far less than one.
_LONGEST_LOOP = 3
_SHORTEST_LOOP = 1500

_RECIPE = TypeAdapter(Recipe)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedProgram:
    """A step's candidates for the peak, and what they hold for."""

    program: Program
    multiple_of: int | None
    """Lengths that it holds for are multiples of this; None: only the length, or size, that was asked for."""
    any_batch: bool
    """Whether for all batches but one, or for the recipe's own alone."""
    sample: Sample
    is_outline: bool
    """Whether it was fitted to short runs, see `traced_step.outline`."""
    routing_matters: bool
    """Whether sizes depend on the experts that routers choose."""


def program_task(payload: Mapping[str, Any]) -> dict[str, object]:
    """`{"config", "recipe", "layers_prefix", "lengths": [shortest, longest], "rows"}` → the step's candidates for the peak.

    It holds for all batches but one: heads of one sequence need no copies, so that it runs a program of its own, which
    `"one_sequence": true` asks for. With `"exact": true`, for the recipe's own length alone, and where the batch makes another program of
    it for the recipe's own batch. With `"routing": "worst"`, for all tokens choosing the same experts. Where no program holds for many
    lengths the result has a `reason` and no program.

    Raises:
        BuildError: if transformers cannot build the model.
        NotTraceableError: if its step cannot run without values.
    """
    session = Session(payload)
    try:
        if payload.get("exact"):
            found = session.exact_program()
        else:
            found = session.program(*payload["lengths"], one_sequence=bool(payload.get("one_sequence")))
    except NotOneProgramError as error:
        return {"reason": str(error)}
    return {
        "program": encode_program(found.program),
        "multiple_of": found.multiple_of,
        "any_batch": found.any_batch,
        "is_outline": found.is_outline,
        "routing_matters": found.routing_matters,
        "layers": _layers(found.sample),
    }


def timeline_task(payload: Mapping[str, Any]) -> dict[str, object]:
    """`{"config", "recipe", "layers_prefix"}` → the whole model's run at the recipe's own size.

    Raises:
        BuildError, NotTraceableError: as for the program.
    """
    session = Session(payload)
    training = session.recipe.training
    assert training is not None
    traced = session.run(training.shape)
    return {
        "timeline": encode_timeline(spliced(traced, session.sample.stands_for)),
        "routing_matters": session.values.routing_matters,
        "layers": _layers(session.sample),
    }


def _layers(chosen: Sample) -> dict[str, object]:
    return {"run": list(chosen.kept), "stands_for": list(chosen.stands_for)}


class Session:
    """One model, run at several sizes.

    Args:
        payload: `{"config", "recipe", "layers_prefix"}`, and where wanted `"all_layers"` and `"routing"`.

    Raises:
        BuildError, NotTraceableError: as for the program.
    """

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self.payload = payload
        self.recipe: Recipe = _RECIPE.validate_python(payload["recipe"])
        self.attention = CudaAttention(self.recipe.compute_capability)
        self.values = Values(Routing(payload.get("routing", Routing.BALANCED)))
        self.runs_grouped_experts = False
        self.longest_loop: int | None = None
        """Operations per token that one call of a module may run."""
        self._build(all_layers=bool(payload.get("all_layers")))

    def _build(self, *, all_layers: bool) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        prefix = self.payload["layers_prefix"]
        training = self.recipe.training
        assert training is not None
        config = with_head(self.payload["config"], training.objective)
        self.rows = Rows(**self.payload["rows"]) if "rows" in self.payload else None
        kind, model = build(config, TORCH_DTYPES[self.recipe.dtype])
        if training.objective.kind.is_classification and kind != "sequence_classification":
            raise NotTraceableError(f"{type(model).__name__} is no model for sequence classification")
        layers = list(model.get_submodule(prefix)) if prefix else []
        every_n = self.recipe.training.checkpoint_every_n_layers if self.recipe.training is not None else 1
        self.sample = whole(len(layers)) if all_layers else sample(layers, every_n)
        try:
            self._prepare(model, lambda: build(config, TORCH_DTYPES[self.recipe.dtype])[1])
        except (RefusedError, NeedsValuesError):
            raise
        except Exception as error:  # the border to the libraries' own code
            if not self.runs_all_layers:
                self._build(all_layers=True)
                return
            if isinstance(error, NotTraceableError):
                raise
            raise NotTraceableError(f"{type(error).__name__}: {str(error)[:300]}") from error

    def _prepare(self, model: Any, another: Callable[[], Any]) -> None:
        prefix = self.payload["layers_prefix"]
        with cuda_program(self.attention):
            self.model = traced_model(model, self.recipe, prefix, self.sample.kept, self.mode)
            self.reference = reference_model(another, self.recipe, prefix, self.sample.kept, self.mode)
            warm_up(self.model, self.recipe, self.mode)

    def program(self, shortest: int, longest: int, *, one_sequence: bool = False) -> TracedProgram:
        """For the lengths of a regime, all of them or those that fill whole chunks.

        Args:
            one_sequence: whether for a batch of one, or for all others.

        Raises:
            NotTraceableError: as `run`.
            NotOneProgramError: if the lengths differ in more than size.
        """
        make = partial(self._for_lengths, shortest, longest, one_sequence=one_sequence)
        return self._guarded_by_outline(make, one_sequence=one_sequence)

    def _for_lengths(self, shortest: int, longest: int, *, one_sequence: bool) -> TracedProgram:
        timelines: dict[Point, Timeline] = {}
        reason = None
        for alignment in ALIGNMENTS:
            *common, other = points(shortest, longest, alignment, one_sequence=one_sequence)
            for point in common:
                if point not in timelines:
                    timelines[point] = self.run(point)
                    check_growth(timelines)  # the same at each alignment: none would help
            if other not in timelines:
                timelines[other] = self.run(other)
            try:
                found = program({point: timelines[point] for point in (*common, other)}, self.sample.stands_for)
            except NotOneProgramError as error:
                reason = error
                continue
            return self._program(found, multiple_of=1 if alignment == ALIGNMENTS[0] else alignment, any_batch=not one_sequence)
        assert reason is not None
        raise reason

    def _guarded_by_outline(self, make: Callable[[], TracedProgram], *, one_sequence: bool) -> TracedProgram:
        """A program made by full traces, or where those would take as long as there are tokens, by its outline."""
        self.longest_loop = _LONGEST_LOOP
        try:
            return make()
        except LoopOverTokensError:
            self.longest_loop = None
        try:
            timelines = {point: self.run(point) for point in outline_points(one_sequence=one_sequence)}
            found = outline(timelines, self.sample.stands_for)
            return self._program(found, multiple_of=1, any_batch=not one_sequence, is_outline=True)
        except NotOneProgramError:
            return make()

    def exact_program(self) -> TracedProgram:
        """For the recipe's own length, and every batch but one or, failing that, its own.

        Raises:
            NotTraceableError: as `run`.
        """
        return self._guarded_by_outline(self._exact, one_sequence=self._size[0] == 1)

    def _exact(self) -> TracedProgram:
        batch, length = self._size
        if batch == 1:
            return self._at_size()
        timelines = {(B, length): self.run((B, length)) for B in (batch, batch + 1)}
        try:
            return self._program(program(timelines, self.sample.stands_for), multiple_of=None)
        except NotOneProgramError:
            return self._at_size()

    def at_size(self) -> TracedProgram:
        """For the recipe's own batch and length alone.

        Raises:
            NotTraceableError: as `run`.
        """
        return self._guarded_by_outline(self._at_size, one_sequence=self._size[0] == 1)

    def _at_size(self) -> TracedProgram:
        found = program({self._size: self.run(self._size)}, self.sample.stands_for)
        return self._program(found, multiple_of=None, any_batch=False)

    @property
    def _size(self) -> Point:
        training = self.recipe.training
        assert training is not None
        return training.shape

    @property
    def runs_all_layers(self) -> bool:
        return len(self.sample.kept) == len(self.sample.stands_for)

    def _program(self, found: Program, *, multiple_of: int | None, any_batch: bool = True, is_outline: bool = False) -> TracedProgram:
        return TracedProgram(
            is_outline=is_outline,
            program=replace(found, kernels=self._kernels()),
            multiple_of=multiple_of,
            any_batch=any_batch,
            sample=self.sample,
            routing_matters=self.values.routing_matters,
        )

    def _kernels(self) -> frozenset[Kernel]:
        """Which kernels the runs took, as far as they stand apart."""
        by_name = {Attention.EAGER: Kernel.EAGER, Attention.FLASH_ATTENTION_2: Kernel.FLASH, Attention.FLASH_ATTENTION_3: Kernel.FLASH}
        named = {by_name[self.recipe.attention]} if self.recipe.attention in by_name else set()
        experts = {Kernel.EXPERTS} if self.runs_grouped_experts else set()
        return frozenset(self.attention.ran | named | experts)

    def run(self, point: Point) -> Timeline:
        """One step at a batch and length.

        A model that goes by the positions of its layers breaks where some are missing: then all of them run.
        """
        try:
            return self._run(point)
        except (NeedsValuesError, LoopOverTokensError):
            raise
        except NotTraceableError:
            if self.runs_all_layers:
                raise
            self._build(all_layers=True)
            return self._run(point)

    def _run(self, point: Point) -> Timeline:
        training = self.recipe.training
        assert training is not None
        recipe = replace(self.recipe, training=replace(training, micro_batch_size=point[0], sequence_length=point[1]))
        limit = None if self.longest_loop is None else max(self.longest_loop * point[1], _SHORTEST_LOOP)
        with cuda_program(self.attention):
            timeline = run(
                self.model,
                recipe,
                self.mode,
                with_update=False,
                values=self.values,
                longest_loop=limit,
                rows=self.rows,
                reference=self.reference,
                kinds=None if self.runs_all_layers else self.sample.kinds,
            )
        self.runs_grouped_experts |= any(a.operator == "_grouped_mm" for a in timeline.allocations)
        return timeline
