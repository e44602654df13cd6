"""Cards and verdicts."""

import pytest

from app.card import HEADROOM_BYTES, Card, card_of, headroom_bytes, pasted_cards
from app.request import HardwareFields
from estimator.correction import margin_without_interval
from estimator.errors import RequestError, UnknownNameError
from estimator.units import GIB, MIB

MARGIN = margin_without_interval().share
CARD = Card(id="x", name="x", capacity_bytes=10 * GIB + HEADROOM_BYTES)


@pytest.mark.parametrize(
    ("device_gib", "high_gib", "verdict"),
    [
        (5.0, 9.9, "fits"),
        (5.0, 10.0, "fits"),
        (5.0, 10.1, "tight"),
        (10.0, 12.0, "tight"),
        (10.1, 12.0, "does_not_fit"),
        (10.0 / (1.001 + MARGIN), None, "fits"),
        (10.0 / (0.999 + MARGIN), None, "tight"),
    ],
)
def test_the_verdict_compares_the_upper_bound_with_what_is_usable(device_gib: float, high_gib: float | None, verdict: str) -> None:
    high = None if high_gib is None else round(high_gib * GIB)
    assert CARD.verdict(round(device_gib * GIB), high) == verdict


def test_a_card_may_be_given_by_its_capacity() -> None:
    card = card_of(HardwareFields(capacity_gib=23.6))
    assert card is not None
    assert card.capacity_bytes == round(23.6 * GIB)
    assert card.compute_capability is None


def test_a_card_may_be_given_by_an_alias() -> None:
    card = card_of(HardwareFields(gpu="NVIDIA GeForce RTX 4090"))
    assert card is not None
    assert card.id == "rtx4090"


@pytest.mark.parametrize("gpu", ["", "  "])
def test_no_name_is_no_card_and_says_what_would_be(gpu: str) -> None:
    with pytest.raises(RequestError, match=r"hardware\.gpu: '\s*' is not accepted; expected a card such as rtx4090"):
        card_of(HardwareFields(gpu=gpu))


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"hardware\.gpu"):
        card_of(HardwareFields(gpu="abacus"))


PASTE = "name, memory.total [MiB], memory.free [MiB]\nNVIDIA GeForce RTX 4090, 24564 MiB, 20000 MiB\nNVIDIA L4, 23034 MiB, 22600 MiB\n"


def test_what_others_hold_is_missing_from_what_can_be_used() -> None:
    busy, free = pasted_cards(PASTE)
    assert busy.occupied_bytes == busy.capacity_bytes - 20_000 * MIB
    assert busy.usable_bytes == 20_000 * MIB - HEADROOM_BYTES
    assert free.occupied_bytes == 0


def test_of_several_pasted_cards_the_emptiest_is_answered_for() -> None:
    card = card_of(HardwareFields(nvidia_smi=PASTE))
    assert card is not None
    assert (card.id, card.beside) == ("l4", ("GeForce RTX 4090",))


def test_a_variant_has_its_own_capacity_and_no_id() -> None:
    (card,) = pasted_cards("NVIDIA A40, 49140 MiB, 48600 MiB")
    assert card.id is None
    assert card.capacity_bytes > 48_000 * MIB
    assert card.compute_capability == (8, 6)


def test_a_size_in_gib_stands_for_a_card() -> None:
    card = card_of(HardwareFields(gpu="23.5 GiB"))
    assert card is not None
    assert (card.id, card.capacity_bytes) == (None, round(23.5 * GIB))


@pytest.mark.parametrize("size", ["24GB", "24 GB", "80g", "0GiB", "999999GiB", "24000MiB"])
def test_a_label_is_no_size(size: str) -> None:
    with pytest.raises(RequestError, match=r"hardware\.gpu"):
        card_of(HardwareFields(gpu=size))


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (None, HEADROOM_BYTES),
        (0, 0),
        (10**9, 10**9),
        ("1000", 1000),
        ("512MiB", 512 * 2**20),
        ("1 GiB", 2**30),
        ("1.5GB", 1_500_000_000),
        ("5%", 10**9),
    ],
)
def test_headroom_is_bytes_a_size_or_a_share(asked: int | str | None, kept: int) -> None:
    assert headroom_bytes(asked, 20 * 10**9) == kept


@pytest.mark.parametrize("asked", ["", "-1", "lots", "5 %%", "1TB", "100%", "1e9", str(20 * 10**9)])
def test_headroom_that_is_none_of_these_or_leaves_nothing_is_refused(asked: str) -> None:
    with pytest.raises(RequestError, match=r"hardware\.headroom"):
        headroom_bytes(asked, 20 * 10**9)


def test_headroom_is_what_the_verdict_keeps_free() -> None:
    hardware = HardwareFields(gpu="rtx4090", headroom="10%")
    card = card_of(hardware)
    assert card is not None
    assert card.usable_bytes == card.capacity_bytes - round(card.capacity_bytes / 10)


def test_of_several_ranks_the_card_with_the_least_free_memory_decides() -> None:
    busy, free = pasted_cards(PASTE)
    poorest = min((busy, free), key=lambda card: card.usable_bytes)
    card = card_of(HardwareFields(nvidia_smi=PASTE, num_gpus=2, strategy="ddp"))
    assert card is not None
    assert card.usable_bytes == poorest.usable_bytes


def test_more_ranks_than_pasted_cards_are_refused() -> None:
    with pytest.raises(RequestError, match=r"hardware\.num_gpus: 3 of 2 pasted cards; accepted: 1 to 2"):
        card_of(HardwareFields(nvidia_smi=PASTE, num_gpus=3, strategy="ddp"))
