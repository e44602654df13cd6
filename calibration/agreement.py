"""Closed forms beside the trace, for bundled models: `python -m calibration.agreement`.

Both engines answer the same recipes. Layers are judged apart from the head: a vocabulary of 4,096, and peaks less what lies there between
steps, since logits and weights would hide a wrong layer. With `--out FILE` every cell is kept as it comes, and a stopped run goes on where
it was. Progress goes to stderr, the table, in Markdown, to stdout.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, partial
from itertools import product, takewhile
from pathlib import Path
from time import monotonic
from typing import Any

from calibration.agreement_table import SIZES, SMALL_VOCABULARY, Cell, Difference, Key, markdown
from estimator.dtypes import DType
from estimator.engine import estimate, why_not_modelled
from estimator.errors import RequestError, VramplanError
from estimator.estimate import Estimate
from estimator.inventory import Inventory
from estimator.phases import Phase
from estimator.recipe import Adapter, Attention, Quantization, QuantizationKind, Recipe, Training
from estimator.sources import catalogue
from estimator.sources.cache import library_versions
from estimator.sources.process import Inspector, Limits
from estimator.sources.resolve import build
from estimator.sources.tracing import Subject, Tracer
from estimator.stack import Stack

METHODS = ("full", "lora", "qlora", "qlora_prepared", "int8")
# One core that others share; an answer given late is as good.
_LIMITS = Limits(wall_seconds=120.0, cpu_seconds=120.0)
_WALL_SECONDS = 600.0
_MAX_PROGRAMS = 4096
_LIBRARIES = ("accelerate", "bitsandbytes", "peft", "torch", "transformers")
_PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)
_NF4 = Quantization(kind=QuantizationKind.NF4, double_quant=True, compute_dtype=DType.BFLOAT16)
_INT8 = Quantization(kind=QuantizationKind.INT8)


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
    """The config with a small vocabulary wherever it names one, no token beyond it, and no type of its own, so that one trace serves models
    that differ in nothing else."""
    found: dict[str, Any] = {
        key: small(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not key.endswith("_token_id") and key not in ("dtype", "torch_dtype")
    }
    return found | {"vocab_size": SMALL_VOCABULARY, "pad_token_id": 0} if "vocab_size" in config else found


def cells(
    models: Iterable[str], tracer: Tracer, inspector: Inspector, *, methods: Sequence[str] = METHODS, known: Iterable[Key] = ()
) -> Iterator[Cell]:
    """Every cell of the models but those known, one model after the other. One trace answers all sizes of a cell."""
    done = frozenset(known)
    for name in models:
        entry = catalogue.find(name)
        assert entry is not None, name
        loaded = catalogue.load(entry.file)
        subject = cache(partial(_subject, loaded.config, inspector))
        for method, checkpointing in product(methods, (True, False)):
            if (name, method, checkpointing) not in done:
                recipes = [recipe_of(loaded.inventory, method, checkpointing=checkpointing, size=size) for size in SIZES]
                found = why_not_modelled(loaded.inventory, recipes[0]) or _differences(subject, tracer, recipes)
                yield Cell(
                    model=name,
                    model_type=loaded.inventory.model_type,
                    method=method,
                    checkpointing=checkpointing,
                    date=datetime.now(UTC).date().isoformat(),
                    differences=() if isinstance(found, str) else found,
                    reason=found if isinstance(found, str) else "",
                )


def _subject(config: Mapping[str, Any], inspector: Inspector) -> Subject:
    shrunk = small(config)
    return Subject(config=shrunk, inventory=build(shrunk, inspector=inspector))


def _differences(subject: Callable[[], Subject], tracer: Tracer, recipes: Iterable[Recipe]) -> tuple[Difference, ...] | str:
    """Under every recipe, or why one engine has no answer."""
    try:
        return tuple(_difference(subject(), tracer, recipe) for recipe in recipes)
    except VramplanError as error:
        return error.message


def _difference(subject: Subject, tracer: Tracer, recipe: Recipe) -> Difference:
    """Raises VramplanError if one engine has no answer."""
    closed = estimate(subject.inventory, recipe)
    if closed.steady_state_bytes is None:
        raise RequestError("; ".join(notice.message for notice in closed.notices))
    traced = estimate(subject.inventory, recipe, tracer.step(subject, recipe).program)
    total, above = compare(closed, traced)
    assert recipe.training is not None
    return Difference(batch=recipe.training.micro_batch_size, length=recipe.training.sequence_length, total=total, above_steady=above)


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


def read(file: Path) -> dict[Key, Cell]:
    """Cells that a file holds of the installed libraries; of one asked twice the later."""
    found: dict[Key, Cell] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        data = json.loads(line)
        if data.pop("versions") == versions():
            differences = tuple(Difference(**one) for one in data.pop("differences"))
            cell = Cell(**data, differences=differences)
            found[cell.key] = cell
    return found


def append(file: Path, cell: Cell) -> None:
    """Keeps a cell."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(asdict(cell) | {"versions": versions()}) + "\n")


@cache
def versions() -> dict[str, str]:
    """Of the libraries that a step runs through."""
    return dict(library_versions(_LIBRARIES))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints progress, and the differences by architecture."""
    parser = argparse.ArgumentParser(prog="python -m calibration.agreement", description=__doc__)
    parser.add_argument("models", nargs="*", help="bundled models, compared anew; one of each architecture if none is named")
    parser.add_argument("--all", action="store_true", help="every bundled model")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, help="JSON lines, to keep cells in and to go on from")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no model after so long; 0 prints what is kept")
    args = parser.parse_args(arguments)
    chosen = args.models or one_of_each()
    if args.all:
        chosen += [entry.id for entry in catalogue.entries() if entry.id not in chosen]
    known = read(args.out) if args.out else {}
    inspector = Inspector(limits=_LIMITS, keep_spare=False)
    tracer = Tracer(inspector=inspector, max_entries=_MAX_PROGRAMS, wall_seconds=_WALL_SECONDS)
    start = monotonic()
    begun = takewhile(lambda _: monotonic() - start < args.seconds, chosen)
    for cell in cells(begun, tracer, inspector, methods=args.methods, known=() if args.models else known):
        known[cell.key] = cell
        print(cell, file=sys.stderr, flush=True)
        if args.out:
            append(args.out, cell)
    inspector.close()
    wanted = list(product(chosen, args.methods, (True, False)))
    command = " ".join(("python -m calibration.agreement", *(sys.argv[1:] if arguments is None else arguments)))
    print(markdown([known[key] for key in wanted if key in known], num_wanted=len(wanted), versions=versions(), command=command))


if __name__ == "__main__":
    main()
