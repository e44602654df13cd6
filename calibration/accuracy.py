"""Every published measurement beside the estimate for its own model, recipe and versions: `python -m calibration.accuracy`."""

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from calibration.bounded import bounds
from calibration.left_out import IdleRow, Tagged, coverages, one_sided, refits
from calibration.published import CONSTANTS, NotModelled, Row, Run, rows, translate
from calibration.published_model import inventory_of
from calibration.rules import all_rules, ranges
from estimator import correction
from estimator.device import context_bytes, library_bytes
from estimator.engine import Device, estimate
from estimator.errors import VramplanError
from estimator.estimate import Estimate
from estimator.phases import Phase

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

    @property
    def groups(self) -> dict[str, str]:
        """What the row can be left out with."""
        stack = self.run.recipe.stack
        named = {
            "model": self.run.model.rpartition("/")[2],
            "transformers": ".".join(map(str, stack.transformers[:2])),
            "method": self.run.method,
            "source": self.run.row.source,
        }
        if self.run.recipe.quantization is not None:
            named["bitsandbytes"] = ".".join(map(str, stack.bitsandbytes))
        return named

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
    if row.allocated_bytes is not None and (estimated.steady_state_bytes is not None or run.recipe.inference is not None):
        figures["allocated"] = Pair(measured=row.allocated_bytes, predicted=_peak(run, estimated))
    if row.device_bytes is not None:
        figures["device"] = Pair(measured=row.device_bytes, predicted=estimated.device_bytes)
    residual_class = correction.class_of(run.recipe, estimated.kernels)
    return Comparison(run=run, figures=MappingProxyType(figures), residual_class=residual_class)


def _peak(run: Run, estimated: Estimate) -> int:
    """The largest allocation of what a row measured: the whole run, or its prompt alone [bytes]."""
    if run.method != Phase.PREFILL.value:
        return estimated.peak.allocated_bytes
    (prefill,) = (phase.allocated_bytes for phase in estimated.phases if phase.phase is Phase.PREFILL)
    return prefill


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
        median = statistics.median(map(abs, peaks))
        print(f"{group:<52} {len(members):4}   {_worst(resting):>13}   {median:>16.3%}  {_worst(peaks)}")


def _print_left_out(left_out: Sequence[NotModelled]) -> None:
    print(f"\nnot compared: {len(left_out)} rows, all of them here")
    by_reason: dict[tuple[str, str], list[str]] = {}
    for one in left_out:
        by_reason.setdefault((one.row.source, one.reason), []).append(one.row.id)
    for (source, reason), ids in sorted(by_reason.items(), key=lambda entry: -len(entry[1])):
        print(f"  {len(ids):5}  {source:<20} {reason}: {ranges(ids)}")


def _print_bounds() -> None:
    print("\nbounds: allocated peak at the mean length, which the mean of reserved memory over all steps must not fall below [GiB]")
    for found in bounds(rows()):
        verdict = "holds" if found.holds else "BROKEN"
        figures = f"{_gib(found.mean_reserved)} {_gib(found.predicted_peak)}  {found.share:4.0%}"
        print(f"  {found.row.id:<20} {figures}  {verdict}  {found.row.fields['at']}")


def _print_rules() -> None:
    print("\nconstants and rules that rows bear on: by origin; rows in which they show")
    for rule in all_rules():
        print(f"  {rule.origin.value:<19} {rule.name}: {ranges(rule.agreeing)}\n{'':21} {rule.source}")


def idle_rows(compared: Sequence[Comparison]) -> list[IdleRow]:
    """Rows that the allocator's idle share, full logits, can be had from: every compared row has the stock loss."""
    return [
        IdleRow(
            groups=found.groups,
            measured_peak=found.figures["allocated"].measured,
            measured_resting=found.figures["resting"].measured,
            measured_device=found.figures["device"].measured,
            predicted_peak=found.figures["allocated"].predicted,
            predicted_resting=found.figures["resting"].predicted,
            outside_allocator=context_bytes(found.run.recipe.num_multiprocessors) + library_bytes(),
        )
        for found in compared
        if {"allocated", "resting", "device"} <= found.figures.keys()
    ]


def _print_refits(compared: Sequence[Comparison]) -> None:
    members = idle_rows(compared)
    share = statistics.median(row.share for row in members)
    errors = [row.error(share) for row in members]
    print("\ndevice memory by one idle share (median): set on the other rows, judged on those left out")
    print(f"  {'left out':<44} share  rows  median error   worst")
    print(f"  {'nothing: in sample':<44} {share:5.2f}  {_errors(errors)}")
    for refit in refits(members):
        name = f"{refit.dimension} {refit.group}"
        if refit.constant is None:
            print(f"  {name:<44} nothing is left to set it by")
        else:
            print(f"  {name:<44} {refit.constant:5.2f}  {_errors(refit.errors)}")


def _errors(errors: Sequence[float]) -> str:
    return f"{len(errors):4}  {statistics.median(map(abs, errors)):>12.2%}  {max(errors, key=abs):+7.2%}"


def _print_by_group(compared: Sequence[Comparison]) -> None:
    """Figures without a constant: leaving a group out changes nothing, so that its own errors are those out of sample."""
    print("\nerrors by what can be left out: no row sets a constant of resting memory or of the allocated peak")
    print(f"  {'':<44} rows  resting worst  allocated median    worst")
    named = sorted({(dimension, group) for found in compared for dimension, group in found.groups.items()})
    for dimension, group in named:
        members = [found for found in compared if found.groups.get(dimension) == group]
        resting = _worst([found.figures["resting"].error for found in members if "resting" in found.figures])
        peaks = [found.figures["allocated"].error for found in members if found.judges("allocated")]
        median = f"{statistics.median(map(abs, peaks)):.3%}" if peaks else "-"
        print(f"  {f'{dimension} {group}':<44} {len(members):4}  {resting:>13}  {median:>16}  {_worst(peaks):>7}")


def _print_device(compared: Sequence[Comparison]) -> None:
    judging = [found.figures["device"].error for found in compared if found.judges("device")]
    bound = margin(compared)
    print("\ndevice memory, rows that set no constant of it")
    print(f"  {len(judging)} rows: median error {statistics.median(map(abs, judging)):.2%}, worst {_worst(judging)}")
    print(
        f"  margin without an interval: {bound['share']:.2%} above the estimate ({100 * bound['coverage']:.0f} % of those rows, one-sided)"
    )


def _worst(errors: Sequence[float]) -> str:
    return f"{max(errors, key=abs):+.3%}" if errors else "-"


def _print_coverages(compared: Sequence[Comparison]) -> None:
    for figure in _JUDGED:
        print(f"\n90 % intervals of {figure} figures, made without the rows left out: how many of those lie inside")
        for found in coverages(tagged(compared, figure)):
            share = "      -" if found.share is None else f"{found.share:7.0%}"
            print(
                f"  {f'{found.dimension} {found.group}':<44} {share}  {found.inside} of {found.inside + found.outside}"
                f"; {found.without_interval} without an interval"
            )


def tagged(compared: Sequence[Comparison], figure: str) -> list[Tagged]:
    """Residuals of a figure with what they can be left out with."""
    return [
        Tagged(
            groups=found.groups,
            residual_class=found.residual_class,
            residual=correction.residual(found.figures[figure].measured, found.figures[figure].predicted),
        )
        for found in compared
        if found.residual_class is not None and found.judges(figure)
    ]


def residual_classes(compared: Sequence[Comparison]) -> dict[str, Any]:
    """Residuals of the rows that may judge, by class: what intervals are made of. No class borrows from another."""
    members: dict[str, list[Comparison]] = {}
    for found in compared:
        if found.residual_class is not None:
            members.setdefault(found.residual_class, []).append(found)
    written = {
        name: {
            "evidence": _evidence(found),
            "versions": _versions(found),
            **{figure: [row for one in found for row in _residuals(one, figure)] for figure in _JUDGED},
        }
        for name, found in members.items()
    }
    constants = {figure: {name: list(ids) for name, ids in of.items()} for figure, of in CONSTANTS.items()}
    carried = {figure: _carried(compared, figure) for figure in _JUDGED}
    return {"schema_version": 1, "constants": constants, "classes": written, "carried": carried, "margin": margin(compared)}


def _carried(compared: Sequence[Comparison], figure: str) -> list[int]:
    """Rows inside intervals made without any row of their version of transformers, and all rows that have such an interval."""
    found = [one for one in coverages(tagged(compared, figure)) if one.dimension == "transformers"]
    return [sum(one.inside for one in found), sum(one.inside + one.outside for one in found)]


def margin(compared: Sequence[Comparison]) -> dict[str, Any]:
    """How far above its estimate a device figure lies at most, nine times in ten: over every row that may judge, whatever its class.

    Raises:
        ValueError: if there are too few rows.
    """
    judging = [found for found in compared if found.judges("device")]
    bound = one_sided([correction.residual(found.figures["device"].measured, found.figures["device"].predicted) for found in judging])
    if bound is None:
        raise ValueError(f"{len(judging)} device figures are too few for a margin")
    return {
        "coverage": correction.COVERAGE,
        "share": round(max(0.0, math.expm1(bound)), 4),
        "num_rows": len(judging),
        "evidence": _evidence(judging),
    }


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
    oldest, newest = (".".join(map(str, version)) for version in _versions(compared)["transformers"])
    return f"rows of {sources} that set no constant of the figure ({models} on {cards}, transformers {oldest} to {newest})"


def _versions(compared: Sequence[Comparison]) -> dict[str, list[list[int]]]:
    """Oldest and newest major and minor version of the libraries that decide the formulas; bitsandbytes where every row used it."""
    recipes = [found.run.recipe for found in compared]
    versions = {"transformers": [recipe.stack.transformers for recipe in recipes]}
    if all(recipe.quantization is not None for recipe in recipes):
        versions["bitsandbytes"] = [recipe.stack.bitsandbytes for recipe in recipes]
    return {library: [list(min(used)[:2]), list(max(used)[:2])] for library, used in versions.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write-intervals", action="store_true", help=f"write {_RESIDUALS.name}, from which the estimator makes intervals")
    options = parser.parse_args(arguments)
    compared, left_out = compare_all()
    _print_rows(compared)
    _print_summary(compared)
    _print_by_group(compared)
    _print_device(compared)
    _print_refits(compared)
    _print_coverages(compared)
    _print_rules()
    _print_bounds()
    _print_left_out(left_out)
    if options.write_intervals:
        _RESIDUALS.write_text(json.dumps(residual_classes(compared), indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten: {_RESIDUALS}")


if __name__ == "__main__":
    main()
