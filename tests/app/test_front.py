"""The door of the service: limits, credentials, and what is noted."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient
from starlette.types import Message, Scope

from app import examples
from app.configuration import Configuration
from app.connection import Connection
from app.flood import RateLimiter, caller_of
from app.http import create_app
from app.logs import JsonFormatter
from app.metrics import Metrics
from app.redaction import redacted
from app.serving import serve_on
from app.spans import Spans
from app.state.measurements import Posted, Status
from app.state.opening import State
from app.work import Need, Workers
from estimator.errors import InspectionError, TraceError
from estimator.sources.at_hand import NotAtHandError
from estimator.sources.cache import InventoryCache
from estimator.sources.process import Inspector
from estimator.sources.tracing import Tracer
from tests import mock_hub as mocked
from tests.mock_hub import CONFIG, MockHub
from tests.served import serving, until

TOKEN = "hf_CANARYcanary.CANARY_canary-0123456789"
PLAIN = "hf_oauth_CANARY"


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with mocked.serving() as mock:
        yield mock


def client_of(mock: MockHub | None = None, **settings: Any) -> TestClient:
    if mock is not None:
        settings = {"hub_endpoint": mock.endpoint, "hub_file_hosts": (mock.file_endpoint,), "hub_timeout_seconds": 1.0, **settings}
    return TestClient(create_app(Configuration(**settings)), raise_server_exceptions=False)


def assert_problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    return body


# -- limits -----------------------------------------------------------------------------------------------------------------------------


def test_an_address_that_asks_too_much_is_told_when_to_come_back() -> None:
    client = client_of(rate_limit="3/minute")
    assert [client.get("/v1/models?q=gpt2").status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    response = client.get("/v1/models")
    assert_problem(response, 429)
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert client.get("/healthz").status_code == 200


def test_one_subscriber_is_one_caller_whatever_the_address() -> None:
    assert caller_of("2001:db8::1") == caller_of("2001:db8::ffff:1") == "2001:db8::/64"
    assert caller_of("2001:db8:1::1") != caller_of("2001:db8::1")
    assert caller_of("::ffff:192.0.2.1") == caller_of("192.0.2.1")
    assert caller_of("testclient") == "unknown"


def test_a_storage_of_limits_that_fails_lets_requests_in(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from limits.errors import StorageError

    limiter = RateLimiter("1/minute", "memory://")

    async def fails(*_: Any) -> bool:
        raise StorageError(OSError("gone"))

    monkeypatch.setattr(limiter._strategy, "hit", fails)
    assert asyncio.run(limiter.refuses("192.0.2.1")) is None


def test_what_is_too_much_at_once_is_turned_away_and_the_rest_is_answered() -> None:
    client = client_of(max_concurrent=1)
    app: Any = client.app
    entered, leave = threading.Event(), threading.Event()

    async def slow() -> dict[str, str]:
        entered.set()
        await asyncio.to_thread(leave.wait, 5)
        return {}

    app.get("/slow")(slow)
    with client:
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(client.get("/slow").status_code))
        thread.start()
        entered.wait(5)
        refused = client.get("/v1/models")
        assert client.get("/healthz").status_code == 200
        leave.set()
        thread.join()
    assert_problem(refused, 503)
    assert refused.headers["retry-after"] == "1"
    assert codes == [200]


def test_plans_hold_up_no_estimate_and_too_many_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Semaphore(0), threading.Event()

    def plan(_: Any) -> dict[str, str]:
        entered.release()
        leave.wait(10)
        return {}

    monkeypatch.setattr("app.http.plan", plan)
    with client_of(threads=2, max_plans=3) as client, ThreadPoolExecutor(3) as callers:
        planned = [callers.submit(client.post, "/v1/plan", json=examples.QLORA) for _ in range(3)]
        assert entered.acquire(timeout=10)
        until(lambda: client.app.state.metrics.active._value.get() == 3)  # type: ignore[attr-defined]
        refused = client.post("/v1/plan", json=examples.QLORA)
        assert client.post("/v1/estimate", json={"model": "gpt2"}).status_code == 200
        leave.set()
        assert [one.result().status_code for one in planned] == [200, 200, 200]
        assert client.post("/v1/plan", json=examples.QLORA).status_code == 200
    assert_problem(refused, 503)
    assert refused.headers["retry-after"] == "5"


PASTED = {"model": {"config": CONFIG}, "dtype": "bfloat16"}
ELSEWHERE = {"model": "somebody/elsewhere", "dtype": "bfloat16"}
BUNDLED = {"model": "gpt2", "dtype": "bfloat16"}
FLOODS = {
    "plans of pasted configs": ("/v1/plan", PASTED),
    "plans of models of the Hub": ("/v1/plan", ELSEWHERE),
    "plans of bundled models": ("/v1/plan", BUNDLED),
    "pasted configs": ("/v1/estimate", PASTED),
    "models of the Hub": ("/v1/estimate", ELSEWHERE),
    "files of trainers": ("/v1/convert", {"files": []}),
    "measurements": ("/v1/calibrations", {}),
}


class Stuck:
    """Calls that wait until they are let go: those of the floods named, and no others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *floods: str) -> None:
        self.entered, self.leave = threading.Semaphore(0), threading.Event()
        self._floods = [FLOODS[name] for name in floods]
        places = {"plan": "http.plan", "estimate": "http.answer", "convert": "http.convert", "calibrations": "calibrations.admit"}
        for name, place in places.items():
            monkeypatch.setattr(f"app.{place}", partial(self._ask, f"/v1/{name}"))

    def _ask(self, path: str, asked: Any = None, **_: Any) -> Any:
        is_measurement = path == "/v1/calibrations"
        if (path, {} if is_measurement else asked) in self._floods:
            self.entered.release()
            self.leave.wait(20)
        return SimpleNamespace(found=Posted(hash="", status=Status.ACCEPTED, reasons=())) if is_measurement else {}


def assert_what_needs_nothing_is_answered(client: TestClient) -> None:
    for asked in ("/accuracy", "/methods", "/?model=gpt2", "/?model=gpt2&show=files", "/v1/models/gpt2", "/openapi.json", "/readyz"):
        assert client.get(asked).status_code == 200, asked
    assert client.post("/v1/estimate", json=BUNDLED).status_code == 200


@pytest.mark.parametrize("flood", FLOODS)
def test_what_waits_or_takes_long_holds_up_nothing_of_another_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flood: str) -> None:
    stuck = Stuck(monkeypatch, flood)
    path, body = FLOODS[flood]
    with (
        client_of(threads=4, max_plans=3, max_concurrent=40, database_url=f"sqlite:///{tmp_path / 'state'}") as client,
        ThreadPoolExecutor(40) as callers,
    ):
        waiting = [callers.submit(client.post, path, json=body) for _ in range(18)]
        assert stuck.entered.acquire(timeout=10)
        places = 3 if path == "/v1/plan" else 5
        active = client.app.state.metrics.active._value  # type: ignore[attr-defined]
        until(lambda: active.get() == places)
        for other, (asked, of) in FLOODS.items():
            if other != flood:
                assert client.post(asked, json=of).status_code == 200, other
        assert_what_needs_nothing_is_answered(client)
        stuck.leave.set()
        codes = Counter(one.result().status_code for one in waiting)
    assert codes == {200: places, 503: 18 - places}


def test_all_that_waits_or_takes_long_at_once_leaves_places_to_what_needs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stuck = Stuck(monkeypatch, *FLOODS)
    with (
        client_of(threads=2, max_plans=16, max_concurrent=16, database_url=f"sqlite:///{tmp_path / 'state'}") as client,
        ThreadPoolExecutor(3 * len(FLOODS)) as callers,
    ):
        active = client.app.state.metrics.active._value  # type: ignore[attr-defined]
        waiting = []
        for number, (path, body) in enumerate(FLOODS.values(), 1):
            waiting += [callers.submit(client.post, path, json=body) for _ in range(3)]
            assert stuck.entered.acquire(timeout=10)
            until(lambda held=2 * number: active.get() == held)  # type: ignore[misc]
        assert_what_needs_nothing_is_answered(client)
        stuck.leave.set()
        codes = Counter(one.result().status_code for one in waiting)
    assert codes == {200: 2 * len(FLOODS), 503: len(FLOODS)}


def test_a_bundled_model_that_has_to_be_traced_waits_where_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave, let_go = threading.Semaphore(0), threading.Event(), list[bool]()

    def trace(*_: Any, **__: Any) -> None:
        entered.release()
        let_go.append(leave.wait(20))
        raise TraceError("no trace in this test", field="engine")

    def nothing_at_hand(*_: Any) -> None:
        raise NotAtHandError

    monkeypatch.setattr(Tracer, "_at_hand", nothing_at_hand)
    monkeypatch.setattr(Tracer, "_obtain", trace)
    # a thread each would take all that there are for bundled models
    names = {"facebook/opt-125m": "estimate", "facebook/opt-350m": "estimate", "facebook/opt-1.3b": "plan"}
    sizes = {"training": {"per_device_train_batch_size": 1, "max_length": 64}, "hardware": {"gpu": "t4"}}
    with client_of(threads=2) as client, ThreadPoolExecutor(3) as callers:
        waiting = [callers.submit(client.post, f"/v1/{path}", json={"model": name, **sizes}) for name, path in names.items()]
        assert all(entered.acquire(timeout=10) for _ in waiting)
        assert client.post("/v1/estimate", json=BUNDLED).status_code == 200
        assert client.post("/v1/plan", json=examples.QLORA).status_code == 200
        leave.set()
        answers = [one.result() for one in waiting]
    assert all(let_go)  # nobody had to wait until they gave up
    assert [answer.status_code for answer in answers] == [200, 200, 422]  # what only loads cannot be planned
    assert "not_traced" in {warning["code"] for warning in answers[0].json()["warnings"]}


def test_a_bundled_model_that_gets_another_head_waits_where_others_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave, let_go = threading.Semaphore(0), threading.Event(), list[bool]()

    def run(*_: Any, **__: Any) -> None:
        entered.release()
        let_go.append(leave.wait(8))
        raise InspectionError("no building in this test", field="model")

    monkeypatch.setattr(Inspector, "run", run)
    monkeypatch.setattr("estimator.sources.resolve.default_cache", partial(InventoryCache, None))
    training = {"trainer": "transformers", "training": {"per_device_train_batch_size": 1, "max_length": 64}}
    classified = {**BUNDLED, **training, "task": {"kind": "classification"}}
    with client_of(threads=2) as client, ThreadPoolExecutor(2) as callers:
        # a thread each would take all that there are for bundled models
        waiting = [callers.submit(client.post, "/v1/estimate", json=classified) for _ in range(2)]
        assert all(entered.acquire(timeout=10) for _ in waiting)
        assert client.post("/v1/estimate", json=BUNDLED).status_code == 200
        leave.set()
        answers = [one.result() for one in waiting]
    assert all(let_go)  # nobody had to wait until they gave up
    assert {answer.json()["detail"] for answer in answers} == {"no building in this test"}


def test_a_call_that_no_thread_takes_is_not_counted_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(max_long=1)

    def ask() -> int:
        return asyncio.run(workers.run(lambda: 1, need=Need.NOTHING, is_long=True))

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", lambda *_: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="new thread"):
            ask()
    assert ask() == 1
    workers.close()


def sent(app: Any, messages: list[Message], **scope: Any) -> list[Message]:
    """What an application answers to raw messages; after the last one nothing more comes."""
    answers: list[Message] = []

    async def run() -> None:
        waiting = iter(messages)

        async def receive() -> Message:
            for message in waiting:
                return message
            await asyncio.sleep(30)
            raise AssertionError

        async def send(message: Message) -> None:
            answers.append(message)

        full: Scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/estimate", "raw_path": b"", "root_path": "",
            "scheme": "http", "query_string": b"", "headers": [(b"host", b"testserver")],
            "client": ("192.0.2.1", 1), "server": None, **scope,
        }  # fmt: skip
        await app(full, receive, send)

    asyncio.run(run())
    return answers


def test_a_body_that_drips_is_given_up() -> None:
    app: Any = client_of(body_timeout_seconds=0.1).app
    answers = sent(app, [{"type": "http.request", "body": b"{", "more_body": True}])
    assert answers[0]["status"] == 408


def test_a_connection_on_which_no_request_arrives_is_ended() -> None:
    head = b"POST /v1/estimate HTTP/1.1\r\nhost: 127.0.0.1\r\n"
    sent_first = {"nothing": b"", "half a head": head, "half a body": head + b'content-length: 17\r\n\r\n{"model"'}
    with serving(create_app(), idle_seconds=1) as address, ExitStack() as stack:
        end = (address.removeprefix("http://").split(":")[0], int(address.rpartition(":")[2]))
        callers = {name: stack.enter_context(socket.create_connection(end, 10)) for name in sent_first}
        for name, first in sent_first.items():
            callers[name].sendall(first)
        time.sleep(0.5)
        callers["half a head"].sendall(b"x")  # a letter now and then is no request either
        begun = time.monotonic()
        assert [callers[name].recv(1) for name in ("nothing", "half a head")] == [b"", b""]
        assert 0.3 < time.monotonic() - begun < 5
        callers["half a body"].sendall(b': "gpt2"}')
        assert callers["half a body"].recv(15) == b"HTTP/1.1 200 OK"


def test_no_connection_is_taken_over_by_another_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever websocket library is installed, and uvicorn would choose by itself."""
    served: dict[str, Any] = {}
    monkeypatch.setattr("uvicorn.run", lambda _, **options: served.update(options))
    monkeypatch.setattr("app.serving.configure", lambda *_: None)
    monkeypatch.setenv("VRAMPLAN_ALLOWED_HOSTS", "127.0.0.1")
    serve_on("127.0.0.1", 0)
    assert (served["http"], served["ws"]) == (Connection, "none")


def test_the_process_that_starts_others_keeps_open_nothing_of_the_application_it_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: list[set[threading.Thread]] = []
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: served.append({*threading.enumerate()}))
    monkeypatch.setattr("app.serving.configure", lambda *_: None)
    opened, closed = [], []
    monkeypatch.setattr(State, "__init__", lambda self, url, **_: opened.append(url) or vars(self).update(database=None))
    monkeypatch.setattr(State, "close", lambda _: closed.append(1))
    for name, value in {"ALLOWED_HOSTS": "*", "DATABASE_URL": f"sqlite:///{tmp_path / 'state.sqlite3'}", "TRACES": "true"}.items():
        monkeypatch.setenv(f"VRAMPLAN_{name}", value)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    before = {*threading.enumerate()}
    serve_on("127.0.0.1", 0, workers=2)
    assert [threads - before for threads in served] == [set()]  # one would send spans
    assert len(opened) == len(closed) == 1


def test_a_variable_that_is_nearly_a_setting_is_told_of_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    monkeypatch.setattr("app.serving.configure", lambda *_: None)
    monkeypatch.setattr(logging.getLogger("vramplan"), "propagate", True)
    names = {"ALLOWED_HOSTS": "*", "THREAD": "secret", "DATABASE": "secret", "CACHE_DIR": "", "CORRECTIONS": "", "PRICES": ""}
    for name, value in names.items():
        monkeypatch.setenv(f"VRAMPLAN_{name}", value)
    monkeypatch.setenv("vramplan_log_level", "info")  # settings are read whatever the case
    serve_on("127.0.0.1", 0)
    assert caplog.messages == [
        "VRAMPLAN_DATABASE is set and is no setting; the nearest that is one: VRAMPLAN_DATABASE_URL",
        "VRAMPLAN_THREAD is set and is no setting; the nearest that is one: VRAMPLAN_THREADS",
    ]


def test_a_caller_who_hangs_up_is_no_fault() -> None:
    app: Any = client_of().app
    answers = sent(app, [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    assert answers[0]["status"] == 499


def test_an_answer_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = threading.Event()
    monkeypatch.setattr("app.http.answer", lambda payload: leave.wait(5) and {})
    response = client_of(request_timeout_seconds=0.1).post("/v1/estimate", json=examples.QLORA)
    leave.set()
    assert_problem(response, 503)
    assert "retry-after" in response.headers


@pytest.mark.parametrize("path", ["/", "/healthz", "/v1/models", "/nowhere", "/static/style.css"])
def test_head_is_answered_as_get_without_the_body(path: str) -> None:
    client = client_of()
    found, asked = client.head(path), client.get(path)
    assert (found.status_code, found.content) == (asked.status_code, b"")
    assert found.headers["content-length"] == str(len(asked.content))
    assert client.head("/v1/estimate").status_code == 405


# -- where requests come from -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", ""])
def test_a_name_that_is_not_the_services_own_gets_no_answer(host: str) -> None:
    client = client_of(allowed_hosts=("127.0.0.1", "localhost"))
    assert_problem(client.get("/v1/models", headers={"host": host}), 421)
    assert client.get("/v1/models", headers={"host": "127.0.0.1:8000"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://[bad"}, {"sec-fetch-site": "cross-site"}],
)
def test_pages_of_other_sites_may_not_post(headers: dict[str, str]) -> None:
    client = client_of()
    assert_problem(client.post("/v1/estimate", json=examples.QLORA, headers=headers), 403)
    own = {"origin": "http://testserver", "sec-fetch-site": "same-origin"}
    assert client.post("/v1/estimate", json=examples.QLORA, headers=own).status_code == 200


# -- tokens -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{"x-hf-token": mocked.TOKEN}, {"authorization": f"Bearer {mocked.TOKEN}"}])
def test_a_callers_token_opens_a_model_for_that_request_alone(mock: MockHub, headers: dict[str, str]) -> None:
    client = client_of(mock)
    ask = {"model": "owner/private", "dtype": "bfloat16"}
    assert client.post("/v1/estimate", json=ask, headers=headers).json()["model"]["num_parameters"] == 82_752
    for other in ({}, {"x-hf-token": "hf_wrong"}, {"authorization": "Bearer hf_revoked"}):
        assert_problem(client.post("/v1/estimate", json=ask, headers=other), 404)
    assert_problem(client.get("/v1/models/owner/private"), 404)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-hf-token": "secretsecret"},
        {"x-hf-token": f"{TOKEN} x"},
        {"authorization": "Bearer not-a-token"},
        {"x-hf-token": TOKEN, "authorization": "Bearer hf_other"},
        {"x-hf-token": "hf_" + "x" * 5000},
    ],
)
def test_a_malformed_token_is_refused_and_not_quoted(headers: dict[str, str]) -> None:
    response = client_of().post("/v1/estimate", json=examples.QLORA, headers=headers)
    assert_problem(response, 422)
    assert not any(secret in response.text for secret in ("secretsecret", "CANARY", "not-a-token", "xxxxx"))


def test_a_token_is_found_nowhere_afterwards(
    mock: MockHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through every path of the service, then a search through logs, answers, metrics, memory of the process's stores and its files."""
    monkeypatch.setenv("VRAMPLAN_CACHE_DIR", str(tmp_path))
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonFormatter().format(record))

    handler = Keep()
    root = logging.getLogger()
    root.addHandler(handler)
    for name in (None, "vramplan", "httpx2", "huggingface_hub", "uvicorn.error"):
        caplog.set_level(logging.DEBUG, logger=name)
    monkeypatch.setattr(logging.getLogger("vramplan"), "propagate", True)
    try:
        mock.tokens.add(TOKEN)
        mock.repositories["strange"] = {"config.json": json.dumps({**CONFIG, "model_type": "strange", "auto_map": {}}).encode()}
        mock.private.add("strange")
        client = client_of(mock, database_url=f"sqlite:///{tmp_path / 'state.sqlite3'}")
        texts = []
        with client:
            for header in ({"x-hf-token": TOKEN}, {"authorization": f"Bearer {TOKEN}"}):
                names = ("private", "gated", "strange", "missing", "revoked", "down", "html", "broken", "hostile", "elsewhere")
                for name in names:
                    for path in ("estimate", "plan", "check", "sweep", "trace"):
                        response = client.post(f"/v1/{path}", json={"model": f"owner/{name}"}, headers=header)
                        texts += [response.text, str(response.headers)]
                    texts.append(client.get(f"/v1/models/owner/{name}", headers=header).text)
                texts.append(client.get(f"/v1/models/{TOKEN}", headers=header).text)
                texts.append(client.get("/", params={"model": "gpt2", "token": TOKEN}, headers=header).text)
                texts.append(client.post("/v1/estimate", json={"model": "gpt2", TOKEN: TOKEN}, headers=header).text)
                texts.append(client.post("/v1/calibrations", json={TOKEN: TOKEN}, headers=header).text)
            file = {"name": "a.yaml", "content": f"base_model: gpt2\nhub_token: {TOKEN}\n{TOKEN}: 1\n"}
            for path, more in (("convert", {}), ("convert", {"write": "llamafactory"}), ("estimate", {})):
                texts.append(client.post(f"/v1/{path}", json={"files": [file], **more}, headers=header).text)
            for fields in ({"model": "owner/private"}, {"model": "gpt2", "revision": PLAIN}, {"request": f"hub_token: {PLAIN}"}):
                texts.append(client.post("/", data=fields, headers=header, follow_redirects=False).text)
                for part in ("answer?wait=step", "plan", "timeline"):
                    response = client.get(f"/page/{part}", params=fields, headers=header)
                    texts += [response.text, str(response.headers)]
            texts.append(client.get("/metrics").text)
    finally:
        root.removeHandler(handler)
    assert any(TOKEN in (authorization or "") for _, authorization in mock.requests)
    assert any('"route":"/v1/estimate"' in line for line in lines)
    for text in (*texts, *lines):
        assert "CANARY" not in text
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"CANARY" not in file.read_bytes()


@pytest.mark.parametrize("token", ["hf_abcdEFGH1234", "hf_oauth_abc.def-ghi_jkl", "hf_jwt_eyJhbGciOi.J9.abc", "vrk_0123456789abcdef"])
def test_secrets_are_taken_out_whole(token: str) -> None:
    assert redacted(f"got {token}, and") in ("got hf_…, and", "got vrk_…, and")


# -- what is noted ----------------------------------------------------------------------------------------------------------------------


def test_metrics_know_routes_and_no_models(mock: MockHub) -> None:
    client = client_of(mock, rate_limit="30/minute")
    client.get("/v1/models/owner/public")
    client.get("/nowhere/secret-name")
    client.post("/v1/estimate", json=examples.QLORA)
    text = client.get("/metrics").text
    assert 'vramplan_requests_total{method="POST",route="/v1/estimate",status="200"} 1.0' in text
    assert 'route="unmatched",status="404"' in text
    assert 'vramplan_hub_total{outcome="asked"} 1.0' in text
    assert "secret-name" not in text
    assert "owner" not in text
    assert client_of(metrics=False).get("/metrics").status_code == 404


def test_a_log_line_is_json_without_names_and_secrets(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("vramplan"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="vramplan"):
        response = client_of().get("/v1/models/owner/secret-name?revision=..")
    (record,) = (record for record in caplog.records if record.name == "vramplan")
    line = JsonFormatter().format(record)
    assert json.loads(line) | {"milliseconds": 0, "time": ""} == {
        "time": "", "level": "info", "logger": "vramplan", "message": "request", "request_id": response.headers["x-request-id"],
        "method": "GET", "route": "/v1/models/{model_id:path}", "status": 422, "milliseconds": 0,
    }  # fmt: skip


def test_an_exception_is_logged_without_secrets() -> None:
    try:
        raise ValueError(f"with {TOKEN}\x1b[31m")
    except ValueError:
        record = logging.LogRecord("vramplan", logging.ERROR, "", 0, "failed", (), __import__("sys").exc_info())
    line = JsonFormatter().format(record)
    assert "CANARY" not in line
    assert "\\u001b" not in line
    assert "ValueError" in json.loads(line)["exception"]


def test_liveness_and_readiness_are_told_apart(mock: MockHub) -> None:
    client = client_of(mock)
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["status"], ready.json()["hub"]) == (200, "ready", "asked")


def test_spans_that_nobody_takes_hold_up_no_other_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What collects them may be out of reach, and their SDK then waits for up to half a minute."""
    ended: list[str] = []

    def noted(name: str, close: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda one: (ended.append(name), close(one))[1]

    spans = Spans(tracer=TracerProvider().get_tracer("test"), close=partial(ended.append, "spans"))
    monkeypatch.setattr("app.http.spans_of_environment", lambda: spans)
    for name, place in {"threads": Workers, "state": State, "counts": Metrics}.items():
        monkeypatch.setattr(place, "close", noted(name, place.close))
    client = client_of(traces=True, database_url=f"sqlite:///{tmp_path / 'state'}")
    with client:
        pass
    assert sorted(ended) == ["counts", "spans", "state", "threads"]
    assert ended[-1] == "spans"


def test_a_span_holds_the_route_and_nothing_of_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    spans = Spans(tracer=provider.get_tracer("test"), close=provider.shutdown)
    monkeypatch.setattr("app.http.spans_of_environment", lambda: spans)
    client = client_of(traces=True)
    client.get(f"/v1/models/owner/secret-name?revision={TOKEN}", headers={"x-hf-token": "hf_headerheader"})
    (span,) = exporter.get_finished_spans()
    assert span.name == "GET /v1/models/{model_id:path}"
    assert not any(secret in span.to_json() for secret in ("secret-name", "CANARY", "headerheader"))
