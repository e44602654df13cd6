"""A corrections file scales what is not exact, and the answer says on what evidence."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app import corrections
from app.check import check
from app.cli import cli
from app.configuration import Configuration
from app.form import Form
from app.http import create_app
from app.in_force import InForce
from app.logs import LOGGER
from app.plan import plan
from app.prediction import predict
from app.service import answer
from app.state import corrections as state
from app.state.database import Database
from app.state.opening import State
from calibration.case import Case
from calibration.fit import fit
from calibration.gate import Verdict
from calibration.models import config_of
from estimator.errors import RequestError
from estimator.fitted import Corrections, Term, dumped
from tests.calibration.test_fit import PLANTED, rows
from tests.served import until

REQUEST: dict[str, Any] = {
    "model": "meta-llama/Llama-3.1-8B",
    "dtype": "bfloat16",
    "quantization": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "peft": {"r": 16, "target_modules": "all-linear"},
    "training": {
        "bf16": True,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 1,
        "max_length": 512,
        "optim": "paged_adamw_8bit",
    },
    "hardware": {"gpu": "a100-80"},
}
EXACT = ("weights", "quantization_state", "buffers", "adapter_weights", "optimizer_states", "gradients", "checkpoints", "logits")


@cache
def found() -> Corrections:
    """Fitted to simulated measurements with known factors."""
    return fit(rows(), date="2026-01-01")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "corrections.json"
    path.write_text(dumped(found()))
    return path


@pytest.fixture
def in_use(file: Path) -> Iterator[None]:
    with corrections.using(file):
        yield


def items(answered: dict[str, Any], names: tuple[str, ...]) -> dict[tuple[str, str], int]:
    return {(p["phase"], i["name"]): i["bytes"] for p in answered["phases"] for i in p["items"] if i["name"] in names}


def test_only_what_is_not_exact_is_scaled(file: Path) -> None:
    plain = answer(REQUEST)
    with corrections.using(file):
        scaled = answer(REQUEST)
    assert items(scaled, EXACT) == items(plain, EXACT)
    workspace = items(plain, ("workspace",))[("backward", "workspace")]
    assert items(scaled, ("workspace",))[("backward", "workspace")] == round(PLANTED[Term.WORKSPACE] * workspace)
    context = plain["peak"]["device_bytes"] - plain["peak"]["reserved_bytes"] - plain["peak"]["paged_bytes"]
    assert scaled["peak"]["device_bytes"] - scaled["peak"]["reserved_bytes"] - scaled["peak"]["paged_bytes"] == pytest.approx(
        PLANTED[Term.CONTEXT] * context, abs=2
    )
    assert "corrections" not in plain


@pytest.mark.usefixtures("in_use")
def test_the_answer_says_on_what_evidence() -> None:
    told = answer(REQUEST)["corrections"]
    assert told["version"] == found().version
    assert (told["date"], told["not_applied"]) == ("2026-01-01", None)
    assert told["evidence"].startswith("48 measurements of 4 models")
    (context,) = (row for row in told["terms"] if row["term"] == "context")
    assert context["factor"] == pytest.approx(PLANTED[Term.CONTEXT], rel=0.001)
    assert (context["num_measurements"], context["num_models"]) == (48, 4)
    assert context["group"] == "compute capability 8.0, transformers 5"
    assert context["seen_bytes"][0] <= context["seen_bytes"][1]


@pytest.mark.usefixtures("in_use")
def test_a_run_beyond_what_was_measured_says_so() -> None:
    near = answer(REQUEST)
    large = {**REQUEST["training"], "per_device_train_batch_size": 8, "max_length": 8192}
    far = answer({**REQUEST, "model": "meta-llama/Llama-3.1-70B", "training": large, "hardware": None})
    (warning,) = (one for one in far["warnings"] if one["code"] == "outside_measured_range")
    assert "slack was seen on" in warning["message"]
    assert found().version in warning["message"]
    assert not any(one["code"] == "outside_measured_range" for one in near["warnings"])


@pytest.mark.usefixtures("in_use")
def test_an_interval_is_made_of_the_corrections_own_left_out_errors() -> None:
    bounds = answer(REQUEST)["peak"]["interval"]
    assert bounds is not None
    assert "48 measurements of 4 models" in bounds["basis"]
    assert "each model left out of the fit that it judges" in bounds["basis"]
    other = answer({**REQUEST, "quantization": None})["peak"]["interval"]
    assert other is None  # no measurement of that kind is behind the file


@pytest.mark.usefixtures("in_use")
def test_what_nothing_was_measured_of_stays_as_it_is_modelled() -> None:
    spread = {**REQUEST, "hardware": {"gpu": "a100-80", "num_gpus": 2, "strategy": "ddp"}}
    told = answer(spread)
    assert told["corrections"]["not_applied"] == "runs over several cards were not measured"
    assert told["corrections"]["terms"] == []
    assert all(item["basis"] != "fitted" for phase in told["phases"] for item in phase["items"])


@pytest.mark.usefixtures("in_use")
def test_predictions_that_corrections_are_judged_by_stay_uncorrected() -> None:
    plain = {**REQUEST, "hardware": None}
    one = Case.from_request(plain, config_of(plain))
    assert all(item.basis != "fitted" for phase in predict(one, None).estimate.phases for item in phase.items)


def test_a_setting_applies_them_to_every_answer_and_a_command_to_its_own(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(corrections.VARIABLE, str(file))
    assert answer(REQUEST)["corrections"]["version"] == found().version
    other = file.with_name("other.json")
    other.write_text(file.read_text().replace(found().version, "another"))
    with corrections.using(other):
        assert answer(REQUEST)["corrections"]["version"] == "another"
    file.write_text(file.read_text().replace(found().version, "newer-than-before"))
    assert answer(REQUEST)["corrections"]["version"] == "newer-than-before"


def test_the_service_follows_the_setting_for_a_question_it_has_answered(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(create_app())
    plain = client.post("/v1/estimate", json=REQUEST).json()
    assert "corrections" not in plain
    monkeypatch.setenv(corrections.VARIABLE, str(file))
    assert client.post("/v1/estimate", json=REQUEST).json()["corrections"]["version"] == found().version
    file.write_text(file.read_text().replace(found().version, "newer-than-before"))
    assert client.post("/v1/estimate", json=REQUEST).json()["corrections"]["version"] == "newer-than-before"
    monkeypatch.delenv(corrections.VARIABLE)
    assert client.post("/v1/estimate", json=REQUEST).json() == plain


def test_a_service_whose_file_cannot_be_read_does_not_start(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(corrections.VARIABLE, f"{file}.missing")
    with pytest.raises(RequestError, match=r"'.*\.missing' cannot be read: No such file"):
        create_app()


def test_a_file_that_goes_while_the_service_runs_is_no_fault_of_the_caller(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(corrections.VARIABLE, str(file))
    client = TestClient(create_app())
    assert client.get("/readyz").json()["corrections"] == found().version
    for path in (file.with_suffix(".gone"), file.with_suffix(".broken")):
        path.with_suffix(".broken").write_text("{}")
        monkeypatch.setenv(corrections.VARIABLE, str(path))
        for response in (client.get("/readyz"), client.post("/v1/estimate", json=REQUEST), client.get("/?model=gpt2")):
            assert (response.status_code, str(file.parent) in response.text) == (503, False)
            assert "the corrections that this service answers by cannot be read" in response.text
        assert client.get("/healthz").status_code == 200


def test_a_broken_file_is_logged_once_for_each_change(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(corrections.VARIABLE, str(file))
    monkeypatch.setattr(LOGGER, "propagate", True)
    whole = file.read_text()
    client = TestClient(create_app())
    for content, status in (("{}", 503), ("[", 503), (whole, 200), ("[", 503)):
        file.write_text(content)
        assert [client.get("/readyz").status_code for _ in range(3)] == [status] * 3
    logged = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(logged) == 3
    assert logged[0] != logged[1] == logged[2]
    assert all(line.startswith("VRAMPLAN_CORRECTIONS: ") for line in logged)


# -- those of a service -----------------------------------------------------------------------------------------------------------------

ACCEPTED = Verdict(is_accepted=True, reason="better")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state.sqlite3'}"


def test_what_is_in_force_is_applied_by_every_process_of_the_service_and_taken_back(url: str, database: Database) -> None:
    settings = Configuration(database_url=url, corrections_seconds=0.05)
    with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as other:
        plain = one.post("/v1/estimate", json=REQUEST).json()
        assert "corrections" not in plain
        state.keep(database, found(), ACCEPTED, report={})
        for client in (one, other):
            until(lambda client=client: client.get("/readyz").json()["corrections"] == found().version)  # type: ignore[misc]
            corrected = client.post("/v1/estimate", json=REQUEST).json()
            assert corrected["corrections"]["version"] == found().version
            assert client.post("/v1/estimate", json=REQUEST).json() == corrected
        planned = one.post("/v1/plan", json={**REQUEST, "hardware": {"gpu": "rtx4090"}}).json()["plan"]
        assert planned["estimate"]["corrections"]["version"] == found().version
        assert f"corrections {found().version} (48 measurements" in one.get("/", params=dict(Form.of(REQUEST).values)).text
        with corrections.in_force(found()):
            assert answer(REQUEST) == corrected
        state.roll_back(database, "to see")
        for client in (one, other):
            until(lambda client=client: client.get("/readyz").json()["corrections"] is None)  # type: ignore[misc]
            assert client.post("/v1/estimate", json=REQUEST).json() == plain


def test_what_is_in_force_when_the_service_starts_is_in_its_first_answer(url: str, database: Database) -> None:
    state.keep(database, found(), ACCEPTED, report={})
    with TestClient(create_app(Configuration(database_url=url, corrections_seconds=3600))) as client:
        assert client.post("/v1/estimate", json=REQUEST).json()["corrections"]["version"] == found().version


def test_a_request_reads_no_corrections_from_the_database(url: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    state.keep(database, found(), ACCEPTED, report={})
    with TestClient(create_app(Configuration(database_url=url, corrections_seconds=3600))) as client:
        asked: list[str] = []
        monkeypatch.setattr(Database, "reading", lambda self: asked.append("read"))
        assert client.post("/v1/estimate", json=REQUEST).json()["corrections"]["version"] == found().version
        assert client.post("/v1/check", json=REQUEST).status_code == 200
        assert asked == []


def test_a_state_that_is_out_of_reach_leaves_in_force_what_was(url: str, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    state.keep(database, found(), ACCEPTED, report={})
    opened = State(url)
    known = InForce(opened, every_seconds=1)
    known.look()

    def fails(_: Database) -> None:
        raise OperationalError("SELECT", {}, OSError("gone"))

    monkeypatch.setattr(Database, "reading", fails)
    known.look()
    assert known.now == found()
    opened.close()


def test_a_file_of_the_setting_goes_before_what_is_in_force(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(found(), version="in-force")
    with corrections.in_force(own):
        assert answer(REQUEST)["corrections"]["version"] == "in-force"
        monkeypatch.setenv(corrections.VARIABLE, str(file))
        assert answer(REQUEST)["corrections"]["version"] == found().version
    monkeypatch.delenv(corrections.VARIABLE)
    assert "corrections" not in answer(REQUEST)


def test_the_command_line_takes_a_file_and_says_what_it_did(file: Path) -> None:
    arguments = [
        "estimate",
        "EleutherAI/pythia-14m",
        "--per-device-train-batch-size",
        "1",
        "--max-length",
        "128",
        "--corrections",
        str(file),
    ]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    told = " ".join(done.stdout.split())
    assert f"corrections {found().version} (48 measurements of 4 models" in told
    assert "context × 1.250 (48 measurements of 4 models, off by up to 0.0%, compute capability 8.0, transformers 5)" in told


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("{}", "not a file of")])
def test_a_file_that_is_none_is_refused_by_name(content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "missing.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RequestError, match=message), corrections.using(path):
        pass
    monkeypatch.setenv(corrections.VARIABLE, str(path))
    with pytest.raises(RequestError, match=message):
        answer(REQUEST)


@pytest.mark.usefixtures("in_use")
def test_a_plan_and_a_check_rest_on_corrected_estimates() -> None:
    planned = plan({**REQUEST, "hardware": {"gpu": "rtx4090"}})["plan"]
    assert planned["estimate"]["corrections"]["version"] == found().version
    assert planned["estimate"]["peak"]["reserved_basis"] == "fitted"
    checked = check({**REQUEST, "hardware": {"gpu": "rtx4090"}})
    assert checked["verdict"] == "fits"
