"""Settings: of the environment, and as documented."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.configuration import Configuration, documented, unknown_names
from app.flood import RateLimiter
from app.http import create_app
from estimator.errors import RequestError

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


def test_the_command_line_and_a_service_without_state_import_no_database() -> None:
    program = "import sys, app.cli, app.http; app.http.create_app(); assert not {'sqlalchemy', 'alembic', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, env={"PATH": "", "VRAMPLAN_DATABASE_URL": "none", "HOME": "/nowhere"})


def test_a_setting_that_cannot_be_read_is_named_with_its_value_and_what_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_THREADS", "0")
    monkeypatch.setenv("VRAMPLAN_LOG_LEVEL", "loud")
    monkeypatch.setenv("VRAMPLAN_HUB_TIMEOUT_SECONDS", "-1")
    with pytest.raises(RequestError) as caught:
        create_app()
    assert [error.message for error in caught.value.errors] == [
        "VRAMPLAN_THREADS: '0': Input should be greater than or equal to 1",
        "VRAMPLAN_HUB_TIMEOUT_SECONDS: '-1': Input should be greater than 0",
        "VRAMPLAN_LOG_LEVEL: 'loud': Input should be 'debug', 'info', 'warning' or 'error'",
    ]


@pytest.mark.parametrize("limit", ["many", "3/minute;", "300 a minute", "0/minute", "300/minute;00/day", "300/0 minutes"])
def test_a_limit_that_cannot_be_read_is_refused_with_what_is_accepted(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("VRAMPLAN_RATE_LIMIT", limit)
    with pytest.raises(RequestError) as caught:
        create_app()
    assert (
        caught.value.message
        == f"VRAMPLAN_RATE_LIMIT: {limit!r}: accepted: `300/minute` with numbers from 1, several separated by `;`, or `none`"
    )


@pytest.mark.parametrize("name", ["VRAMPLAN_HUB_ENDPOINT", "HF_ENDPOINT"])
@pytest.mark.parametrize(
    "address",
    ["not an url", "huggingface.co", "ftp://huggingface.co", "https://", "https://hub:port", "https://hub/?a=b", "https://a b", " "],
)
def test_an_address_of_the_hub_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, address: str) -> None:
    monkeypatch.setenv(name, address)
    with pytest.raises(RequestError) as caught:
        create_app()
    accepted = "accepted: an address such as https://huggingface.co, with http:// or https:// and a host"
    assert [(error.field, error.message) for error in caught.value.errors] == [(name, f"{name}: {address!r}: {accepted}")]


@pytest.mark.parametrize("name", ["VRAMPLAN_HUB_ENDPOINT", "HF_ENDPOINT"])
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://me:s3cret@hub:x", "https://…@hub:x"),
        ("https://s3cret@hub/?a=b", "https://…@hub/?a=b"),
        ("https://me:s3c/ret#s3cret@s3cret@hub", "https://…@hub"),
        ("https://me:s3//cret@hub:x", "https://…@hub:x"),
        ("me:s3cret@hub", "…@hub"),
        ("me:s3//cret@hub", "…@hub"),
        ("https:/me:s3cret@hub", "…@hub"),
        ("https://me:s3cret@", "https://…@"),
    ],
)
def test_an_address_that_is_refused_is_told_without_its_credentials(
    monkeypatch: pytest.MonkeyPatch, name: str, address: str, told: str
) -> None:
    monkeypatch.setenv(name, address)
    with pytest.raises(RequestError) as caught:
        create_app()
    assert f"{name}: {told!r}: accepted" in caught.value.message
    assert "cret" not in str([error.message for error in caught.value.errors])


def test_an_address_that_is_not_asked_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    monkeypatch.setenv("VRAMPLAN_HUB_ENDPOINT", "https://mirror.example")
    assert Configuration.of_environment().hub_endpoint == "https://mirror.example"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("VRAMPLAN_THREADS", None),
        ("vramplan_threads", None),
        ("VRAMPLAN_THREAD", "; the nearest that is one: VRAMPLAN_THREADS"),
        ("VRAMPLAN_HUB_TIMEOUT", "; the nearest that is one: VRAMPLAN_HUB_TIMEOUT_SECONDS"),
        ("VRAMPLAN_CACHE_DIR", None),
        ("vramplan_cache_dir", "; the nearest that is one: VRAMPLAN_CACHE_DIR"),  # is not read
        ("VRAMPLAN_Corrections", "; the nearest that is one: VRAMPLAN_CORRECTIONS"),
        ("VRAMPLAN_prices", "; the nearest that is one: VRAMPLAN_PRICES"),
        ("VRAMPLAN_KEY", ""),
        ("VRAMPLAN_FUZZ_CASES", ""),
        ("VRAMPLAN_", ""),
        ("OTHER_THREADS", None),
    ],
)
def test_a_variable_that_is_no_setting_is_told_of_with_the_one_that_it_comes_near_to(name: str, told: str | None) -> None:
    assert list(unknown_names({name: "s3cret"})) == ([] if told is None else [f"{name} is set and is no setting{told}"])


def test_no_document_names_a_variable_that_the_service_would_warn_of() -> None:
    named = set(re.findall(r"VRAMPLAN_[A-Z_]*[A-Z]", DOCUMENT.read_text()))
    assert len(named) > 20
    assert list(unknown_names(dict.fromkeys(named, ""))) == []


@pytest.mark.parametrize("limit", ["10/minute", "300/minute;1000/10 hours", "0300/minute"])
def test_a_limit_may_have_zeros_within_its_numbers(limit: str) -> None:
    assert RateLimiter(limit, "memory://")


@pytest.mark.parametrize("address", ["", "https://huggingface.co", "http://127.0.0.1:9", "https://mirror.example/hub/", "http://[::1]:80"])
def test_an_address_of_the_hub_may_have_a_port_and_a_path(address: str) -> None:
    assert Configuration(hub_endpoint=address).hub_endpoint == address
