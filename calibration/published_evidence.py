"""What `calibration.accuracy` finds, as data for a page: made ahead, since comparing takes seconds.

`python -m calibration.published_evidence` makes it anew.
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from calibration.accuracy import Comparison, compare_all, margin, tagged
from calibration.bounded import bounds
from calibration.left_out import coverages
from calibration.published import NotModelled, rows
from estimator import correction

_FILE = Path(__file__).with_name("measurements") / "evidence.json"
FIGURES = ("resting", "allocated", "device")
_JUDGED = ("allocated", "device")


def evidence(compared: Sequence[Comparison], left_out: Sequence[NotModelled]) -> dict[str, Any]:
    """Errors by kind of run, model, method and versions; coverage out of sample; bounds; every row; what is not compared."""
    kinds = {"fine-tuning": [one for one in compared if one.run.recipe.training is not None]}
    kinds["generation"] = [one for one in compared if one.run.recipe.inference is not None]
    trained = kinds["fine-tuning"]
    return {
        "kinds": [_group(name, members) for name, members in kinds.items() if members],
        "groups": [
            {"by": by, **_group(name, members)}
            for by in ("model", "method", "transformers", "bitsandbytes", "source")
            for name, members in _members(compared, by).items()
        ],
        "coverage": [
            {"figure": figure, "left_out": f"{one.dimension} {one.group}", "inside": one.inside, "judged": one.inside + one.outside,
             "without_interval": one.without_interval}
            for figure in _JUDGED
            for one in coverages(tagged(trained, figure))
        ],
        "intervals": [
            {"class": name, "radii": {figure: _radius(found, figure) for figure in _JUDGED},
             "rows": {figure: len(getattr(found, figure)) for figure in _JUDGED}, "evidence": found.evidence}
            for name, found in correction.shipped().items()
        ],
        "margin": margin(trained),
        "bounds": [
            {"id": one.row.id, "share": round(one.share, 4), "holds": one.holds, "citation": one.row.citation} for one in bounds(rows())
        ],
        "rows": [_row(one) for one in compared],
        "not_compared": [
            {"source": source, "reason": reason, "rows": number}
            for (source, reason), number in Counter((one.row.source, one.reason) for one in left_out).most_common()
        ],
    }  # fmt: skip


@cache
def shipped() -> dict[str, Any]:
    """What was made last."""
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def _members(compared: Sequence[Comparison], by: str) -> dict[str, list[Comparison]]:
    found: dict[str, list[Comparison]] = {}
    for one in compared:
        if by in one.groups:
            found.setdefault(one.groups[by], []).append(one)
    return dict(sorted(found.items()))


def _group(name: str, members: Sequence[Comparison]) -> dict[str, Any]:
    errors = {figure: [one.figures[figure].error for one in members if figure in one.figures] for figure in FIGURES}
    return {
        "name": name,
        "rows": len(members),
        "figures": {
            figure: {"rows": len(of), "median": round(statistics.median(map(abs, of)), 6), "worst": round(_worst(of), 6)}
            for figure, of in errors.items()
            if of
        },
    }


def _radius(kind: correction.ResidualClass, figure: str) -> float | None:
    """Of the interval that an answer carries: no narrower than over all kinds together, as `correction.interval` has it."""
    own = correction.conformal_radius(getattr(kind, figure))
    everything = correction.conformal_radius([one for other in correction.shipped().values() for one in getattr(other, figure)])
    return None if own is None or everything is None else max(own, everything)


def _worst(errors: Sequence[float]) -> float:
    return max(errors, key=abs)


def _row(found: Comparison) -> dict[str, Any]:
    run = found.run
    return {
        "id": run.row.id,
        "model": run.model,
        "method": run.method,
        "batch": run.row.fields["batch"],
        "versions": found.groups["transformers"],
        "card": run.gpu.name,
        "citation": run.row.citation,
        "figures": {name: [pair.measured, pair.predicted] for name, pair in found.figures.items()},
    }


def main() -> None:
    _FILE.write_text(json.dumps(evidence(*compare_all()), indent=1) + "\n", encoding="utf-8")
    print(f"written: {_FILE}")


if __name__ == "__main__":
    main()
