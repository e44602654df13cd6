import os
from pathlib import Path

import pytest

from app import prices

# Applications are made while test files are imported: no state on this machine, and no limit for one address that asks all the questions.
os.environ["VRAMPLAN_DATABASE_URL"] = "none"
os.environ["VRAMPLAN_RATE_LIMIT"] = "none"


@pytest.fixture(autouse=True)
def bundled_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offers that come with the package, whatever was fetched on this machine."""
    monkeypatch.setenv(prices.VARIABLE, str(tmp_path / "no-prices.json"))
