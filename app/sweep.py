"""`sweep`: memory over micro-batches, lengths and ranks, as JSON, CSV and picture."""

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from app.answer import SCHEMA_VERSION, Json, device_bytes
from app.card import Card
from app.evaluation import evaluator_of
from app.heatmap import draw
from app.reading import read_sweep
from app.request import MAX_BATCH, MAX_LENGTH, MAX_RANK
from app.service import Case, prepare
from app.shortfall import Outcome, required_bytes
from app.training import check_length
from estimator.device import context_bytes
from estimator.errors import RequestError
from estimator.phases import Basis
from estimator.recipe import Recipe
from estimator.sweep import Sweep
from estimator.sweep import sweep as swept

MAX_POINTS = 100_000
# Points that are replayed for one sweep: four take about a second.
MAX_REPLAYS = 16
# One estimate after the other, where there are no closed forms.
MAX_SLOW_POINTS = 2_000
_DEFAULT_BATCHES = "1..16"
_DEFAULT_LENGTHS = "512..8192:512"
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})(?::(\d{1,9}))?")
_COLUMNS = ("r", "per_device_train_batch_size", "max_length", "allocated_bytes", "device_bytes", "required_bytes", "verdict")


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """A sweep and the case it belongs to."""

    case: Case
    grids: tuple[tuple[int | None, Sweep], ...]
    """A rank and the grid for it; None where there is no adapter."""
    confirmed: tuple[tuple[bool, ...], ...]
    """For each grid and length, whether the largest batch that fits was found with the allocator replayed."""

    @property
    def card(self) -> Card | None:
        return self.case.card


def sweep(payload: Mapping[str, Any]) -> Swept:
    """Every point of the grid that the request asks for.

    Raises:
        VramplanError: if the request or the model cannot be answered for.
    """
    question = read_sweep(payload)
    request = question.request
    if request.training is None:
        raise RequestError("training: is required for a sweep", field="training")
    fields = request.sweep
    batches = axis("sweep.per_device_train_batch_size", _first(fields.per_device_train_batch_size, _DEFAULT_BATCHES), MAX_BATCH)
    lengths = axis("sweep.max_length", _first(fields.max_length, request.training.max_length, _DEFAULT_LENGTHS), MAX_LENGTH)
    training = request.training.model_copy(update={"max_length": lengths[0]})
    case = prepare(replace(question, request=request.model_copy(update={"training": training})))
    if fields.max_length is None and request.training.max_length is None:
        limit = case.inventory.num_positions
        lengths = [length for length in lengths if length <= (limit or MAX_LENGTH)] or lengths[:1]
    check_length("sweep.max_length", lengths[-1], case.inventory)
    recipes = _ranked(case, axis("sweep.r", fields.r, MAX_RANK) if fields.r is not None else None)
    if len(batches) * len(lengths) * len(recipes) > MAX_POINTS:
        raise RequestError(f"sweep: at most {MAX_POINTS:,} points are accepted", field="sweep")
    budget = MAX_REPLAYS if request.confirm and case.card is not None and not case.recipe.parallel.is_spread else 0
    grids, confirmed = [], []
    for rank, recipe in recipes:
        grid, columns, budget = _confirmed(replace(case, recipe=recipe), _grid(case, recipe, batches, lengths), budget)
        grids.append((rank, grid))
        confirmed.append(columns)
    return Swept(case=case, grids=tuple(grids), confirmed=tuple(confirmed))


def _confirmed(case: Case, grid: Sweep, budget: int) -> tuple[Sweep, tuple[bool, ...], int]:
    """The grid with the points around its border replayed, for as many lengths as the budget goes; what is left of it."""
    device, required = grid.device_bytes.copy(), grid.required_bytes.copy()
    columns = [False] * len(grid.lengths)
    for column, length in enumerate(grid.lengths):
        if budget <= 0 or case.card is None:
            break
        border = _Border(case=case, batches=grid.batches, length=length)
        border.find(int((grid.required_bytes[:, column] <= case.card.usable_bytes).nonzero()[0].max(initial=-1)))
        for row, outcome in border.asked.items():
            if outcome.may_fit:
                budget -= 1
                device[row, column] = device_bytes(outcome.estimate)
                required[row, column] = required_bytes(outcome.recipe, outcome.card, outcome.estimate)
        columns[column] = True
    return replace(grid, device_bytes=device, required_bytes=required), tuple(columns), budget


@dataclass(frozen=True, slots=True, kw_only=True)
class _Border:
    """What fits of one length."""

    case: Case
    batches: tuple[int, ...]
    length: int
    asked: dict[int, Outcome] = field(default_factory=dict)
    """By place of the micro-batch."""

    def find(self, row: int) -> None:
        """Asks from a guess on, down or up, until one fits and the next does not."""
        if row >= 0 and not self._fits(row):
            while row > 0 and not self._fits(row - 1):
                row -= 1
            return
        while row + 1 < len(self.batches) and self._fits(row + 1):
            row += 1

    def _fits(self, row: int) -> bool:
        if row not in self.asked:
            training, card = self.case.recipe.training, self.case.card
            assert training is not None
            assert card is not None
            sized = replace(training, micro_batch_size=self.batches[row], sequence_length=self.length)
            recipe = replace(self.case.recipe, training=sized)
            self.asked[row] = Outcome(recipe=recipe, card=card, estimate=self.case.answerer.estimate(recipe))
        return self.asked[row].fits


def _ranked(case: Case, ranks: list[int] | None) -> list[tuple[int | None, Recipe]]:
    adapter = case.recipe.adapter
    if ranks is None:
        return [(None if adapter is None else adapter.r, case.recipe)]
    if adapter is None:
        raise RequestError("sweep.r: there is no adapter in the request; give peft", field="sweep.r")
    return [(rank, replace(case.recipe, adapter=replace(adapter, r=rank))) for rank in ranks]


def _grid(case: Case, recipe: Recipe, batches: list[int], lengths: list[int]) -> Sweep:
    evaluator = evaluator_of(case, recipe)
    if not evaluator.is_quick and len(batches) * len(lengths) > MAX_SLOW_POINTS:
        raise RequestError(f"sweep: at most {MAX_SLOW_POINTS:,} points are accepted of a model without closed forms", field="sweep")
    assert recipe.training is not None
    found = swept(
        evaluator,
        batches,
        lengths,
        steps=recipe.training.gradient_accumulation_steps,
        context_bytes=context_bytes(recipe.num_multiprocessors),
    )
    if not found.is_in_range:
        raise RequestError("sweep: some points take more than 2^59 bytes; accepted are smaller batches and lengths", field="sweep")
    return found


def _first(*given: int | str | list[int] | None) -> int | str | list[int]:
    """The first that is not absent: an empty list or text is given, and refused."""
    return next(value for value in given if value is not None)


def axis(field: str, asked: int | str | list[int], limit: int) -> list[int]:
    """The values of an axis: numbers in ascending order, or `first..last` with `:step` where it is not 1.

    Raises:
        RequestError: if it is anything else, empty, or out of bounds.
    """
    if isinstance(asked, int):
        values = [asked]
    elif isinstance(asked, list):
        values = sorted(set(asked))
    elif (match := _RANGE.fullmatch(asked.strip())) is not None and int(match[3] or 1) > 0:
        first, last, step = int(match[1]), int(match[2]), int(match[3] or 1)
        if (last - first) // step >= MAX_POINTS:
            raise RequestError(f"sweep: at most {MAX_POINTS:,} points are accepted", field=field)
        values = list(range(first, last + 1, step))
    elif re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*", asked):
        values = sorted({int(part) for part in asked.split(",")})
    else:
        raise RequestError(f"{field}: {asked[:80]!r} is not accepted; {_expected(limit)}", field=field)
    if not values or values[0] < 1 or values[-1] > limit:
        raise RequestError(f"{field}: {str(asked)[:80]} is not accepted; {_expected(limit)}", field=field)
    return values


def _expected(limit: int) -> str:
    return f"expected at least one number from 1 to {limit:,}: one, a list, or first..last:step such as 512..8192:512"


def answer_sweep(found: Swept) -> Json:
    """The grids in the contract's words."""
    card = found.card
    return {
        "schema_version": SCHEMA_VERSION,
        "reserved_basis": Basis.MODELLED.value,
        "model": found.case.model_json(),
        "gpu": None if card is None else card.id,
        "usable_bytes": None if card is None else card.usable_bytes,
        "gradient_accumulation_steps": _steps(found),
        "per_device_train_batch_size": list(found.grids[0][1].batches),
        "max_length": list(found.grids[0][1].lengths),
        "grids": [
            {
                "r": rank,
                "allocated_bytes": grid.allocated_bytes.tolist(),
                "device_bytes": grid.device_bytes.tolist(),
                "required_bytes": grid.required_bytes.tolist(),
                "verdicts": None if card is None else grid.verdicts(card.usable_bytes),
                "frontier": None if card is None else grid.frontier(card.usable_bytes),
                "frontier_basis": None if card is None else [_basis(is_replayed) for is_replayed in columns],
            }
            for (rank, grid), columns in zip(found.grids, found.confirmed, strict=True)
        ],
    }


def _basis(is_replayed: bool) -> str:
    return (Basis.REPLAYED if is_replayed else Basis.MODELLED).value


def _steps(found: Swept) -> int:
    assert found.case.recipe.training is not None
    return found.case.recipe.training.gradient_accumulation_steps


def csv_of(found: Swept) -> str:
    """One line for each point, every cell quoted."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for rank, grid in found.grids:
        verdicts = None if found.card is None else grid.verdicts(found.card.usable_bytes)
        rows = zip(grid.allocated_bytes.tolist(), grid.device_bytes.tolist(), grid.required_bytes.tolist(), strict=True)
        for row, (batch, sizes) in enumerate(zip(grid.batches, rows, strict=True)):
            for column, length in enumerate(grid.lengths):
                verdict = "" if verdicts is None else verdicts[row][column]
                writer.writerow(("" if rank is None else rank, batch, length, *(size[column] for size in sizes), verdict))
    return out.getvalue()


def svg_of(found: Swept, *, standalone: bool = True) -> str:
    """Device bytes as colours, one field for each rank, with the border of what fits.

    Args:
        standalone: as of `heatmap.draw`.
    """
    name = found.case.model.id or found.case.inventory.model_type
    card = "" if found.card is None else f" on {found.card.name}"
    usable = None if found.card is None else found.card.usable_bytes
    return draw(f"{name}{card}", found.grids, usable, standalone=standalone)
