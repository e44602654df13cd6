"""Cards and verdicts."""

import pytest

from app.card import HEADROOM_BYTES, Card, card_of
from app.request import HardwareFields
from estimator.correction import margin_without_interval
from estimator.errors import UnknownNameError
from estimator.units import GIB

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


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"hardware\.gpu"):
        card_of(HardwareFields(gpu="abacus"))
