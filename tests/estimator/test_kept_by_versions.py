"""What a layer keeps and the loss takes under other versions of transformers, against runs of their own (`tests/oracle/record_kept.py`)."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estimator.dtypes import DType
from estimator.recipe import Attention, Recipe, Trainer, Training
from estimator.sources.process import Inspector
from estimator.sources.resolve import build
from estimator.stack import Stack, parse_version
from estimator.static_memory import stored_tensors
from estimator.step import _Step, keeps_cache, regime_of, run_step
from tests.oracle.record_kept import BATCH, FEW, LENGTH, LENGTH_OF_LOGITS, MANY, OF_LOGITS


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(__file__).parent / "data" / name).read_text(encoding="utf-8").splitlines()]


RECORDED = _lines("kept_by_other_transformers.jsonl")
PEAKS = _lines("peaks_by_other_transformers.jsonl")


def _name(line: dict[str, Any]) -> str:
    config = line["config"]
    cache = "cache" if line["use_cache"] else "no cache"
    return f"{config['model_type']} {config['num_key_value_heads']} of 4 {cache} {line['transformers']}"


def _recipe(line: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe(
        dtype=DType.BFLOAT16,
        attention=Attention(line.get("config", {}).get("attn_implementation", "sdpa")),
        training=Training(micro_batch_size=BATCH, sequence_length=LENGTH, **fields),
        stack=Stack(transformers=parse_version("transformers", line["transformers"])),
    )


def _kept(line: dict[str, Any], num_layers: int, inspector: Inspector) -> int:
    fields = {key: value for key, value in line["config"].items() if key != "attn_implementation"}
    inventory = build({**fields, "num_hidden_layers": num_layers, "use_cache": line["use_cache"]}, inspector=inspector)
    recipe = _recipe(line)
    step = _Step(inventory, recipe, stored_tensors(inventory, recipe), regime_of(recipe, inventory), cuda_kernels=False, names=False)
    with step.tape.recording():
        outputs = step._model()
        found = sum(number * extent.at(BATCH, LENGTH) for (_, extent), number in step.tape.live.items())
    del outputs
    return found


@pytest.mark.parametrize("line", RECORDED, ids=_name)
def test_a_layer_keeps_what_it_kept_in_that_version(line: dict[str, Any], inspector: Inspector) -> None:
    assert _kept(line, MANY, inspector) - _kept(line, FEW, inspector) == line["layer_bytes"]


@pytest.mark.parametrize("line", PEAKS, ids=lambda line: f"{line['batch']} of {line['transformers']}")
def test_logits_take_what_they_took_in_that_version(line: dict[str, Any], inspector: Inspector) -> None:
    """Before 4.49 the loss leaves off the last of the 240 positions: of several sequences that is a copy, of one it is not."""
    inventory = build({**OF_LOGITS, "use_cache": False}, inspector=inspector)
    training = Training(micro_batch_size=line["batch"], sequence_length=LENGTH_OF_LOGITS)
    recipe = replace(_recipe(line), training=training)
    program = run_step(inventory, recipe, stored_tensors(inventory, recipe), regime_of(recipe, inventory), cuda_kernels=False)
    said = max(extent.at(*training.shape) for extents in program.peaks.values() for extent in extents)
    assert said == pytest.approx(line["peak_bytes"], rel=1.5 / LENGTH_OF_LOGITS)


def test_versions_of_transformers_4_that_differ_are_recorded() -> None:
    assert {line["transformers"] for line in RECORDED} == {"4.45.2", "4.47.1", "4.48.3", "4.51.3", "4.55.4", "4.57.1"}


def test_caches_are_kept_without_checkpointing_alone_and_not_by_a_trainer_that_wants_none(inspector: Inspector) -> None:
    line = next(line for line in RECORDED if line["use_cache"])
    inventory = build({**line["config"], "num_hidden_layers": FEW, "use_cache": True}, inspector=inspector)
    assert keeps_cache(inventory, _recipe(line, gradient_checkpointing=False))
    assert not keeps_cache(inventory, _recipe(line, gradient_checkpointing=True))
    for version, is_kept in (((0, 21), True), ((0, 22), False)):
        stack = Stack(transformers=(4, 57, 1), trl=version)
        assert keeps_cache(inventory, replace(_recipe(line), trainer=Trainer.TRL, stack=stack)) is is_kept
