"""The book of offers in use: the one that comes with the package, or a newer one that somebody fetched on this machine.

Fetching is a command (`vramplan gpus --refresh-prices`, `python -m app.prices`) and never part of a request. What comes from outside is
checked offer by offer; whatever cannot be believed leaves the last known good offers as they are.
"""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from platformdirs import user_data_path

from estimator.errors import RequestError, SourceUnavailableError, VramplanError
from estimator.gpus import Gpu, find_gpus
from estimator.offers import Offer, OfferBook, bundled, check, parse, serialised

VARIABLE = "VRAMPLAN_PRICES"
MAX_FILE_BYTES = 4 * 2**20
MIN_OFFERS = 10
"""Fewer than this from all providers together mean that something went wrong on the way."""

_TIMEOUT_SECONDS = 60.0

# gpuhunt's memory is the vendor's label, but for cards of which providers name another.
_SAME_LABEL = 0.08
_PROVIDERS = {"lambdalabs": "lambda", "vastai": "vast"}
# Names that mean one card to gpuhunt and could mean another to people. Source: gpuhunt, KNOWN_NVIDIA_GPUS (compute capability 7.5).
_NAMES = {"RTX6000": "quadro-rtx6000"}
# What gpuhunt says of form factors stands in the name of the machine; clouds mean SXM where they do not say.
_FORM_FACTORS = {"h100-pcie": ("pcie",), "h100-nvl": ("nvl",), "h200-nvl": ("nvl",)}


class CatalogItem(Protocol):
    """What is read of gpuhunt's `CatalogItem`."""

    @property
    def provider(self) -> str: ...
    @property
    def instance_name(self) -> str: ...
    @property
    def price(self) -> float: ...
    @property
    def gpu_count(self) -> int: ...
    @property
    def gpu_name(self) -> str | None: ...
    @property
    def gpu_memory(self) -> float | None: ...
    @property
    def spot(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a catalogue gave, before anything of it is believed."""

    items: tuple[CatalogItem, ...]
    source: str
    failed: tuple[str, ...] = ()
    """Providers whose list could not be had, or holds no cards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshed:
    """What a refresh did."""

    path: Path
    date: str
    source: str
    num_offers: int
    """New ones."""
    num_kept: int
    """Those of before, of providers of which nothing new is known."""
    providers: tuple[str, ...]
    refused: Mapping[str, str]
    """Providers whose offers were not believed, and why."""
    unknown: Mapping[str, int]
    """Cards that the catalogue does not have, with how many offers."""


def state_path() -> Path:
    """Where fetched offers lie: `VRAMPLAN_PRICES`, or the user's data folder (`XDG_DATA_HOME`)."""
    stated = os.environ.get(VARIABLE)
    return Path(stated) if stated else user_data_path("vramplan", appauthor=False) / "offers.json"


def current() -> OfferBook:
    """The offers in use: fetched ones where there are some that can be read, else the bundled ones. No network is asked."""
    path = state_path()
    try:
        found = path.stat()
    except OSError:
        return bundled()
    return _read(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _read(path: Path, _: int, size: int) -> OfferBook:
    try:
        if size > MAX_FILE_BYTES:
            return bundled()
        book = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, VramplanError):  # somebody else's file, or half of one: what came with the package is good
        return bundled()
    return replace(book, listings=bundled().listings)


def refresh(
    out: Path | None = None, *, fetch: Callable[[], Fetched] | None = None, today: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> Refreshed:
    """Fetch offers, check them, and put them in the place of those of before, which stay for providers that gave nothing.

    Args:
        out: the file to write; `state_path()` if None.
        fetch: where offers come from; gpuhunt's catalogue if None.
        today: the date that is written beside each offer.

    Raises:
        SourceUnavailableError: if the catalogue cannot be had; the file is left as it is.
        RequestError: if nothing of it can be believed, or the file cannot be written; it is left as it is.
    """
    path = out or state_path()
    before = _last_good(path)
    fetched = (fetch or from_gpuhunt)()
    date = today().date().isoformat()
    unknown: dict[str, int] = {}
    found: dict[str, list[Offer]] = {}
    refused = {_provider(name): "gave no offers" for name in fetched.failed}
    for provider, items in _by_provider(fetched.items).items():
        try:
            found[provider] = list(_offers(provider, items, unknown, date=date, source=fetched.source))
        except RequestError as error:
            refused[provider] = error.message
    fresh = [offer for offers in found.values() for offer in offers]
    if len(fresh) < MIN_OFFERS:
        reasons = "".join(f"; {provider}: {why}" for provider, why in refused.items())
        raise RequestError(f"prices: only {len(fresh)} offers of known cards were found{reasons}; those of before are kept", field="prices")
    renewed = {provider for provider, offers in found.items() if offers}
    kept = [offer for offer in before.offers if offer.provider not in renewed]
    text = serialised([*fresh, *kept])
    parse(text)
    _write(path, text)
    return Refreshed(
        path=path,
        date=date,
        source=fetched.source,
        num_offers=len(fresh),
        num_kept=len(kept),
        providers=tuple(sorted(renewed)),
        refused=refused,
        unknown=unknown,
    )


def from_gpuhunt() -> Fetched:
    """On-demand offers of the providers whose lists gpuhunt publishes.

    Raises:
        SourceUnavailableError: if gpuhunt is not installed, or not one list could be had.

    Source: gpuhunt 0.1.34, Catalog.load and Catalog.query.
    """
    try:
        from gpuhunt import Catalog, GPUHuntError
        from gpuhunt._internal.catalog import OFFLINE_PROVIDERS
        from gpuhunt.version import __version__
    except ImportError:
        raise SourceUnavailableError("prices: gpuhunt is not installed; pip install 'vramplan[prices]'") from None
    logging.getLogger("gpuhunt").setLevel(logging.CRITICAL)  # its tracebacks say no more than the report does
    catalog = Catalog(balance_resources=False, auto_reload=False)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)  # gpuhunt sets none
    try:
        if "GPUHUNT_CATALOG_DIR" not in os.environ:  # a folder of lists, which gpuhunt reads in place of its bucket
            catalog.load()
    except (GPUHuntError, OSError) as error:
        raise SourceUnavailableError(f"prices: gpuhunt's catalogue cannot be had ({error}); those of before are kept") from None
    finally:
        socket.setdefaulttimeout(before)
    items: list[CatalogItem] = []
    failed: list[str] = []
    for provider in OFFLINE_PROVIDERS:
        try:
            found = catalog.query(provider=provider, min_gpu_count=1, spot=False)
        except Exception:  # one provider's list in a form that this gpuhunt cannot read; the others are as good as before
            failed.append(provider)
            continue
        items += found
        if not found:
            failed.append(provider)
    return Fetched(items=tuple(items), source=f"gpuhunt {__version__}", failed=tuple(failed))


def _last_good(path: Path) -> OfferBook:
    try:
        return parse(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_FILE_BYTES else bundled()
    except (OSError, UnicodeDecodeError, VramplanError):
        return bundled()


def _by_provider(items: Iterable[CatalogItem]) -> dict[str, list[CatalogItem]]:
    found: dict[str, list[CatalogItem]] = {}
    for item in items:
        if not item.spot and item.gpu_count and item.gpu_name:
            found.setdefault(_provider(item.provider), []).append(item)
    return found


def _provider(name: str) -> str:
    return _PROVIDERS.get(name.lower(), name.lower())


def _offers(provider: str, items: Iterable[CatalogItem], unknown: dict[str, int], *, date: str, source: str) -> Iterable[Offer]:
    """One offer for each card and number of cards: the range over regions and machines.

    Raises:
        RequestError: if a price is out of bounds.
    """
    prices: dict[tuple[str, int], list[float]] = {}
    for item in items:
        gpu = _gpu_of(item)
        if gpu is None:
            name = f"{item.gpu_name} {item.gpu_memory:g} GB" if item.gpu_memory else str(item.gpu_name)
            unknown[name] = unknown.get(name, 0) + 1
            continue
        if not item.price > 0:
            raise RequestError(f"{provider}: {item.price!r} USD/h for {item.instance_name} is no price", field="prices")
        prices.setdefault((gpu.id, item.gpu_count), []).append(float(item.price))
    for (gpu_id, count), seen in prices.items():
        offer = Offer(
            gpu=gpu_id,
            provider=provider,
            count=count,
            usd_per_hour_min=min(seen),
            usd_per_hour_max=max(seen),
            date=date,
            source=source,
        )
        yield check(offer, where=f"{provider}.{gpu_id}")


def _gpu_of(item: CatalogItem) -> Gpu | None:
    """The catalogue's card of gpuhunt's name, label and, where these leave a choice, form factor in the machine's name."""
    candidates = [
        gpu
        for gpu in find_gpus(_NAMES.get(item.gpu_name or "", item.gpu_name or ""))
        if not gpu.is_modified and (item.gpu_memory is None or abs(gpu.label_gb - item.gpu_memory) <= _SAME_LABEL * gpu.label_gb)
    ]
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    machine = item.instance_name.lower()
    marked = [gpu for gpu in candidates if any(word in machine for word in _FORM_FACTORS.get(gpu.id, ()))]
    plain = [gpu for gpu in candidates if gpu.id not in _FORM_FACTORS]
    chosen = marked or plain
    return chosen[0] if len(chosen) == 1 else None


def _write(path: Path, text: str) -> None:
    """All or nothing: a reader sees the file of before or the new one."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise RequestError(f"prices: {path} cannot be written: {error.strerror}; what was there is kept", field="prices") from None


def report(done: Refreshed) -> str:
    """What a refresh did, for people."""
    kept = f"{done.num_kept} kept from before"
    lines = [f"{done.num_offers} offers of {', '.join(done.providers)} ({done.source}, {done.date}), {kept}: {done.path}"]
    lines += [f"not taken over from {provider}: {why}" for provider, why in sorted(done.refused.items())]
    if done.unknown:
        lines.append("not in the catalogue: " + ", ".join(f"{name} ({number})" for name, number in sorted(done.unknown.items())))
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        print(report(refresh(Path(sys.argv[1]) if len(sys.argv) > 1 else None)))
    except VramplanError as problem:
        print(f"error: {problem.message}", file=sys.stderr)
        sys.exit(1)


def price_json(offer: Offer | None) -> dict[str, Any]:
    """A row's price and where it was seen; nulls where none is known."""
    if offer is None:
        return {"usd_per_hour": None, "offer": None}
    return {
        "usd_per_hour": [offer.usd_per_hour_min, offer.usd_per_hour_max],
        "offer": {"provider": offer.provider, "date": offer.date, "source": offer.source},
    }
