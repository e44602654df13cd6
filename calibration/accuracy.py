"""Every published measurement beside the estimate for its own model, recipe and versions: `python -m calibration.accuracy`."""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from calibration.published import CONFIRMED, CONSTANTS, NotModelled, Row, Run, rows, translate
from calibration.published_model import inventory_of
from estimator import correction
from estimator.engine import Device, estimate
from estimator.errors import VramplanError

# Figures that have intervals.
_JUDGED = ("allocated", "device")

_RESIDUALS = Path(correction.__file__).with_name("data") / "residuals.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A figure as it was measured and as it is predicted [bytes]."""

    measured: int
    predicted: int

    @property
    def error(self) -> float:
        """(predicted − measured) / measured: negative when the estimate is too low."""
        return (self.predicted - self.measured) / self.measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One run: the figures that were published, each beside its estimate."""

    run: Run
    figures: Mapping[str, Pair]
    """By name: `resting`, `allocated`, `device`."""
    residual_class: str | None
    """Whose residuals the row belongs to."""

    def judges(self, figure: str) -> bool:
        """Whether the row may judge a figure: it was published, and set no constant of it."""
        return figure in self.figures and not any(self.run.row.id in ids for ids in CONSTANTS.get(figure, {}).values())


def compare(run: Run) -> Comparison:
    """The estimate of a run beside its figures.

    Raises:
        VramplanError: if the model cannot be had or the recipe is refused.
    """
    estimated = estimate(inventory_of(run), run.recipe, device=Device(usable_bytes=run.gpu.capacity_bytes))
    figures: dict[str, Pair] = {}
    row = run.row
    if row.resting_bytes is not None and estimated.steady_state_bytes is not None:
        figures["resting"] = Pair(measured=row.resting_bytes, predicted=estimated.steady_state_bytes)
    if row.allocated_bytes is not None and estimated.steady_state_bytes is not None:
        figures["allocated"] = Pair(measured=row.allocated_bytes, predicted=estimated.peak.allocated_bytes)
    if row.device_bytes is not None:
        figures["device"] = Pair(measured=row.device_bytes, predicted=estimated.device_bytes)
    residual_class = correction.class_of(run.recipe, estimated.kernels)
    return Comparison(run=run, figures=MappingProxyType(figures), residual_class=residual_class)


def compare_all(published: Iterable[Row] | None = None) -> tuple[tuple[Comparison, ...], tuple[NotModelled, ...]]:
    """Every row, compared or with the reason why not."""
    compared: list[Comparison] = []
    left_out: list[NotModelled] = []
    for row in rows() if published is None else published:
        translated = translate(row)
        if isinstance(translated, NotModelled):
            left_out.append(translated)
            continue
        try:
            found = compare(translated)
        except VramplanError as error:
            left_out.append(NotModelled(row=row, reason=error.message))
            continue
        if "allocated" in found.figures:
            compared.append(found)
        else:
            left_out.append(NotModelled(row=row, reason="the step of this model is not modelled"))
    return tuple(compared), tuple(left_out)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:8.3f}"


def _pair(pair: Pair | None) -> str:
    return " " * 26 if pair is None else f"{_gib(pair.measured)} {_gib(pair.predicted)} {pair.error:+8.2%}"


def _print_rows(compared: Sequence[Comparison]) -> None:
    print(f"{'':<16} {'measured, predicted [GiB], error: resting':<40} {'allocated peak':<26}  device")
    for found in compared:
        shown = "  ".join(_pair(found.figures.get(name)) for name in ("resting", "allocated", "device"))
        print(f"{found.run.row.id:<16} {shown}  B={found.run.row.fields['batch']} {found.run.group}")


def _print_summary(compared: Sequence[Comparison]) -> None:
    groups: dict[str, list[Comparison]] = {}
    for found in compared:
        groups.setdefault(found.run.group, []).append(found)
    print(f"\n{'group':<52} rows   resting worst   allocated median  worst")
    for group, members in [*sorted(groups.items()), ("all", list(compared))]:
        resting = [m.figures["resting"].error for m in members if "resting" in m.figures]
        peaks = [m.figures["allocated"].error for m in members]
        worst_resting = f"{max(resting, key=abs):+.3%}" if resting else "-"
        print(
            f"{group:<52} {len(members):4}   {worst_resting:>13}   {statistics.median(map(abs, peaks)):>16.3%}  {max(peaks, key=abs):+.3%}"
        )


def _print_judged_apart(compared: Sequence[Comparison]) -> None:
    """Constants and the rows that set them, then each group of rows judged by the others."""
    from calibration.left_out import left_out, told

    for figure in ("resting", *_JUDGED):
        constants = CONSTANTS.get(figure, {})
        set_by = "; ".join(f"{name} ({len(ids)} rows, which do not judge it)" for name, ids in constants.items())
        print(f"\n{figure}: one group left out at a time; constants set by rows: {set_by or 'none'}")
        for found in left_out(compared, figure):
            print(f"  {told(found)}")
    print("\nrules that come from the libraries' code, and that rows could only confirm:")
    for rule in CONFIRMED:
        print(f"  {rule.name:<44} {rule.source}")


def _print_device(compared: Sequence[Comparison]) -> None:
    """Device memory by version of transformers: what no rule of ours explains differs from one environment to the next."""
    by_version: dict[str, list[float]] = {}
    everything = [found.figures["device"].error for found in compared if "device" in found.figures]
    for found in compared:
        if "device" in found.figures:
            by_version.setdefault(".".join(map(str, found.run.recipe.stack.transformers)), []).append(found.figures["device"].error)
    print(f"\n{'device, by transformers':<52} rows   median  worst")
    for version, errors in [*sorted(by_version.items()), ("all", everything)]:
        print(f"{version:<52} {len(errors):4}  {statistics.median(map(abs, errors)):>7.3%}  {max(errors, key=abs):+.3%}")


def _print_left_out(left_out: Sequence[NotModelled], *, every: bool) -> None:
    print(f"\nnot compared: {len(left_out)} rows")
    for (source, reason), number in Counter((n.row.source, n.reason) for n in left_out).most_common():
        print(f"  {number:5}  {source:<20} {reason}")
    if every:
        for one in left_out:
            print(f"  {one.row.id:<28} {one.reason}")


def residual_classes(compared: Sequence[Comparison]) -> dict[str, Any]:
    """Residuals of the rows that may judge, by class: what intervals are made of. No class borrows from another."""
    members: dict[str, list[Comparison]] = {}
    for found in compared:
        if found.residual_class is not None:
            members.setdefault(found.residual_class, []).append(found)
    written = {
        name: {
            "evidence": _evidence(found),
            "transformers": sorted({one.run.recipe.stack.transformers[0] for one in found}),
            **{figure: [row for one in found for row in _residuals(one, figure)] for figure in _JUDGED},
        }
        for name, found in members.items()
    }
    constants = {figure: {name: list(ids) for name, ids in of.items()} for figure, of in CONSTANTS.items()}
    return {"schema_version": 1, "constants": constants, "classes": written}


def _residuals(found: Comparison, figure: str) -> list[dict[str, Any]]:
    if not found.judges(figure):
        return []
    pair = found.figures[figure]
    return [{"id": found.run.row.id, "residual": round(correction.residual(pair.measured, pair.predicted), 6)}]


def _evidence(compared: Sequence[Comparison]) -> str:
    runs = [found.run for found in compared]
    sources = ", ".join(sorted({run.row.source for run in runs}))
    models = ", ".join(sorted({run.model.rpartition("/")[2] for run in runs}))
    cards = ", ".join(sorted({run.gpu.name for run in runs}))
    versions = sorted({run.recipe.stack.transformers for run in runs})
    oldest, newest = (".".join(map(str, versions[end][:2])) for end in (0, -1))
    return f"rows of {sources} that set no constant of the figure ({models} on {cards}, transformers {oldest} to {newest})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write-intervals", action="store_true", help=f"write {_RESIDUALS.name}, from which the estimator makes intervals")
    parser.add_argument("--all", action="store_true", help="name every row that is not compared, not only the reasons")
    options = parser.parse_args(arguments)
    compared, left_out = compare_all()
    _print_rows(compared)
    _print_summary(compared)
    _print_device(compared)
    _print_judged_apart(compared)
    _print_left_out(left_out, every=options.all)
    if options.write_intervals:
        _RESIDUALS.write_text(json.dumps(residual_classes(compared), indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {_RESIDUALS}")


if __name__ == "__main__":
    main()
