"""The pages beside the form: how good the estimates are, and what they rest on."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from fastapi import APIRouter, Request, Response

from app.answer import Json
from app.methods import subjects
from app.rendering import page_of
from app.work import Need, in_thread
from estimator.units import gib

router = APIRouter(include_in_schema=False)
_BY = {
    "model": "By model",
    "method": "By method",
    "transformers": "By version of transformers",
    "bitsandbytes": "By version of bitsandbytes",
    "source": "By where it was published",
}
_PARTS = 40


@router.get("/accuracy")
async def accuracy(request: Request) -> Response:
    """What was measured, how far off the estimates are, and how often intervals hold."""
    return page_of("accuracy.html", await in_thread(request, Need.NOTHING, _accuracy))


@router.get("/methods")
async def methods(request: Request) -> Response:
    """Every formula with its source."""
    return page_of("methods.html", await in_thread(request, Need.NOTHING, lambda: {"subjects": subjects()}))


@cache
def _accuracy() -> Json:
    from calibration.published_evidence import FIGURES, shipped  # the comparison that it comes with is not needed before

    found = shipped()
    return {
        "kinds": found["kinds"],
        "tables": [(title, [group for group in found["groups"] if group["by"] == by]) for by, title in _BY.items()],
        "figures": FIGURES,
        "coverage": found["coverage"],
        "intervals": found["intervals"],
        "margin": found["margin"],
        "bounds": found["bounds"],
        "rows": [_row(row) for row in found["rows"]],
        "not_compared": list(_reasons(found["not_compared"])),
    }


def _row(row: Mapping[str, Any]) -> Json:
    figures = {
        name: {"measured": gib(measured), "predicted": gib(predicted), "error": (predicted - measured) / measured}
        for name, (measured, predicted) in row["figures"].items()
    }
    return {**row, "figures": figures}


def _reasons(entries: list[Json]) -> Iterator[Json]:
    """The most frequent reasons one by one, the rest in one line for each source."""
    yield from entries[:_PARTS]
    rest: dict[str, int] = {}
    for entry in entries[_PARTS:]:
        rest[entry["source"]] = rest.get(entry["source"], 0) + entry["rows"]
    for source, number in rest.items():
        yield {"source": source, "reason": "other reasons, each of few rows: `make accuracy` prints them all", "rows": number}
