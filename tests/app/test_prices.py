"""Offers are fetched on demand, checked, and replace those of before only where they can be believed."""

import csv
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app import prices
from app.prices import Fetched, current, refresh, state_path
from estimator.errors import RequestError, SourceUnavailableError
from estimator.offers import bundled, parse

# Lists in gpuhunt's own format, written by its storage.dump.
LISTS = Path(__file__).parent / "gpuhunt"


def today() -> datetime:
    return datetime(2026, 11, 25, tzinfo=UTC)


def items(*providers: str) -> tuple[Any, ...]:
    """The lists as objects with the fields of gpuhunt's CatalogItem."""
    found = []
    for provider in providers:
        with (LISTS / f"{provider}.csv").open(encoding="utf-8") as file:
            found += [
                SimpleNamespace(
                    provider=provider,
                    instance_name=row["instance_name"],
                    price=float(row["price"]),
                    gpu_count=int(row["gpu_count"]),
                    gpu_name=row["gpu_name"] or None,
                    gpu_memory=float(row["gpu_memory"]) if row["gpu_memory"] else None,
                    spot=row["spot"] == "True",
                )
                for row in csv.DictReader(file)
            ]
    return tuple(found)


def fetching(*providers: str) -> Callable[[], Fetched]:
    return lambda: Fetched(items=items(*providers), source="gpuhunt, recorded")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state" / "offers.json"
    monkeypatch.setenv(prices.VARIABLE, str(path))
    return path


def test_fetched_offers_are_in_use_from_then_on(path: Path) -> None:
    assert current() is bundled()
    done = refresh(fetch=fetching("runpod", "lambdalabs", "aws"), today=today)
    assert (done.path, done.date, done.providers) == (path, "2026-11-25", ("aws", "lambda", "runpod"))
    (offer,) = [o for o in current().of("rtx4090") if o.provider == "runpod" and o.count == 1]
    assert (offer.usd_per_hour_min, offer.usd_per_hour_max, offer.date) == (0.69, 0.74, "2026-11-25")
    assert offer.source == "gpuhunt, recorded"
    assert current().providers_of("h200-sxm") >= {"gcp"}


def test_interruptible_machines_and_machines_without_cards_are_left_out(path: Path) -> None:
    refresh(fetch=fetching("runpod", "lambdalabs"), today=today)
    assert min(o.usd_per_hour_min for o in current().of("rtx4090") if o.provider == "runpod") == 0.69


@pytest.mark.parametrize(
    ("gpu", "price"), [("h100-pcie", 2.39), ("h100-sxm", 2.99), ("h100-nvl", 2.79), ("a100-80", 1.74), ("mi300x", 2.49)]
)
def test_cards_of_one_name_are_told_apart_by_label_and_machine(path: Path, gpu: str, price: float) -> None:
    refresh(fetch=fetching("runpod", "lambdalabs"), today=today)
    assert [o.usd_per_hour_min for o in current().of(gpu) if o.provider == "runpod" and o.count == 1] == [price]


def test_a_name_with_two_meanings_is_read_as_gpuhunt_means_it(path: Path) -> None:
    refresh(fetch=fetching("runpod", "lambdalabs"), today=today)
    assert [o.usd_per_hour_min for o in current().of("quadro-rtx6000")] == [0.58]


def test_a_card_that_is_not_in_the_catalogue_is_reported(path: Path) -> None:
    done = refresh(fetch=fetching("runpod", "lambdalabs"), today=today)
    assert done.unknown == {"RTX2060 12 GB": 1}


def test_a_provider_with_a_price_out_of_bounds_keeps_its_offers_of_before(path: Path) -> None:
    before = [o for o in bundled().of("h100-sxm") if o.provider == "nebius"]
    done = refresh(fetch=fetching("runpod", "aws", "nebius"), today=today)
    assert "2950" in done.refused["nebius"]
    assert [o for o in current().of("h100-sxm") if o.provider == "nebius"] == before


def test_providers_without_news_keep_their_offers_and_dates(path: Path) -> None:
    refresh(fetch=fetching("runpod", "aws"), today=today)
    assert {o.date for o in current().of("a100-80") if o.provider == "vast"} == {"2026-11"}


def test_too_few_offers_leave_the_file_as_it_is(path: Path) -> None:
    refresh(fetch=fetching("runpod", "lambdalabs", "aws"), today=today)
    content = path.read_bytes()
    with pytest.raises(RequestError, match="only 4 offers"):
        refresh(fetch=fetching("aws"), today=today)
    assert path.read_bytes() == content


def test_a_catalogue_that_cannot_be_had_leaves_the_file_as_it_is(path: Path) -> None:
    refresh(fetch=fetching("runpod", "lambdalabs", "aws"), today=today)
    content = path.read_bytes()

    def down() -> Fetched:
        raise SourceUnavailableError("prices: down")

    with pytest.raises(SourceUnavailableError):
        refresh(fetch=down, today=today)
    assert path.read_bytes() == content


def test_a_file_that_cannot_be_replaced_is_kept_and_nothing_is_left_beside_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refresh(fetch=fetching("runpod", "lambdalabs", "aws"), today=today)
    content = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prices.os, "fsync", full)
    with pytest.raises(RequestError, match="No space left"):
        refresh(fetch=fetching("runpod", "lambdalabs"), today=today)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 1, "currency": "EUR", "offers": []}', "\x00"])
def test_a_spoilt_file_leaves_the_bundled_offers_in_use(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    assert current() is bundled()


def test_the_file_reads_back_as_it_was_written(path: Path) -> None:
    refresh(fetch=fetching("runpod", "lambdalabs", "aws"), today=today)
    assert json.loads(path.read_text())["currency"] == "USD"
    assert parse(path.read_text()).of("a10g") == current().of("a10g")


def test_the_path_is_stated_or_in_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(prices.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert state_path() == Path("/data/vramplan/offers.json")


def test_without_gpuhunt_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gpuhunt", None)
    with pytest.raises(SourceUnavailableError, match=r"vramplan\[prices\]"):
        prices.from_gpuhunt()


# gpuhunt 0.1.34 leaves the files of GPUHUNT_CATALOG_DIR open
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_gpuhunt_reads_the_same_offers_from_its_own_format(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gpuhunt")
    monkeypatch.setenv("GPUHUNT_CATALOG_DIR", str(LISTS))
    done = refresh(today=today)
    assert done.providers == ("aws", "lambda", "runpod")
    assert done.source.startswith("gpuhunt ")
    real = {(o.gpu, o.count): o.usd_per_hour_min for gpu in ("rtx4090", "h100-pcie", "t4") for o in current().of(gpu)}
    refresh(fetch=fetching("runpod", "lambdalabs", "aws", "nebius"), today=today)
    assert real == {(o.gpu, o.count): o.usd_per_hour_min for gpu in ("rtx4090", "h100-pcie", "t4") for o in current().of(gpu)}
