"""What a trace says about the same tiny models, in the oracle's terms."""

from collections.abc import Mapping
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from estimator.classification import with_head
from estimator.introspect.build import build
from estimator.introspect.prepared import TORCH_DTYPES
from estimator.introspect.trace.loop import cuda_program, run, warm_up
from estimator.introspect.trace.model import traced_model
from estimator.introspect.trace.objectives import reference_model
from estimator.phases import Phase
from estimator.timeline import Timeline
from tests.oracle import recipes
from tests.oracle.models import Mode, family_of


def type_of(config: PretrainedConfig) -> str:
    """The class of causal language models for a config."""
    return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)


def timeline(
    family: str,
    mode: str | Mode,
    B: int,
    S: int,
    layers: int,
    *,
    config: Mapping[str, object] | None = None,
    num_steps: int = 0,
    **options: object,
) -> Timeline:
    """One step, attention left to the CPU's kernel.

    Args:
        num_steps: optimizer steps with their updates; 0 for one without.
    """
    made = family_of(family).config(layers, **dict(config or {}))
    recipe = recipes.recipe(family, mode, B, S, **options)  # type: ignore[arg-type]
    assert recipe.training is not None
    prefix = recipes.inventory(family, layers, config).layers_prefix
    data = with_head(made.to_dict() | {"architectures": [type_of(made)]}, recipe.training.objective)

    def base() -> Any:
        return build(data, TORCH_DTYPES[recipe.dtype])[1]

    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with cuda_program(None):
        model = traced_model(base(), recipe, prefix, None, fakes)
        reference = reference_model(base, recipe, prefix, None, fakes)
        warm_up(model, recipe, fakes)
        return run(model, recipe, fakes, with_update=num_steps > 0, num_steps=max(num_steps, 1), reference=reference)


def live_bytes(traced: Timeline) -> dict[str, int]:
    """Peak of each phase above what lies on the device between steps, and inputs, as `run.step` counts it [bytes]."""
    first = next(mark.event for mark in traced.marks if mark.phase == Phase.FORWARD)
    there = sum(a.allocated_bytes for a in traced.alive(first - 1))
    return {phase: peak.allocated_bytes - there for phase, peak in traced.peaks().items()}
