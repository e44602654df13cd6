"""Offers: every bundled one can be believed, and what cannot be is refused by name."""

import json
from collections.abc import Mapping

import pytest

from estimator.errors import RequestError
from estimator.gpus import all_gpus
from estimator.offers import MAX_USD_PER_CARD_HOUR, OfferBook, bundled, cheapest, offers_of, parse, serialised

ENTRY = {"gpu": "t4", "provider": "aws", "counts": [1], "usd_per_card_hour": [0.5, 0.6], "date": "2026-03", "source": "a page"}


def book(**changes: object) -> str:
    return json.dumps({"schema_version": 1, "currency": "USD", "offers": [ENTRY | changes]})


def test_every_bundled_offer_names_a_known_card_a_date_and_a_source() -> None:
    known = {gpu.id for gpu in all_gpus()}
    for offer in bundled().offers:
        assert offer.gpu in known
        assert offer.date.startswith("20")
        assert offer.source
        assert 0 <= offer.usd_per_hour_min <= offer.usd_per_hour_max <= MAX_USD_PER_CARD_HOUR * offer.count


@pytest.mark.parametrize("provider", ["colab-free", "colab-pro", "kaggle", "runpod", "lambda", "aws", "azure", "gcp"])
def test_the_providers_of_the_guides_are_there(provider: str) -> None:
    assert any(provider in bundled().providers_of(gpu.id) for gpu in all_gpus())


def test_the_cheapest_offer_is_for_exactly_so_many_cards() -> None:
    offer = cheapest("a6000", 4)
    assert offer is not None
    assert (offer.provider, offer.count) == ("lambda", 4)
    assert offer.usd_per_hour_min == pytest.approx(4.36)  # gpu_4x_a6000 in skypilot-catalog v8
    assert cheapest("a6000", 3) is None
    assert cheapest("a6000", 1, providers=["lambda"]) == offers_of("a6000")[1]


def test_free_notebooks_count_only_when_asked_for() -> None:
    free, paid = cheapest("t4", include_free=True), cheapest("t4")
    assert free is not None
    assert paid is not None
    assert free.usd_per_hour_max == 0 < paid.usd_per_hour_min


def test_a_book_reads_back_as_it_was_written() -> None:
    again = parse(serialised(bundled().offers))
    assert {(o.gpu, o.provider, o.count, o.date, o.source, o.note) for o in again.offers} == {
        (o.gpu, o.provider, o.count, o.date, o.source, o.note) for o in bundled().offers
    }
    for offer in bundled().offers:
        assert any(o.usd_per_hour_min == pytest.approx(offer.usd_per_hour_min) for o in again.of(offer.gpu))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"gpu": "abacus"}, "gpu"),
        ({"provider": "A B"}, "provider"),
        ({"provider": "<script>"}, "provider"),
        ({"counts": [0]}, "counts"),
        ({"counts": [1000]}, "counts"),
        ({"counts": []}, "counts"),
        ({"usd_per_card_hour": [-1, 1]}, "usd_per_card_hour"),
        ({"usd_per_card_hour": [2, 1]}, "usd_per_card_hour"),
        ({"usd_per_card_hour": [1, 2950]}, "usd_per_card_hour"),
        ({"usd_per_card_hour": [float("nan"), 1]}, "usd_per_card_hour"),
        ({"usd_per_card_hour": 1}, "offers[0]"),
        ({"date": "yesterday"}, "date"),
        ({"date": "2026-13"}, "date"),
        ({"source": " "}, "source"),
    ],
)
def test_what_cannot_be_believed_is_refused_by_its_field(changes: Mapping[str, object], field: str) -> None:
    with pytest.raises(RequestError) as error:
        parse(book(**changes))
    assert field in error.value.errors[0].field


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema_version": 2, "offers": []}', '{"schema_version": 1, "currency": "USD", "offers": []}']
)
def test_what_is_no_book_is_refused(text: str) -> None:
    with pytest.raises(RequestError):
        parse(text)


def test_another_currency_is_refused() -> None:
    with pytest.raises(RequestError, match="EUR"):
        parse(book().replace("USD", "EUR", 1))


def test_an_empty_book_offers_nothing() -> None:
    assert OfferBook(offers=()).of("t4") == ()
    assert cheapest("t4", book=OfferBook(offers=())) is None
