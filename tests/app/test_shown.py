"""What the documents show of the service: every `curl` line, and the typed client, run against it as they are written."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from app import copies, examples, left_out
from app.configuration import Configuration
from app.http import create_app
from app.page import SHOWN
from app.state import keys
from app.state.database import Database
from tests import mock_hub as mocked
from tests.app.test_calibrations import measured
from tests.served import serving

ROOT = Path(__file__).parents[2]
README, SERVICE, CLIENT = ROOT / "README.md", ROOT / "docs" / "service.md", ROOT / "docs" / "examples" / "client.py"
SKILL = ROOT / "app" / "static" / "SKILL.md"


def shell_of(page: Path) -> str:
    return "".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)).replace("\\\n", "")


LINES = [line for page in (README, SERVICE) for line in re.findall(r"^curl .+$", shell_of(page), re.MULTILINE)]
LINES.append(copies.as_curl(examples.INFERENCE, SHOWN))


def is_estimate(answer: Any) -> bool:
    return answer["phases"][0]["allocated_bytes"] > 0 and answer["model"]["num_parameters"] > 0


ANSWERS: Mapping[str, Callable[[str], bool]] = {
    "/v1/estimate": lambda text: is_estimate(json.loads(text)),
    "/v1/plan": lambda text: is_estimate(json.loads(text)["plan"]["estimate"]),
    "/v1/check": lambda text: json.loads(text)["verdict"] == "does_not_fit",
    "/v1/sweep?format=svg": lambda text: text.startswith("<svg "),
    "/v1/trace": lambda text: json.loads(text)["peak"]["allocated_bytes"] > 0,
    "/v1/calibrations": lambda text: json.loads(text)["status"] == "accepted",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the files that the lines send."""
    folder = tmp_path_factory.mktemp("shown")
    request = re.search(r"^cat > qlora\.json <<'JSON'\n(.*?)^JSON$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert request is not None
    (folder / "qlora.json").write_text(request[1])
    (folder / "record.json").write_text(json.dumps(measured()))
    return folder


@pytest.fixture(scope="module")
def surroundings(folder: Path) -> Iterator[dict[str, str]]:
    """Where the service answers, and the secrets that the lines name."""
    with mocked.serving() as hub, pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
            patch.delenv(name, raising=False)
        url = f"sqlite:///{folder / 'state.sqlite3'}"
        app = create_app(Configuration(hub_endpoint=hub.endpoint, hub_file_hosts=(hub.file_endpoint,), database_url=url))
        with serving(app, lifespan="on") as address:
            database = Database(url)
            key = keys.create(database, "somebody", is_trusted=False)
            database.close()
            yield {"ADDRESS": address, "HF_TOKEN": mocked.TOKEN, "LAB_KEY": key}


def path_of(line: str) -> str:
    (address,) = (word for word in shlex.split(line) if word.startswith(SHOWN))
    return address.removeprefix(SHOWN)


def is_slow(line: str) -> bool:
    """Whether the libraries run, or build a model."""
    return path_of(line) == "/v1/trace" or "owner/" in line


@pytest.mark.parametrize("line", [pytest.param(line, marks=[pytest.mark.slow] if is_slow(line) else [], id=line[:60]) for line in LINES])
def test_a_line_for_curl_is_answered(line: str, folder: Path, surroundings: dict[str, str]) -> None:
    command = line.replace(SHOWN, surroundings["ADDRESS"]).replace("curl ", "curl --fail-with-body ", 1)
    done = subprocess.run(["sh", "-c", command], cwd=folder, env=os.environ | surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ANSWERS[path_of(line)](done.stdout)


def is_part(shown: Any, answer: Any) -> bool:
    """Whether an answer has what is shown of it; of a list the first rows."""
    if isinstance(shown, dict):
        return all(name in answer and is_part(value, answer[name]) for name, value in shown.items())
    if isinstance(shown, list):
        return len(shown) <= len(answer) and all(map(is_part, shown, answer))
    return bool(shown == answer)


def test_the_calls_that_agents_are_shown_are_answered_as_shown(folder: Path, surroundings: dict[str, str]) -> None:
    page = httpx2.get(f"{surroundings['ADDRESS']}/llms.txt")
    assert page.headers["content-type"] == "text/markdown; charset=utf-8"
    calls = re.findall(r"^```sh\n(curl .*?)^```\n\n```json\n(.*?)^```", page.text, re.MULTILINE | re.DOTALL)
    assert len(calls) == 3
    for command, shown in calls:
        done = subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
        assert is_part(json.loads(shown), json.loads(done.stdout)), done.stdout[:2000]
    assert SHOWN not in page.text


def test_what_agents_are_told_of_fields_and_codes_is_so() -> None:
    text = SKILL.read_text()
    assert text.startswith("---\nname: vramplan\ndescription: ")
    document = create_app(Configuration(database_url="none")).openapi()
    assert set(re.findall(r"`(?:GET |POST )?(/v1/\w+)`", text)) <= set(document["paths"])
    assert "field_not_modelled" in {code for _, code in left_out.RULES}


def test_every_operation_that_answers_is_shown_with_curl() -> None:
    assert {path_of(line) for line in LINES} == set(ANSWERS)


def test_the_typed_client_asks_the_service(folder: Path, surroundings: dict[str, str]) -> None:
    pytest.importorskip("datamodel_code_generator", reason="datamodel-code-generator is not installed: `make install-test`")
    text = CLIENT.read_text()
    (folder / CLIENT.name).write_text(text)
    lines = re.findall(r"^ *(curl .+|datamodel-codegen .+)$", text, re.MULTILINE)
    assert len(lines) == 2
    python = shlex.quote(sys.executable)
    commands = [line.replace("datamodel-codegen", f"{python} -W ignore -m datamodel_code_generator") for line in lines]
    script = " && ".join([*commands, f"{python} {CLIENT.name} {SHOWN}"]).replace(SHOWN, surroundings["ADDRESS"])
    done = subprocess.run(["sh", "-c", script], cwd=folder, env=os.environ | surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    estimate, plan, refusal = done.stdout.splitlines()
    assert re.fullmatch(r"\d+\.\d GiB in \w+: (fits|tight|does_not_fit)", estimate)
    assert re.fullmatch(r"\d+ × \d+", plan)
    assert refusal.startswith("404 model: 'no-such-model'")


@pytest.mark.slow
def test_the_typed_client_and_what_it_was_made_from_agree(folder: Path, surroundings: dict[str, str]) -> None:
    test_the_typed_client_asks_the_service(folder, surroundings)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "mypy-cache", CLIENT.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
