"""`/v1/calibrations`: what is posted, by whom, and what becomes of it."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.cli import cli
from app.configuration import Configuration
from app.http import create_app
from app.prediction import predict
from app.state import keys
from app.state.database import Database
from calibration.case import Case
from calibration.record import Environment, Figures, PhasePeak
from estimator.errors import RequestError
from estimator.sources import catalogue
from tests.calibration.test_record import record

REQUEST: dict[str, Any] = {
    "model": "HuggingFaceTB/SmolLM2-1.7B",
    "dtype": "bfloat16",
    "peft": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "training": {"per_device_train_batch_size": 1, "max_length": 512, "bf16": True},
}
CARD = Environment(
    gpu="NVIDIA A100-SXM4-80GB", compute_capability="8.0", num_multiprocessors=108, total_bytes=80 * 2**30, torch="2.13.0",
    transformers="5.23.0", peft="0.21.2", bitsandbytes="0.50.2", trl="1.16.0", python="3.11.7", system="Linux",
)  # fmt: skip


def measured(**changes: int) -> dict[str, Any]:
    """A record as a card would show it that does what the prediction says."""
    entry = catalogue.find(REQUEST["model"])
    assert entry is not None
    case = Case.from_request(REQUEST, dict(catalogue.load(entry.file).config))
    found = predict(case, CARD)
    peak = found.estimate.peak.allocated_bytes
    phases = {
        one.phase.value: PhasePeak(allocated_bytes=one.allocated_bytes, reserved_bytes=one.allocated_bytes) for one in found.estimate.phases
    }
    figures = Figures(
        loaded_bytes=found.loaded_bytes, steady_state_bytes=found.steady_state_bytes, phases=phases, peak_allocated_bytes=peak,
        peak_reserved_bytes=peak + 2**21, run_allocated_bytes=peak, device_bytes=peak + 2**30,
    )  # fmt: skip
    whole = record(case, environment=CARD, figures=figures.model_copy(update=changes))
    payload: dict[str, Any] = whole.model_dump(mode="json", exclude_none=True)
    return payload


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'state.sqlite3'}"


@pytest.fixture
def client(url: str) -> Iterator[TestClient]:
    with TestClient(create_app(Configuration(database_url=url)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def key(client: TestClient, url: str) -> dict[str, str]:
    database = Database(url)
    secret = keys.create(database, "somebody", is_trusted=False)
    database.close()
    return {"x-api-key": secret}


def test_a_measurement_is_taken_once_and_can_be_asked_after(client: TestClient, key: dict[str, str]) -> None:
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: client.post("/v1/calibrations", json=measured(), headers=key), range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 201], answers[0].text
    bodies = [answer.json() for answer in answers]
    assert all(body == bodies[0] for body in bodies)
    assert (bodies[0]["status"], bodies[0]["reasons"]) == ("accepted", [])
    assert client.get(f"/v1/calibrations/{bodies[0]['hash']}").json() == bodies[0]
    assert client.get(f"/v1/calibrations/{'0' * 64}").status_code == 404
    assert 'vramplan_measurements_total{outcome="accepted"} 1.0' in client.get("/metrics").text


def test_what_contradicts_physics_is_quarantined_with_its_reason(client: TestClient, key: dict[str, str]) -> None:
    body = client.post("/v1/calibrations", json=measured(loaded_bytes=1), headers=key).json()
    assert body["status"] == "quarantined"
    assert any("loaded is exact" in reason for reason in body["reasons"])


@pytest.mark.parametrize("headers", [{}, {"x-api-key": ""}, {"x-api-key": "vrk_wrong"}, {"x-api-key": "hf_token"}])
def test_without_a_key_nothing_is_taken(client: TestClient, headers: dict[str, str]) -> None:
    response = client.post("/v1/calibrations", json=measured(), headers=headers)
    assert response.status_code == 401
    assert response.headers["content-type"] == "application/problem+json"
    assert "www-authenticate" in response.headers


@pytest.mark.parametrize("headers", [{"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}])
def test_a_page_of_another_site_changes_nothing(client: TestClient, key: dict[str, str], headers: dict[str, str]) -> None:
    body = json.dumps(measured())
    assert client.post("/v1/calibrations", content=body, headers={**key, **headers, "content-type": "text/plain"}).status_code == 403
    assert client.post("/v1/calibrations", json=measured(), headers=key).status_code == 201  # it was not there


def test_what_has_to_be_predicted_holds_up_no_other_use_of_the_state(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave, let_go = threading.Semaphore(0), threading.Event(), list[bool]()

    def slow(*_: Any, **__: Any) -> None:
        entered.release()
        let_go.append(leave.wait(8))
        raise RequestError("no prediction in this test", field="model")

    payload = measured()
    monkeypatch.setattr("app.calibrations.predict", slow)
    with TestClient(create_app(Configuration(database_url=url, threads=1))) as client, ThreadPoolExecutor(1) as pool:
        database = Database(url)
        key = {"x-api-key": keys.create(database, "somebody", is_trusted=False)}
        database.close()
        waiting = pool.submit(client.post, "/v1/calibrations", json=payload, headers=key)
        assert entered.acquire(timeout=10)
        assert client.get("/v1/calibrations/history").status_code == 200
        assert client.post("/v1/calibrations", json={}, headers=key).status_code == 422
        leave.set()
        assert waiting.result().json()["reasons"] == ["cannot be predicted, so nothing can be set beside it"]
    assert all(let_go)  # nobody had to wait until it gave up


def test_what_is_no_record_is_refused_field_by_field(client: TestClient, key: dict[str, str]) -> None:
    good = measured()
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    for payload, field in (
        ({}, "case_hash"),
        ({**good, "case_hash": "0"}, "record"),
        ({**good, "figures": {"loaded_bytes": -1}}, "figures.loaded_bytes"),
        ({**good, "kind": "dry_run", "figures": None}, "figures"),
        ({**good, "token": "hf_secretsecret"}, "token"),
        ({**good, "case": {**good["case"], "config": deep}}, ""),
        ({**good, "case": {**good["case"], "config": {**good["case"]["config"], "num_hidden_layers": 10**9}}}, "record"),
    ):
        response = client.post("/v1/calibrations", json=payload, headers=key)
        assert response.status_code == 422, response.text
        errors = response.json()["errors"]
        assert not field or field in [error["field"] for error in errors]
        assert "secretsecret" not in response.text


def test_corrections_are_null_until_some_are_in_force(client: TestClient) -> None:
    assert client.get("/v1/calibrations/current").json() == {"schema_version": 1, "version": None, "corrections": None}
    assert client.get("/v1/calibrations/history").json()["events"] == []


def test_a_service_without_state_says_so_and_answers_all_else() -> None:
    client = TestClient(create_app(Configuration(database_url="none")), raise_server_exceptions=False)
    assert client.get("/v1/calibrations/current").status_code == 503
    assert client.post("/v1/estimate", json={"model": "gpt2"}).status_code == 200
    assert client.get("/readyz").json()["state"] == "none"


def test_a_database_that_is_down_costs_readiness_and_no_answer() -> None:
    with TestClient(
        create_app(Configuration(database_url="postgresql://u:hf_password@127.0.0.1:9/x")), raise_server_exceptions=False
    ) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 503
        assert "password" not in ready.text
        assert client.get("/healthz").status_code == 200
        assert client.post("/v1/estimate", json={"model": "gpt2"}).status_code == 200
        posted = client.post("/v1/calibrations", json={}, headers={"x-api-key": "vrk_x"})
        assert (posted.status_code, "retry-after" in posted.headers) == (503, True)


def test_a_full_disk_acknowledges_nothing_and_costs_no_answer(client: TestClient, key: dict[str, str]) -> None:
    app: Any = client.app
    pages: list[int] = []

    def limit(connection: Any, *_: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages[0]}")

    event.listen(app.state.state.database._engine, "checkout", limit)
    pages.append(1)  # which stands for as many as there are
    long = {**measured(), "error": "x" * 40_000}
    refused = client.post("/v1/calibrations", json=long, headers=key)
    assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
    assert client.post("/v1/estimate", json={"model": "gpt2"}).status_code == 200
    assert client.get("/readyz").status_code == 200
    pages[0] = 2**20
    assert client.post("/v1/calibrations", json=long, headers=key).status_code == 201


def test_the_operator_has_commands_for_keys_quarantine_and_corrections(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VRAMPLAN_DATABASE_URL", url)
    runner = CliRunner()

    def run(*arguments: str) -> str:
        done = runner.invoke(cli, ["state", *arguments])
        assert done.exit_code == 0, done.output
        return done.output.strip()

    assert run("migrate") == "the tables are up to date"
    secret = run("new-key", "somebody", "--trusted")
    key_id, name, marks = run("keys").split()
    assert (name, marks) == ("somebody", "trusted")
    with TestClient(create_app(Configuration(database_url=url)), raise_server_exceptions=False) as client:
        record_hash = client.post("/v1/calibrations", json=measured(loaded_bytes=1), headers={"x-api-key": secret}).json()["hash"]
        assert run("quarantine").startswith(record_hash)
        run("release", record_hash)
        assert client.get(f"/v1/calibrations/{record_hash}").json()["status"] == "released"
    run("revoke-key", key_id)
    assert run("keys").endswith("trusted revoked")
    assert runner.invoke(cli, ["state", "fit"]).exit_code == 3
    assert "refused" in run("history")
    assert runner.invoke(cli, ["state", "rollback", "no reason"]).exit_code == 1
