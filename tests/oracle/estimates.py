"""What the estimator says about the same tiny models, in the oracle's terms."""

from collections.abc import Mapping
from typing import Any

from estimator.phases import Phase
from estimator.static_memory import static_memory, stored_tensors
from estimator.step import _Step, regime_of, run_step
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
    assert recipe.training is not None
    total = sum(extent.at(*recipe.training.shape) * number for (_, extent), number in step.tape.live.items())
    del loss
    return total


def live_bytes(
    family: str, mode: str | Mode, B: int, S: int, layers: int, *, config: Mapping[str, object] | None = None, **options: Any
) -> dict[Phase, int]:
    """Peak of each phase above static memory and inputs, kernels' workspaces left out, as `run.step` counts it [bytes, not rounded]."""
    inventory, recipe = recipes.inventory(family, layers, config), recipes.recipe(family, mode, B, S, **options)
    program = run_step(inventory, recipe, stored_tensors(inventory, recipe), regime_of(recipe, inventory), cuda_kernels=False)
    assert recipe.training is not None
    shape = recipe.training.shape
    return {phase: max(s.at(*shape) for s in peaks) for phase, peaks in program.peaks.items()}


def loaded_bytes(family: str, mode: str | Mode, layers: int, *, config: Mapping[str, object] | None = None) -> int:
    """Weights, quantization state, buffers and adapter [bytes, each tensor rounded up to 512]."""
    return static_memory(recipes.inventory(family, layers, config), recipes.recipe(family, mode, 1, 8)).loaded_bytes


def resting_bytes(family: str, mode: str | Mode, layers: int) -> int:
    """The same once a forward pass has cast the biases of quantized layers."""
    inventory, recipe = recipes.inventory(family, layers), recipes.recipe(family, mode, 1, 8)
    static = static_memory(inventory, recipe)
    program = run_step(inventory, recipe, static.tensors, regime_of(recipe, inventory), cuda_kernels=False)
    return static.loaded_bytes + program.weights_growth_bytes


def settled_bytes(family: str, mode: str | Mode, layers: int) -> tuple[int, int]:
    """What is stored after the first forward pass, and the gradients of all that is trained [bytes, not rounded]."""
    tensors = static_memory(recipes.inventory(family, layers), recipes.recipe(family, mode, 1, 8)).tensors
    gradients = sum(t.num_copies * t.num_elements * t.dtype.itemsize for t in tensors if t.trainable)
    return sum(t.num_copies * t.raw_bytes for t in tensors), gradients
