"""What the estimator says about the same tiny models, in the oracle's terms."""

from collections.abc import Mapping
from typing import Any

from estimator.optimizers import SCALAR_BYTES
from estimator.phases import Phase
from estimator.static_memory import static_memory, stored_tensors
from estimator.step import _Step, regime_of, run_step
from estimator.units import allocated
from tests.oracle import recipes
from tests.oracle.models import Mode


def kept_bytes(
    family: str, mode: str | Mode, B: int, S: int, layers: int, *, config: Mapping[str, object] | None = None, **options: Any
) -> int:
    """Alive between forward and backward pass, as `run.kept` counts it [bytes, not rounded]."""
    inventory, recipe = recipes.inventory(family, layers, config), recipes.recipe(family, mode, B, S, **options)
    step = _Step(inventory, recipe, stored_tensors(inventory, recipe), regime_of(recipe, inventory), cuda_kernels=False, names=False)
    with step.tape.recording():
        loss = step._forward()
    total = sum(extent.at(B, S) * number for (_, extent), number in step.tape.live.items())
    del loss
    return total


def live_bytes(
    family: str, mode: str | Mode, B: int, S: int, layers: int, *, config: Mapping[str, object] | None = None, **options: Any
) -> dict[Phase, int]:
    """Peak of each phase above static memory and inputs, kernels' workspaces left out, as `run.step` counts it [bytes, not rounded]."""
    inventory, recipe = recipes.inventory(family, layers, config), recipes.recipe(family, mode, B, S, **options)
    program = run_step(inventory, recipe, stored_tensors(inventory, recipe), regime_of(recipe, inventory), cuda_kernels=False)
    return {phase: max(s.at(B, S) for s in peaks) for phase, peaks in program.peaks.items()}


def loaded_bytes(family: str, mode: str | Mode, layers: int, *, config: Mapping[str, object] | None = None) -> int:
    """Weights, quantization state, buffers and adapter [bytes, each tensor rounded up to 512]."""
    return static_memory(recipes.inventory(family, layers, config), recipes.recipe(family, mode, 1, 8)).loaded_bytes


def update_bytes(
    family: str, mode: str | Mode, B: int, S: int, layers: int, *, config: Mapping[str, object] | None = None, **options: Any
) -> int:
    """Peak of the optimizer's second step above loaded tensors and inputs [bytes, each tensor rounded up to 512, scalars left out].

    Paged states count too: without managed memory they lie where the others do.
    """
    static = static_memory(recipes.inventory(family, layers, config), recipes.recipe(family, mode, B, S, **options))
    states = sum(s.num_tensors * allocated(s.raw_bytes) for s in static.optimizer if s.raw_bytes > SCALAR_BYTES)
    return static.gradients_bytes + states + static.optimizer_temporary_bytes
