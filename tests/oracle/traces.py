"""What a trace says about the same tiny models, in the oracle's terms."""

from collections.abc import Mapping

from torch._subclasses.fake_tensor import FakeTensorMode

from estimator.introspect.build import build
from estimator.introspect.prepared import TORCH_DTYPES
from estimator.introspect.trace.loop import cuda_program, run, warm_up
from estimator.introspect.trace.model import traced_model
from estimator.phases import Phase
from estimator.timeline import Timeline
from tests.oracle import recipes
from tests.oracle.models import FAMILIES, Mode


def timeline(
    family: str, mode: str | Mode, B: int, S: int, layers: int, *, config: Mapping[str, object] | None = None, **options: object
) -> Timeline:
    """One optimizer step, attention left to the CPU's kernel."""
    made = FAMILIES[family].config(layers, **dict(config or {}))
    made.architectures = None
    recipe = recipes.recipe(family, mode, B, S, **options)  # type: ignore[arg-type]
    inventory = recipes.inventory(family, layers, config)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    with cuda_program(recipe, cuda_kernels=False):
        _, base = build(made.to_dict(), TORCH_DTYPES[recipe.dtype])
        model = traced_model(base, recipe, inventory.layers_prefix, None, fakes)
        warm_up(model, recipe, fakes)
        return run(model, recipe, fakes, with_update=False)


def live_bytes(traced: Timeline) -> dict[str, int]:
    """Peak of each phase above what lies on the device between steps, and inputs, as `run.step` counts it [bytes]."""
    first = next(mark.event for mark in traced.marks if mark.phase == Phase.FORWARD)
    there = sum(a.allocated_bytes for a in traced.alive(first - 1))
    return {phase: peak.allocated_bytes - there for phase, peak in traced.peaks().items()}
