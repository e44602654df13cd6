"""Which cards hold a run whose sizes are given: generation, loading, or training as it is, each card by its own estimate."""

from collections.abc import Iterator, Mapping
from typing import Any

from app.answer import VERDICTS, Json, device_bytes, is_modelled, render_fit
from app.card import card_for
from app.prices import current, price_json
from app.reading import read_estimate
from app.resolution import resolve_recipe
from app.service import Case, interval_of, prepare
from estimator.errors import RequestError
from estimator.gpu_filter import GpuFilter
from estimator.gpus import Gpu, Vendor, all_gpus
from estimator.offers import cheapest

_NAMED = ("gpu", "capacity_gib", "nvidia_smi", "filter")


def cards_that_hold(payload: Mapping[str, Any], words: str = "") -> list[Json]:
    """Every card that passes the filter, with what the run leaves free on it: the cheapest that fit first.

    Args:
        payload: a request of `estimate`; its card is left out, the number of cards stays.
        words: of a filter, such as `24GB..80GB bf16`.

    Raises:
        VramplanError: if the request or the model cannot be answered for.
    """
    hardware = payload.get("hardware") or {}
    case = prepare(read_estimate({**payload, "hardware": {name: value for name, value in hardware.items() if name not in _NAMED}}))
    wanted = GpuFilter.parse(words, field="hardware.filter", book=current())
    number = case.recipe.parallel.num_gpus
    cards = [gpu for gpu in all_gpus() if gpu.vendor is Vendor.NVIDIA and not gpu.is_modified and wanted.accepts(gpu, number)]
    return sorted((row for gpu in cards for row in _rows(case, gpu, number, wanted)), key=_order)


def _rows(case: Case, gpu: Gpu, number: int, wanted: GpuFilter) -> Iterator[Json]:
    request = case.question.request
    card = card_for(gpu, request.hardware.headroom if request.hardware is not None else None)
    try:
        recipe = resolve_recipe(request, case.inventory, card)
        estimate = case.on(card, recipe).answerer.estimate(recipe)
    except RequestError:  # a card that the libraries refuse for this run is not offered
        return
    if not is_modelled(estimate):
        raise RequestError("model: only its loading is modelled, so no card can be promised", field="model")
    fit = render_fit(card, estimate, interval_of(recipe, estimate))
    assert fit is not None
    offer = cheapest(gpu.id, number, providers=wanted.providers, book=wanted.book)
    yield {
        "gpu": gpu.id,
        "name": gpu.name,
        "num_gpus": number,
        "verdict": fit["verdict"],
        "device_bytes": device_bytes(estimate),
        "margin_bytes": fit["free_bytes"],
        "capacity_bytes": gpu.capacity_bytes,
        **price_json(offer),
    }


def _order(row: Json) -> tuple[int, float, int]:
    price = row["usd_per_hour"]
    return VERDICTS.index(row["verdict"]), price[0] if price else float("inf"), row["capacity_bytes"]
