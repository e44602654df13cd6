"""What the worker is asked of traces: the program of a step for every size, and one whole timeline."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter
from torch._subclasses.fake_tensor import FakeTensorMode

from estimator.classification import with_head
from estimator.introspect.build import build
from estimator.introspect.prepared import TORCH_DTYPES
from estimator.introspect.trace.errors import NotTraceableError
from estimator.introspect.trace.layers import Sample, sample
from estimator.introspect.trace.loop import cuda_program, run, warm_up
from estimator.introspect.trace.model import traced_model
from estimator.introspect.trace.objectives import reference_model
from estimator.recipe import Recipe
from estimator.scoring import Rows
from estimator.splice import spliced
from estimator.timeline import Timeline, encode_timeline
from estimator.traced_step import NotOneProgramError, Point, encode_program, points, program

_RECIPE = TypeAdapter(Recipe)


def program_task(payload: Mapping[str, Any]) -> dict[str, object]:
    """`{"config", "recipe", "layers_prefix", "lengths": [shortest, longest], "rows"}` → the step's candidates for the peak.

    Raises:
        BuildError: if transformers cannot build the model.
        NotTraceableError: if its step cannot run without values, or is not the same program at all sizes of the regime.
    """
    session = _Session(payload)
    try:
        timelines = {point: session.run(point) for point in points(*payload["lengths"])}
        found = program(timelines, session.sample.stands_for)
    except NotOneProgramError as error:
        raise NotTraceableError(str(error)) from error
    return {"program": encode_program(found), "layers": _layers(session.sample)}


def timeline_task(payload: Mapping[str, Any]) -> dict[str, object]:
    """`{"config", "recipe", "layers_prefix"}` → the whole model's run at the recipe's own size.

    Raises:
        BuildError, NotTraceableError: as for the program.
    """
    session = _Session(payload)
    training = session.recipe.training
    assert training is not None
    traced = session.run((training.micro_batch_size, training.sequence_length))
    return {"timeline": encode_timeline(spliced(traced, session.sample.stands_for)), "layers": _layers(session.sample)}


def _layers(chosen: Sample) -> dict[str, object]:
    return {"run": list(chosen.kept), "stands_for": list(chosen.stands_for)}


class _Session:
    """One model, run at several sizes."""

    def __init__(self, payload: Mapping[str, Any]) -> None:
        self.recipe: Recipe = _RECIPE.validate_python(payload["recipe"])
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        prefix = payload["layers_prefix"]
        training = self.recipe.training
        assert training is not None
        config = with_head(payload["config"], training.objective)
        self.rows = Rows(**payload["rows"]) if "rows" in payload else None
        kind, model = build(config, TORCH_DTYPES[self.recipe.dtype])
        if training.objective.kind.is_classification and kind != "sequence_classification":
            raise NotTraceableError(f"{type(model).__name__} is no model for sequence classification")
        layers = list(model.get_submodule(prefix)) if prefix else []
        every_n = self.recipe.training.checkpoint_every_n_layers if self.recipe.training is not None else 1
        whole = range(len(layers))
        self.sample = Sample(kept=tuple(whole), stands_for=tuple(whole)) if payload.get("all_layers") else sample(layers, every_n)
        with cuda_program(self.recipe, cuda_kernels=True):
            self.model = traced_model(model, self.recipe, prefix, self.sample.kept, self.mode)
            self.reference = reference_model(
                lambda: build(config, TORCH_DTYPES[self.recipe.dtype])[1], self.recipe, prefix, self.sample.kept, self.mode
            )
            warm_up(self.model, self.recipe, self.mode)

    def run(self, point: Point) -> Timeline:
        training = self.recipe.training
        assert training is not None
        recipe = replace(self.recipe, training=replace(training, micro_batch_size=point[0], sequence_length=point[1]))
        with cuda_program(recipe, cuda_kernels=True):
            return run(self.model, recipe, self.mode, with_update=False, rows=self.rows, reference=self.reference)
