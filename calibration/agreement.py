"""Closed forms beside the trace, for bundled models: `python -m calibration.agreement`.

Both engines answer the same recipes. Layers are judged apart from the head: a vocabulary of 4,096, and peaks less what lies there between
steps, since logits and weights would hide a wrong layer.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

from estimator.dtypes import DType
from estimator.engine import estimate, why_not_modelled
from estimator.errors import VramplanError
from estimator.estimate import Estimate
from estimator.inventory import Inventory
from estimator.phases import Phase
from estimator.recipe import Adapter, Attention, Quantization, QuantizationKind, Recipe, Training
from estimator.sources import catalogue
from estimator.sources.process import Inspector
from estimator.sources.resolve import build
from estimator.sources.tracing import Subject, Tracer
from estimator.stack import Stack

SMALL_VOCABULARY = 4096
SIZES = ((1, 512), (2, 1024), (3, 777))
METHODS = ("full", "lora", "qlora", "qlora_prepared", "int8")
_PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)
_NF4 = Quantization(kind=QuantizationKind.NF4, double_quant=True, compute_dtype=DType.BFLOAT16)
_INT8 = Quantization(kind=QuantizationKind.INT8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One recipe of one model at one size: closed forms less trace, as a share of the trace, the worst of the phases."""

    model: str
    model_type: str
    method: str
    checkpointing: bool
    size: tuple[int, int]
    total: float
    """Of the phase's allocated bytes."""
    above_steady: float
    """Of what a phase adds to the steady state."""


def recipe_of(inventory: Inventory, method: str, *, checkpointing: bool, size: tuple[int, int]) -> Recipe:
    """A usual recipe of a method, under bfloat16 autocast."""
    quantization = {"qlora": _NF4, "qlora_prepared": _NF4, "int8": _INT8}.get(method)
    return Recipe(
        dtype=DType.BFLOAT16,
        attention=Attention(inventory.default_attention),
        quantization=quantization,
        adapter=None if method == "full" else Adapter(r=16, target_modules="all-linear"),
        prepare_for_kbit_training=method == "qlora_prepared",
        training=Training(
            micro_batch_size=size[0], sequence_length=size[1], autocast_dtype=DType.BFLOAT16, gradient_checkpointing=checkpointing
        ),
        stack=Stack(),
    )


def compare(closed: Estimate, traced: Estimate) -> tuple[float, float]:
    """Worst difference over the phases of the step: of what is allocated, and of what lies above the steady state."""
    assert closed.steady_state_bytes is not None
    ours, theirs = ({p.phase: p.allocated_bytes for p in e.phases} for e in (closed, traced))
    totals = [ours[phase] / theirs[phase] - 1 for phase in _PHASES]
    above = [(ours[p] - theirs[p]) / max(theirs[p] - closed.steady_state_bytes, 1) for p in _PHASES]
    return max(totals, key=abs), max(above, key=abs)


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with a small vocabulary wherever it names one, and no token beyond it."""
    found: dict[str, Any] = {
        key: small(value) if isinstance(value, Mapping) else value for key, value in config.items() if not key.endswith("_token_id")
    }
    return found | {"vocab_size": SMALL_VOCABULARY, "pad_token_id": 0} if "vocab_size" in config else found


def cells(
    models: Iterable[str], tracer: Tracer, inspector: Inspector, *, methods: Sequence[str] = METHODS
) -> Iterator[Cell | tuple[str, str, str]]:
    """Every cell of the models, or (model, recipe, reason) where one engine has no answer."""
    for name in models:
        entry = catalogue.find(name)
        assert entry is not None, name
        config = small(catalogue.load(entry.file).config)
        try:
            subject = Subject(config=config, inventory=build(config, inspector=inspector))
        except VramplanError as error:
            yield name, "", error.message
            continue
        for method, checkpointing in product(methods, (True, False)):
            yield from _cells(name, subject, tracer, method, checkpointing=checkpointing)


def _label(method: str, *, checkpointing: bool) -> str:
    return f"{method}, {'checkpointing' if checkpointing else 'no checkpointing'}"


def _cells(name: str, subject: Subject, tracer: Tracer, method: str, *, checkpointing: bool) -> Iterator[Cell | tuple[str, str, str]]:
    inventory = subject.inventory
    label = _label(method, checkpointing=checkpointing)
    for size in SIZES:
        recipe = recipe_of(inventory, method, checkpointing=checkpointing, size=size)
        try:
            if (reason := why_not_modelled(inventory, recipe)) is not None:
                yield name, label, reason
                return
            closed = estimate(inventory, recipe)
            if len(closed.phases) == 1:
                yield name, label, "; ".join(notice.message for notice in closed.notices)
                return
            traced = estimate(inventory, recipe, tracer.step(subject, recipe).program)
        except VramplanError as error:
            yield name, label, error.message
            return
        total, above = compare(closed, traced)
        yield Cell(
            model=name,
            model_type=inventory.model_type,
            method=method,
            checkpointing=checkpointing,
            size=size,
            total=total,
            above_steady=above,
        )


def one_of_each() -> list[str]:
    """Of every architecture with closed forms the bundled model with fewest layers."""
    smallest: dict[str, tuple[int, str]] = {}
    for entry in catalogue.entries():
        inventory = catalogue.load(entry.file).inventory
        recipe = recipe_of(inventory, "full", checkpointing=True, size=SIZES[0])
        if why_not_modelled(inventory, recipe) is None:
            key = inventory.model_type
            smallest[key] = min(smallest.get(key, (10**9, "")), (inventory.num_layers, entry.id))
    return sorted(name for _, name in smallest.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a row per model and recipe, and the median and worst difference."""
    parser = argparse.ArgumentParser(prog="python -m calibration.agreement", description=__doc__)
    parser.add_argument("models", nargs="*", help="bundled models; one of each architecture if none is named")
    parser.add_argument("--all", action="store_true", help="every bundled model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args(arguments)
    chosen = args.models or ([entry.id for entry in catalogue.entries()] if args.all else one_of_each())
    inspector = Inspector(keep_spare=False)
    tracer = Tracer(inspector=inspector)
    found: list[Cell] = []
    print(f"{'model':<42}{'recipe':<34}{'total':>9}{'above steady':>14}   worst of {len(SIZES)} sizes")
    for cell in cells(chosen, tracer, inspector, methods=args.methods):
        if isinstance(cell, tuple):
            print(f"{cell[0]:<42}{cell[1]:<34}  {cell[2][:120]}", flush=True)
            continue
        found.append(cell)
        if cell.size == SIZES[-1]:  # sizes of one recipe come one after the other
            worst = max(found[-len(SIZES) :], key=lambda c: abs(c.above_steady))
            label = _label(cell.method, checkpointing=cell.checkpointing)
            print(f"{cell.model:<42}{label:<34}{worst.total:>+9.3%}{worst.above_steady:>+14.3%}", flush=True)
    inspector.close()
    if found:
        for name, values in (("total", [abs(c.total) for c in found]), ("above steady", [abs(c.above_steady) for c in found])):
            print(f"{name}: median {median(values):.4%}, worst {max(values):.3%} of {len(values)} cells")


if __name__ == "__main__":
    main()
