import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import prices
from app.state.database import Database

# Applications are made while test files are imported: no state on this machine, and no limit for one address that asks all the questions.
os.environ["VRAMPLAN_DATABASE_URL"] = "none"
os.environ["VRAMPLAN_RATE_LIMIT"] = "none"


@pytest.fixture(autouse=True)
def bundled_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offers that come with the package, whatever was fetched on this machine."""
    monkeypatch.setenv(prices.VARIABLE, str(tmp_path / "no-prices.json"))


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """A state at the address that the tests of a file are given."""
    database = Database(url)
    database.migrate()
    yield database
    database.close()
