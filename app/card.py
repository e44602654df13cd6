"""The card of a request: what it can hold, and what fits."""

import re
from dataclasses import dataclass, replace

from app.request import MAX_GIB, HardwareFields
from estimator.correction import required_bytes
from estimator.errors import RequestError
from estimator.gpus import Gpu, Vendor, find_gpu
from estimator.nvidia_smi import FoundCard, identify, read_cards, usage_sentence
from estimator.units import GIB, KIB, MIB

# `23.5GiB` in place of a name; what labels say in GB is looked for in the catalogue.
_SIZE = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s?(GiB|MiB|MB)", re.IGNORECASE)

# Kept free on purpose: what a driver update or a desktop may take from a card that was sized to the last byte.
HEADROOM_BYTES = 256 * MIB
# Spellings of `hardware.headroom` beside a number of bytes.
_HEADROOM = re.compile(r"(\d+(?:\.\d+)?)\s*(%|KiB|MiB|GiB|KB|MB|GB|B)?", re.IGNORECASE)
_UNITS = {"b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One GPU as far as the verdict needs it."""

    id: str | None
    """None when only a capacity was given."""
    name: str
    capacity_bytes: int
    """What CUDA reports as total [bytes]."""
    compute_capability: tuple[int, int] | None = None
    num_multiprocessors: int | None = None
    headroom_bytes: int = HEADROOM_BYTES
    occupied_bytes: int = 0
    """What other processes hold of the capacity [bytes]."""
    occupants: str = ""
    """Who they are, in a sentence."""
    beside: tuple[str, ...] = ()
    """Names of the machine's other cards."""
    is_variant: bool = False
    """Whether the capacity is not the catalogue's for a card of this name."""
    vendor: Vendor = Vendor.NVIDIA

    @property
    def usable_bytes(self) -> int:
        """Capacity less headroom and what others hold [bytes]."""
        return self.capacity_bytes - self.headroom_bytes - self.occupied_bytes

    def required_bytes(self, device_bytes: int, device_high_bytes: int | None = None) -> int:
        """What must be usable for a verdict of `fits`: the interval's upper end, or the estimate and a margin [bytes]."""
        return required_bytes(device_bytes, device_high_bytes)

    def verdict(self, device_bytes: int, device_high_bytes: int | None = None) -> str:
        """`fits`, `tight` or `does_not_fit`.

        Args:
            device_bytes: estimate of what the card must hold at the peak [bytes].
            device_high_bytes: upper end of its interval [bytes]; None when there is no interval.
        """
        if device_bytes > self.usable_bytes:
            return "does_not_fit"
        return "fits" if self.required_bytes(device_bytes, device_high_bytes) <= self.usable_bytes else "tight"


def card_of(hardware: HardwareFields | None) -> Card | None:
    """The card that a request names.

    Raises:
        UnknownNameError: if there is no such GPU in the catalogue.
    """
    if hardware is not None and hardware.nvidia_smi is not None:
        card = limiting(pasted_cards(hardware.nvidia_smi), hardware.num_gpus)
        return replace(card, headroom_bytes=headroom_bytes(hardware.headroom, card.capacity_bytes))
    if hardware is None or (hardware.gpu is None and hardware.capacity_gib is None):
        return None
    if hardware.capacity_gib is not None:
        return _card_of_size(hardware.capacity_gib, hardware.headroom)
    assert hardware.gpu is not None
    if not hardware.gpu.strip():
        raise RequestError(
            f"hardware.gpu: {hardware.gpu!r} is not accepted; expected a card such as rtx4090, 'a100 40gb' or 23.5GiB (`vramplan gpus` "
            "lists those known), or null",
            field="hardware.gpu",
        )
    size = _SIZE.fullmatch(hardware.gpu.strip())
    if size is not None:
        return _card_of_size(_gib_of(float(size[1]), size[2].lower(), hardware.gpu), hardware.headroom)
    return card_for(find_gpu(hardware.gpu), hardware.headroom)


def _gib_of(number: float, unit: str, said: str) -> float:
    """So many GiB, as CUDA reports them."""
    if unit != "gib" or not 0 < number <= MAX_GIB:
        raise RequestError(
            f"hardware.gpu: {said!r} is not accepted; expected a card such as rtx4090, 'a100 40gb' or 24GB, or what "
            f"torch.cuda.get_device_properties(0).total_memory says in GiB, such as 23.5GiB (at most {MAX_GIB:,})",
            field="hardware.gpu",
        )
    return number


def _card_of_size(number: float, headroom: int | str | None) -> Card:
    capacity = round(number * GIB)
    return Card(id=None, name=f"a card of {number:g} GiB", capacity_bytes=capacity, headroom_bytes=headroom_bytes(headroom, capacity))


def card_for(gpu: Gpu, headroom: int | str | None = None) -> Card:
    """A card of the catalogue with what is to be kept free on it."""
    return Card(
        id=gpu.id,
        name=gpu.name,
        capacity_bytes=gpu.capacity_bytes,
        compute_capability=gpu.compute_capability,
        num_multiprocessors=gpu.num_sms,
        headroom_bytes=headroom_bytes(headroom, gpu.capacity_bytes),
        vendor=gpu.vendor,
    )


def headroom_bytes(asked: int | str | None, capacity_bytes: int) -> int:
    """What is kept free on purpose [bytes].

    Args:
        asked: bytes, a size with a unit (`512MiB`, `1 GiB`), or a share of the capacity (`5%`).
        capacity_bytes: of the card [bytes].

    Raises:
        RequestError: if it is neither, or more than the card has.
    """
    if asked is None:
        return HEADROOM_BYTES
    match = _HEADROOM.fullmatch(str(asked).strip())
    if match is None:
        raise RequestError(
            f"hardware.headroom: {asked!r} is not accepted; expected bytes, a size such as 512MiB, or a share such as 5%",
            field="hardware.headroom",
        )
    number, unit = float(match[1]), (match[2] or "B").lower()
    kept = round(capacity_bytes * number / 100) if unit == "%" else round(number * _UNITS[unit])
    if kept >= capacity_bytes:
        raise RequestError(
            f"hardware.headroom: {asked!r} leaves nothing of the card's {capacity_bytes:,} bytes; expected less", field="hardware.headroom"
        )
    return kept


def pasted_cards(text: str) -> tuple[Card, ...]:
    """The cards of a machine, from the output of its nvidia-smi.

    Raises:
        RequestError: if it cannot be read, or a card is not in the catalogue.
    """
    return tuple(_pasted(identify(card)) for card in read_cards(text))


def _pasted(found: FoundCard) -> Card:
    return replace(
        card_for(found.gpu),
        id=None if found.is_variant else found.gpu.id,
        capacity_bytes=found.capacity_bytes,
        occupied_bytes=found.occupied_bytes,
        occupants=usage_sentence(found),
        is_variant=found.is_variant,
    )


def limiting(cards: tuple[Card, ...], number: int = 1) -> Card:
    """Of the cards with the most memory that nobody uses, as many as are asked for, the one with the least: every rank must fit on its own.

    Raises:
        RequestError: if there are fewer.
    """
    if number > len(cards):
        raise RequestError(
            f"hardware.num_gpus: {number} of {len(cards)} pasted cards; accepted: 1 to {len(cards)}", field="hardware.num_gpus"
        )
    order = sorted(range(len(cards)), key=lambda index: (-cards[index].usable_bytes, index))
    chosen = order[number - 1]
    return replace(cards[chosen], beside=tuple(card.name for index, card in enumerate(cards) if index != chosen))
