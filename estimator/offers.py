"""Where cards are offered and at what price: dated ranges, each with its source.

A book of offers comes with the package; a newer one is fetched on demand and handed in. Nothing here asks the network or a clock.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from estimator.errors import RequestError
from estimator.gpus import all_gpus

_BUNDLED = Path(__file__).with_name("data") / "offers.json"

CURRENCY = "USD"
MAX_USD_PER_CARD_HOUR = 100.0
"""Above every price seen for one card by a factor of ten: what lies beyond is a mistake of the source [USD/h]."""
MAX_COUNT = 72
_DATE = re.compile(r"20\d\d-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?")
_PROVIDER = re.compile(r"[a-z0-9][a-z0-9-]{1,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """So many cards of one kind in one machine at one provider."""

    gpu: str
    """Id in the GPU catalogue."""
    provider: str
    count: int
    usd_per_hour_min: float
    """For all cards together [USD/h]; 0 where it is free."""
    usd_per_hour_max: float
    date: str
    """When the price was published or read: `2026-03` or `2026-03-14`."""
    source: str
    note: str = ""

    @property
    def usd_per_card_hour(self) -> float:
        """The lower price for one card [USD/h]."""
        return self.usd_per_hour_min / self.count


@dataclass(frozen=True, kw_only=True)
class OfferBook:
    """Offers of one file."""

    offers: tuple[Offer, ...] = field(repr=False)
    listings: Mapping[str, frozenset[str]] = field(default_factory=dict, repr=False)
    """Providers that list a card, also where no price of theirs is known."""

    @cached_property
    def _by_gpu(self) -> Mapping[str, tuple[Offer, ...]]:
        found: dict[str, list[Offer]] = {}
        for offer in self.offers:
            found.setdefault(offer.gpu, []).append(offer)
        return {gpu: tuple(sorted(offers, key=_order)) for gpu, offers in found.items()}

    @cached_property
    def providers(self) -> tuple[str, ...]:
        """All providers, in alphabetical order."""
        return tuple(sorted({offer.provider for offer in self.offers}.union(*self.listings.values())))

    def providers_of(self, gpu: str) -> frozenset[str]:
        """Who offers a card, with or without a known price."""
        return self.listings.get(gpu, frozenset()).union(offer.provider for offer in self.of(gpu))

    def of(self, gpu: str) -> tuple[Offer, ...]:
        """Offers of a card, fewest cards and lowest price first."""
        return self._by_gpu.get(gpu, ())


def _order(offer: Offer) -> tuple[int, float, str]:
    return offer.count, offer.usd_per_hour_min, offer.provider


def offers_of(gpu: str, *, book: OfferBook | None = None) -> tuple[Offer, ...]:
    """Offers of a card, fewest cards and lowest price first.

    Args:
        gpu: id in the GPU catalogue.
        book: where to look; the bundled one if None.
    """
    return (book or bundled()).of(gpu)


def cheapest(
    gpu: str, count: int = 1, *, providers: Collection[str] = (), include_free: bool = False, book: OfferBook | None = None
) -> Offer | None:
    """The lowest price for exactly so many cards in one machine; None where none is known.

    Args:
        gpu: id in the GPU catalogue.
        count: cards in one machine.
        providers: only these, if any are given.
        include_free: whether free notebooks count, whose hours are limited.
        book: where to look; the bundled one if None.
    """
    fitting = (
        offer
        for offer in offers_of(gpu, book=book)
        if offer.count == count and (not providers or offer.provider in providers) and (include_free or offer.usd_per_hour_max > 0)
    )
    return min(fitting, key=_order, default=None)


@cache
def bundled() -> OfferBook:
    """The offers that come with the package, read at the first call."""
    return parse(_BUNDLED.read_text(encoding="utf-8"))


def parse(text: str) -> OfferBook:
    """A book of offers from its file, every entry checked.

    Raises:
        RequestError: if it is no book of offers, or an entry names an unknown card, another currency, or a price out of bounds.
    """
    try:
        content = json.loads(text)
    except ValueError:
        raise RequestError("offers: not JSON", field="offers") from None
    rows = content.get("offers") if isinstance(content, dict) else None
    if not isinstance(rows, list) or content.get("schema_version") != 1:
        raise RequestError("offers: expected schema_version 1 and a list of offers", field="offers")
    if content.get("currency") != CURRENCY:
        raise RequestError(f"currency: {content.get('currency')!r} is not accepted; expected {CURRENCY}", field="currency")
    found = tuple(offer for number, row in enumerate(rows) for offer in _entry(number, row))
    if not found:
        raise RequestError("offers: there are none", field="offers")
    return OfferBook(offers=found, listings=dict(_listings(content.get("listings"))))


def serialised(offers: Iterable[Offer]) -> str:
    """The file of a book: one line for each offer."""
    lines = (
        json.dumps(
            {
                "gpu": offer.gpu,
                "provider": offer.provider,
                "counts": [offer.count],
                "usd_per_card_hour": [offer.usd_per_hour_min / offer.count, offer.usd_per_hour_max / offer.count],
                "date": offer.date,
                "source": offer.source,
                **({"note": offer.note} if offer.note else {}),
            },
            ensure_ascii=False,
        )
        for offer in sorted(offers, key=lambda offer: (offer.gpu, offer.provider, offer.count))
    )
    return f'{{"schema_version": 1, "currency": "{CURRENCY}", "offers": [\n' + ",\n".join(lines) + "\n]}\n"


def check(offer: Offer, *, where: str = "offer") -> Offer:
    """The offer, if it can be believed.

    Raises:
        RequestError: naming the field that cannot.
    """
    low, high = offer.usd_per_card_hour, offer.usd_per_hour_max / offer.count if offer.count else math.nan
    problems = {
        "gpu": None if offer.gpu in _ids() else f"{offer.gpu!r} is not in the catalogue",
        "provider": None if _PROVIDER.fullmatch(offer.provider) else f"{offer.provider!r} is no name of a provider",
        "count": None if 1 <= offer.count <= MAX_COUNT else f"{offer.count} cards in one machine are not accepted",
        "usd_per_card_hour": (
            None
            if 0 <= low <= high <= MAX_USD_PER_CARD_HOUR
            else f"{low:g} to {high:g} USD/h for one card is out of bounds (0 to {MAX_USD_PER_CARD_HOUR:g}, ascending)"
        ),
        "date": None if _DATE.fullmatch(offer.date) else f"{offer.date!r} is no date; expected YYYY-MM or YYYY-MM-DD",
        "source": None if offer.source.strip() else "missing",
    }
    for name, problem in problems.items():
        if problem is not None:
            raise RequestError(f"{where}.{name}: {problem}", field=f"{where}.{name}")
    return offer


@cache
def _ids() -> frozenset[str]:
    return frozenset(gpu.id for gpu in all_gpus())


def _listings(content: Any) -> Iterable[tuple[str, frozenset[str]]]:
    if content is None:
        return
    try:
        for row in content["cards"]:
            gpu, providers = str(row["gpu"]), frozenset(map(str, row["providers"]))
            if gpu not in _ids() or not all(_PROVIDER.fullmatch(provider) for provider in providers):
                raise RequestError(f"listings: {gpu!r} or one of its providers is not accepted", field="listings")
            yield gpu, providers
    except (KeyError, TypeError):
        raise RequestError("listings: expected cards with gpu and providers", field="listings") from None


def _entry(number: int, row: Any) -> Iterable[Offer]:
    where = f"offers[{number}]"
    try:
        low, high = (float(price) for price in row["usd_per_card_hour"])
        counts = [int(count) for count in row["counts"]]
        texts = {name: str(row[name]) for name in ("gpu", "provider", "date", "source")} | {"note": str(row.get("note", ""))}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RequestError(
            f"{where}: expected gpu, provider, counts, usd_per_card_hour [low, high], date and source", field=where
        ) from None
    if not counts or not all(1 <= count <= MAX_COUNT for count in counts):
        raise RequestError(f"{where}.counts: {counts} is not accepted; expected 1 to {MAX_COUNT}", field=f"{where}.counts")
    for count in counts:
        yield check(Offer(count=count, usd_per_hour_min=low * count, usd_per_hour_max=high * count, **texts), where=where)
