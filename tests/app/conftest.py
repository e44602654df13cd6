from pathlib import Path

import pytest

from app import prices


@pytest.fixture(autouse=True)
def bundled_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The offers that come with the package, whatever was fetched on this machine."""
    monkeypatch.setenv(prices.VARIABLE, str(tmp_path / "no-prices.json"))
