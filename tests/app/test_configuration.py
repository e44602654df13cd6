"""Settings: of the environment, and as documented."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.configuration import Configuration, documented

DOCUMENT = Path(__file__).parents[2] / "docs" / "service.md"


def test_the_table_of_settings_is_the_documented_one() -> None:
    assert documented() in DOCUMENT.read_text()


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"ALLOWED_HOSTS": "a.example, b.example", "MAX_CONCURRENT": "3", "METRICS": "false", "DATABASE_URL": ""}.items():
        monkeypatch.setenv(f"VRAMPLAN_{name}", value)
    monkeypatch.setenv("VRAMPLAN_CACHE_DIR", str(tmp_path))
    found = Configuration()
    assert (found.allowed_hosts, found.max_concurrent, found.metrics) == (("a.example", "b.example"), 3, False)
    assert found.database == f"sqlite:///{tmp_path / 'vramplan.sqlite3'}"


@pytest.mark.parametrize(("name", "value"), [("MAX_CONCURRENT", "0"), ("HUB_TIMEOUT_SECONDS", "-1"), ("LOG_LEVEL", "loud")])
def test_a_setting_that_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"VRAMPLAN_{name}", value)
    with pytest.raises(ValidationError):
        Configuration()


def test_the_command_line_and_a_service_without_state_import_no_database() -> None:
    program = "import sys, app.cli, app.http; app.http.create_app(); assert not {'sqlalchemy', 'alembic', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PATH": "", "VRAMPLAN_DATABASE_URL": "none", "HOME": "/nowhere"})
