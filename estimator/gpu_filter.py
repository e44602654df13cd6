"""Filters over cards in the grammar people know: `24GB..80GB`, `1..8`, `bf16`, `sm80`, `..$2`, `runpod`, `a100`."""

import re
from dataclasses import dataclass, field

from estimator.errors import RequestError
from estimator.gpus import Gpu, Vendor, all_gpus, find_gpus
from estimator.offers import MAX_COUNT, OfferBook, bundled

_NUMBER = r"\d+(?:\.\d+)?"
_MEMORY = re.compile(rf"(?:({_NUMBER})(?:GB|GIB)?)?(\.\.)?(?:({_NUMBER})(?:GB|GIB)?)?", re.IGNORECASE)
_COUNT = re.compile(r"(\d+)?(\.\.)?(\d+)?")
_PRICE = re.compile(rf"(?:\$?({_NUMBER}))?(\.\.)?(?:\$?({_NUMBER}))?")
_CAPABILITY = re.compile(r"(?:sm_?|cc)?(\d{1,2})\.?(\d)(\+|\.\.)?", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\s,:]+")
_SYNTAX = (
    "expected memory (24GB, 24GB..80GB, 40GB..), a number of cards (1..8), bf16, fp8, a compute capability (sm80), a price (..$2), "
    "nvidia or amd, a provider or a card"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Inclusive bounds; None is open."""

    low: float | None = None
    high: float | None = None

    def __contains__(self, number: float) -> bool:
        return (self.low is None or number >= self.low) and (self.high is None or number <= self.high)


_ANY = Range()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFilter:
    """What a card, and a number of it in one machine, must meet."""

    memory_gb: Range = _ANY
    """Of one card, as its label says [GB]."""
    count: Range = _ANY
    usd_per_hour: Range = _ANY
    """Of all cards together; a card without an offer does not pass a bound [USD/h]."""
    bf16: bool = False
    """Whether native bfloat16 is asked for."""
    fp8: bool = False
    min_compute_capability: tuple[int, int] | None = None
    vendor: Vendor | None = None
    providers: frozenset[str] = frozenset()
    """At least one of these must offer it."""
    gpus: frozenset[str] = frozenset()
    """Ids; any card if empty."""
    book: OfferBook = field(default_factory=bundled, repr=False, compare=False)

    @classmethod
    def parse(cls, text: str, *, field: str = "filter", book: OfferBook | None = None) -> "GpuFilter":
        """A filter from words that blanks, commas or colons part.

        Args:
            text: such as `24GB..80GB 1..8 bf16 runpod`; all words must hold, of several cards or providers one.
            field: what error messages call it.
            book: offers to look at; the bundled ones if None.

        Raises:
            RequestError: if a word is not known, or a range is empty or given twice.
        """
        book = book or bundled()
        values: dict[str, object] = {"book": book}
        providers: set[str] = set()
        gpus: set[str] = set()
        for word in split_words(text):
            name, value = _word(word, field, book)
            if name == "providers":
                providers.add(str(value))
            elif name == "gpus":
                assert isinstance(value, frozenset)
                gpus |= value
            elif name in values:
                raise RequestError(f"{field}: {word!r} says again what was said before", field=field)
            else:
                values[name] = value
        return cls(**values, providers=frozenset(providers), gpus=frozenset(gpus))  # type: ignore[arg-type]

    @classmethod
    def of(
        cls,
        *,
        text: str = "",
        memory: str | None = None,
        count: str | None = None,
        price: str | None = None,
        bf16: bool = False,
        fp8: bool = False,
        min_compute_capability: str | None = None,
        provider: str | None = None,
        vendor: str | None = None,
        book: OfferBook | None = None,
    ) -> "GpuFilter":
        """A filter from named parts, each in the same grammar: what HTTP's query carries.

        Raises:
            RequestError: naming the part that cannot be read.
        """
        book = book or bundled()
        from_text = cls.parse(text, book=book)
        providers = from_text.providers | {_provider(name, "provider", book) for name in _SEPARATORS.split(provider or "") if name}
        return cls(
            memory_gb=from_text.memory_gb if memory is None else _memory(memory, "memory"),
            count=from_text.count if count is None else _count(count, "count"),
            usd_per_hour=from_text.usd_per_hour if price is None else _price(price, "price"),
            bf16=bf16 or from_text.bf16,
            fp8=fp8 or from_text.fp8,
            min_compute_capability=(
                from_text.min_compute_capability
                if min_compute_capability is None
                else _capability(min_compute_capability, "min_compute_capability")
            ),
            vendor=from_text.vendor if vendor is None else _vendor(vendor),
            providers=providers,
            gpus=from_text.gpus,
            book=book,
        )

    def accepts(self, gpu: Gpu, count: int = 1) -> bool:
        """Whether so many of this card in one machine pass."""
        return self.accepts_card(gpu) and count in self.count and self._is_offered(gpu, count)

    def accepts_card(self, gpu: Gpu) -> bool:
        """Whether the card itself passes, whatever their number and price."""
        return (
            gpu.label_gb in self.memory_gb
            and (gpu.bf16 or not self.bf16)
            and (gpu.fp8 or not self.fp8)
            and (self.min_compute_capability is None or gpu.compute_capability >= self.min_compute_capability)
            and (self.vendor is None or gpu.vendor is self.vendor)
            and (not self.gpus or gpu.id in self.gpus)
            and (not self.providers or not self.providers.isdisjoint(self.book.providers_of(gpu.id)))
        )

    def counts(self, usual: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[int, ...]:
        """Which of the usual numbers of cards pass, or the one that is asked for."""
        if self.count.low is not None and self.count.low == self.count.high:
            return (int(self.count.low),)
        return tuple(count for count in usual if count in self.count)

    def _is_offered(self, gpu: Gpu, count: int) -> bool:
        if self.usd_per_hour == _ANY and not self.providers:
            return True
        known = [o for o in self.book.of(gpu.id) if not self.providers or o.provider in self.providers]
        if not known and self.usd_per_hour == _ANY:  # listed without a price: nothing is known of machines
            return True
        return any(o.count == count and o.usd_per_hour_min in self.usd_per_hour for o in known)


def split_words(text: str) -> list[str]:
    """The words of a filter."""
    return list(filter(None, _SEPARATORS.split(text.strip())))


def _word(word: str, field: str, book: OfferBook) -> tuple[str, object]:
    lower = word.lower()
    if lower in ("bf16", "bfloat16"):
        return "bf16", True
    if lower in ("fp8", "float8"):
        return "fp8", True
    if lower in list(Vendor):
        return "vendor", Vendor(lower)
    if "$" in word:
        return "usd_per_hour", _price(word, field)
    if lower.startswith(("sm", "cc")) and _CAPABILITY.fullmatch(lower):
        return "min_compute_capability", _capability(word, field)
    if re.search(r"\d(GB|GIB)\b", word, re.IGNORECASE):
        return "memory_gb", _memory(word, field)
    if word.strip(".") and _COUNT.fullmatch(word):
        return "count", _count(word, field)
    if lower in book.providers:
        return "providers", lower
    gpus = find_gpus(word)
    if gpus:
        return "gpus", frozenset(gpu.id for gpu in gpus)
    raise RequestError(f"{field}: {word!r} is not known; {_SYNTAX}; providers: {', '.join(book.providers)}", field=field)


def _range(pattern: re.Pattern[str], text: str, field: str, expected: str) -> Range:
    match = pattern.fullmatch(text.strip())
    low, dots, high = match.groups() if match else (None, None, None)
    if match is None or (low is None and high is None) or (low is not None and high is not None and not dots):
        raise RequestError(f"{field}: {text!r} is not accepted; expected {expected}", field=field)
    if not dots:
        exact = float(low or high or 0)
        return Range(low=exact, high=exact)
    found = Range(low=None if low is None else float(low), high=None if high is None else float(high))
    if found.low is not None and found.high is not None and found.low > found.high:
        raise RequestError(f"{field}: {text!r} is empty: its lower end is above its upper end", field=field)
    return found


def _memory(text: str, field: str) -> Range:
    return _range(_MEMORY, text, field, "24GB, 24GB..80GB, ..24GB or 40GB..")


def _count(text: str, field: str) -> Range:
    found = _range(_COUNT, text, field, f"4, 1..8, ..4 or 2.. (at most {MAX_COUNT})")
    if any(end is not None and not 1 <= end <= MAX_COUNT for end in (found.low, found.high)):
        raise RequestError(f"{field}: {text!r} is out of bounds; expected 1 to {MAX_COUNT} cards", field=field)
    return found


def _price(text: str, field: str) -> Range:
    return _range(_PRICE, text, field, "..$2 or $0.5..$2")


def _capability(text: str, field: str) -> tuple[int, int]:
    match = _CAPABILITY.fullmatch(text.strip())
    if match is None:
        raise RequestError(f"{field}: {text!r} is no compute capability; expected 8.0, 8.9, sm80", field=field)
    return int(match[1]), int(match[2])


def _provider(name: str, field: str, book: OfferBook) -> str:
    if name.lower() not in book.providers:
        raise RequestError(f"{field}: {name!r} is not known; accepted: {', '.join(book.providers)}", field=field)
    return name.lower()


def _vendor(name: str) -> Vendor:
    if name.lower() not in list(Vendor):
        raise RequestError(f"vendor: {name!r} is not known; accepted: {', '.join(Vendor)}", field="vendor")
    return Vendor(name.lower())


def matching(wanted: GpuFilter) -> tuple[Gpu, ...]:
    """The cards of the catalogue of which some number passes."""
    return tuple(gpu for gpu in all_gpus() if wanted.accepts_card(gpu) and any(wanted.accepts(gpu, count) for count in wanted.counts()))
