"""A few layers at a few sizes against every layer at another size: the same bytes."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from estimator.engine import largest
from estimator.introspect.trace.tasks import Session
from estimator.phases import Phase
from estimator.recipe import Recipe, Training
from estimator.sources.tracing import regime
from estimator.timeline import Timeline
from estimator.traced_step import decode_program, encode_program, points
from tests.oracle import recipes
from tests.oracle.models import FAMILIES

STEP = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)
LAYERS = 7
ODD = (3, 177)
# Layers of one kind, of two kinds in turn, and of two kinds one after the other.
CELLS = (
    ("llama", "qlora_prepared_autocast", False, {}),
    ("llama", "full_bf16", None, {}),
    ("llama", "lora_bf16_fp32_autocast", True, {}),
    ("gemma3_text", "qlora_bf16_autocast", False, {"layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]}),
    ("deepseek_v3", "full_bf16", False, {"first_k_dense_replace": 2}),
    ("qwen3_moe", "lora_bf16_fp32_autocast", False, {}),
)


def recipe_of(family: str, mode: str, gc: bool | None, size: tuple[int, int] = ODD, **options: Any) -> Recipe:
    return recipes.recipe(family, mode, *size, gc=gc, **options)


def payload(family: str, recipe: Recipe, config: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = FAMILIES[family].config(LAYERS, **config)
    made.architectures = None
    inventory = recipes.inventory(family, LAYERS, {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()})
    return {"config": made.to_dict(), "recipe": asdict(recipe), "layers_prefix": inventory.layers_prefix, **more}


def above_stored(timeline: Timeline) -> dict[str, int]:
    """Peaks of the last micro-batch above what was there before it [bytes]."""
    first = max(m.event for m, before in zip(timeline.marks[1:], timeline.marks, strict=False) if m.phase == "forward" != before.phase)
    there = sum(a.allocated_bytes for a in timeline.alive(first - 1))
    found: dict[str, int] = {}
    live, sizes = there, [a.allocated_bytes for a in timeline.allocations]
    for mark, end in timeline.spans():
        if mark.event < first:
            continue
        found[mark.phase] = max(found.get(mark.phase, 0), live - there)
        for event in timeline.events[mark.event : end]:
            live += sizes[event] if event >= 0 else -sizes[~event]
            found[mark.phase] = max(found[mark.phase], live - there)
    return found


@pytest.mark.parametrize(
    ("family", "mode", "gc", "config", "accumulation"), [*((*cell, 1) for cell in CELLS), *((*cell, 2) for cell in CELLS[:2])]
)
def test_the_program_of_a_few_layers_gives_the_bytes_of_all_of_them(
    family: str, mode: str, gc: bool | None, config: dict[str, Any], accumulation: int
) -> None:
    recipe = recipe_of(family, mode, gc, accumulation=accumulation)
    inventory = recipes.inventory(family, LAYERS, {key: tuple(v) if isinstance(v, list) else v for key, v in config.items()})
    few = Session(payload(family, recipe, config))
    assert not few.runs_all_layers
    found = decode_program(encode_program(few.program(*regime(inventory, ODD[1])).program))
    every = Session(payload(family, recipe, config, all_layers=True))
    whole = above_stored(every.run(ODD))
    said = {phase.value: sum(largest(found.peaks[phase], *ODD).items().values()) for phase in STEP}
    assert said == {phase.value: whole[phase.value] for phase in STEP}


@pytest.mark.parametrize("family", ["llama", "falcon_old"])
def test_the_program_of_one_sequence_gives_its_bytes(family: str) -> None:
    recipe = recipe_of(family, "full_bf16", None, (1, 177))
    found = Session(payload(family, recipe, {})).program(1, 2**20, one_sequence=True)
    assert not found.any_batch
    whole = above_stored(Session(payload(family, recipe, {}, all_layers=True)).run((1, 177)))
    said = {phase.value: sum(largest(found.program.peaks[phase], 1, 177).items().values()) for phase in STEP}
    assert said == {phase.value: whole[phase.value] for phase in STEP}


def test_a_program_knows_the_kernels_that_ran() -> None:
    recipe = recipe_of("llama", "full_bf16", None)
    found = Session(payload("llama", recipe, {})).program(1, 4096)
    assert {kernel.value for kernel in found.program.kernels} == {"flash attention"}
    assert isinstance(recipe.training, Training)
    padded = replace(recipe, training=replace(recipe.training, padded=True))
    found = Session(payload("llama", padded, {})).program(1, 4096)
    assert {kernel.value for kernel in found.program.kernels} == {"memory-efficient attention"}


@pytest.mark.parametrize("one_sequence", [True, False])
@pytest.mark.parametrize(("shortest", "longest"), [(1, 63), (1, 4), (100, 140), (1, 511), (4096, 2**20), (1, 2**20)])
def test_three_lengths_make_a_parabola_and_a_fourth_checks_it(shortest: int, longest: int, one_sequence: bool) -> None:
    *common, other = points(shortest, longest, one_sequence=one_sequence)
    lengths = [length for _, length in (*common, other)]
    assert len(set(lengths)) == 4
    assert shortest <= min(lengths) <= max(lengths) <= longest
    assert {batch for batch, _ in common} == ({1} if one_sequence else {2})


def test_without_room_for_a_fourth_length_another_batch_checks_the_parabola() -> None:
    assert points(1, 3) == ((2, 1), (2, 2), (2, 3), (3, 1))
