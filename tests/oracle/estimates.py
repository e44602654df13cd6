"""What the estimator says about the same tiny models, in the oracle's terms."""

from collections.abc import Mapping
from typing import Any

from estimator.engine import _generation_instants
from estimator.inventory import Inventory
from estimator.log import Log
from estimator.optimizers import SCALAR_BYTES
from estimator.phases import Item, Phase
from estimator.recipe import Recipe
from estimator.static_memory import static_memory, stored_tensors
from estimator.step import _Step, generation_regimes, regime_of, run_generation, run_step
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


def backward_changes(family: str, mode: str | Mode, B: int, S: int, layers: int, *, gc: bool | None) -> list[int]:
    """What a backward pass makes, and with a minus what it releases, as `run.backward_changes` lists it [bytes, not rounded]."""
    inventory, recipe = recipes.inventory(family, layers, None), recipes.recipe(family, mode, B, S, gc=gc)
    log = Log()
    _Step(
        inventory, recipe, stored_tensors(inventory, recipe), regime_of(recipe, inventory), cuda_kernels=False, names=False, log=log
    ).run()
    assert recipe.training is not None
    sizes = [size.at(*recipe.training.shape) for size in log.sizes]
    return [sizes[event] if event >= 0 else -sizes[~event] for event in log.events[log.backward :]]


def generation_bytes(family: str, mode: str | Mode, B: int, prompt: int, new: int, layers: int, **options: Any) -> dict[Phase, int]:
    """Peak of each phase above static memory and inputs, kernels' workspaces left out, as `generate.generate` counts it [bytes, not
    rounded]."""
    inventory, recipe = _generation(family, mode, B, prompt, new, layers, **options)
    stored = stored_tensors(inventory, recipe)
    instants = _generation_instants(recipe, inventory, lambda regime: run_generation(inventory, recipe, stored, regime, cuda_kernels=False))
    positions = 8 * B * prompt  # those that `generate` holds to its end
    return {phase: instant.num_bytes + positions for phase, instant in instants.items()}


def cache_bytes(family: str, mode: str | Mode, B: int, prompt: int, new: int, layers: int, **options: Any) -> tuple[int, int]:
    """Keys and values stored after the prompt and after the last token, as `generate.cache_bytes` counts them [bytes, not rounded]."""
    inventory, recipe = _generation(family, mode, B, prompt, new, layers, **options)
    regime, keys = generation_regimes(recipe, inventory)[-1]
    parts: dict[str, Any] = {"cuda_kernels": False, "names": False}
    read = _Step(inventory, recipe, stored_tensors(inventory, recipe), regime, spans=regime.prefill, **parts)
    read.prefill()
    write = _Step(inventory, recipe, stored_tensors(inventory, recipe), regime, spans=regime.decode, rows=read.rows, **parts)
    write.decode()
    return _cached(read, B, prompt, keys), _cached(write, B, 1, keys)


def _generation(
    family: str,
    mode: str | Mode,
    B: int,
    prompt: int,
    new: int,
    layers: int,
    *,
    config: Mapping[str, object] | None = None,
    **options: Any,
) -> tuple[Inventory, Recipe]:
    return recipes.inventory(family, layers, config), recipes.generation(family, mode, B, prompt, new, **options)


def _cached(step: _Step, batch: int, sequence: int, keys: int) -> int:
    live = step.tape.live.items()
    return sum(number * extent.at(batch, sequence, keys) for (item, extent), number in live if item is Item.KV_CACHE)


def loaded_bytes(family: str, mode: str | Mode, layers: int, *, config: Mapping[str, object] | None = None) -> int:
    """Weights, quantization state, buffers and adapter [bytes, each tensor rounded up to 512]."""
    return static_memory(recipes.inventory(family, layers, config), recipes.recipe(family, mode, 1, 8)).loaded_bytes


def resting_bytes(family: str, mode: str | Mode, layers: int) -> int:
    """The same once a forward pass has cast the biases of quantized layers."""
    inventory, recipe = recipes.inventory(family, layers), recipes.recipe(family, mode, 1, 8)
    static = static_memory(inventory, recipe)
    program = run_step(inventory, recipe, static.tensors, regime_of(recipe, inventory), cuda_kernels=False)
    return static.loaded_bytes - static.loaded_weights_bytes + static.weights_bytes + program.weights_growth_bytes


def settled_bytes(family: str, mode: str | Mode, layers: int) -> tuple[int, int]:
    """What is stored after the first forward pass, and the gradients of all that is trained [bytes, not rounded]."""
    tensors = static_memory(recipes.inventory(family, layers), recipes.recipe(family, mode, 1, 8)).tensors
    gradients = sum(t.num_copies * t.num_elements * t.dtype.itemsize for t in tensors if t.trainable)
    return sum(t.num_copies * t.raw_bytes for t in tensors), gradients


def update_bytes(
    family: str, mode: str | Mode, B: int, S: int, layers: int, *, config: Mapping[str, object] | None = None, **options: Any
) -> int:
    """Peak of the optimizer's second step above loaded tensors and inputs [bytes, each tensor rounded up to 512, scalars left out].

    Paged states count too: without managed memory they lie where the others do.
    """
    static = static_memory(recipes.inventory(family, layers, config), recipes.recipe(family, mode, B, S, **options))
    states = sum(s.num_tensors * allocated(s.raw_bytes) for s in static.optimizer if s.raw_bytes > SCALAR_BYTES)
    return static.gradients_bytes + states + static.optimizer_temporary_bytes
