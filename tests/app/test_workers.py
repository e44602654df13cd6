"""Several worker processes on one state, one Redis and one socket are one service; a database that crashes under load costs no answer."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from app import examples
from app.configuration import Configuration
from app.flood import RateLimiter
from app.http import create_app
from app.state import corrections, keys
from app.state.database import Database
from app.state.tables import MEASUREMENTS
from calibration.gate import Verdict
from estimator.errors import RequestError
from estimator.fitted import Corrections
from tests import postgres, redis_server
from tests.app.test_calibrations import measured
from tests.served import until

ACCEPTED = Verdict(is_accepted=True, reason="better")
NEEDS_REDIS = pytest.mark.skipif(redis_server.why_not() is not None, reason=str(redis_server.why_not()))
NEEDS_POSTGRES = pytest.mark.skipif(postgres.why_not() is not None, reason=str(postgres.why_not()))


def of(version: str) -> Corrections:
    return Corrections(version=version, date="2026-01-01", evidence="", groups={}, residuals={})


# -- worker processes -------------------------------------------------------------------------------------------------------------------


class Service:
    """`vramplan serve --workers 2`."""

    def __init__(self, url: str, **settings: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-c", "from app.cli import main; main()", "serve", "--port", str(self.port), "--workers", "2"]
        surroundings = {
            f"VRAMPLAN_{name.upper()}": value for name, value in {"database_url": url, "log_level": "error", **settings}.items()
        }
        self.process = subprocess.Popen(command, env=os.environ | surroundings)

    def wait(self) -> None:
        """Until both processes listen."""
        deadline = time.monotonic() + 120
        while len(self.workers()) < 2:
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """Processes that have come up, which open the state before they take requests."""
        found = psutil.Process(self.process.pid).children()
        return [one for one in found if any(path.path.endswith("state.sqlite3") for path in one.open_files())]

    @contextmanager
    def of_each_worker(self, address: str) -> Iterator[list["Connection"]]:
        """A connection to each process: the other one is stopped while it is made.

        Args:
            address: of the caller, as a proxy on this machine says it.
        """
        workers, made = self.workers(), []
        for other in reversed(workers):
            other.suspend()
            try:
                made.append(Connection(self.port, address))
                assert made[-1].ask("GET", "/healthz")[0] == 200
            finally:
                other.resume()
        assert [self.owner(one) for one in made] == [worker.pid for worker in workers]
        yield made
        for one in made:
            one.close()

    def owner(self, connection: "Connection") -> int | None:
        """The process at the other end."""
        ends = {end.raddr: one.pid for one in self.workers() for end in one.net_connections("tcp") if end.raddr}
        return ends.get(connection.own_end)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('workers') / 'state.sqlite3'}"


@pytest.fixture(scope="module")
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture(scope="module")
def service(url: str, database: Database) -> Iterator[Service]:
    with redis_server.serving() as redis:
        service = Service(url, rate_limit="20/minute", rate_limit_storage=redis.url, corrections_seconds="0.1")
        try:
            service.wait()
            yield service
        finally:
            service.close()


class Connection:
    """One that stays open, and so with the process that took it."""

    def __init__(self, port: int, address: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._headers = {"x-forwarded-for": address, "content-type": "application/json"}

    @property
    def own_end(self) -> Any:
        return self._connection.sock.getsockname()

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """The status and the content of the answer."""
        sent = None if body is None else json.dumps(body)
        self._connection.request(method, path, sent, {**self._headers, **(headers or {})})
        response = self._connection.getresponse()
        return response.status, json.load(response)

    def close(self) -> None:
        self._connection.close()


@NEEDS_REDIS
@pytest.mark.slow  # two processes that import everything
def test_two_processes_share_measurements_corrections_and_the_limit_of_an_address(service: Service, database: Database) -> None:
    key = {"x-api-key": keys.create(database, "somebody", is_trusted=False)}
    with service.of_each_worker("192.0.2.1") as (one, other):
        status, posted = one.ask("POST", "/v1/calibrations", measured(), key)
        assert (status, posted["status"]) == (201, "accepted")
        assert other.ask("GET", f"/v1/calibrations/{posted['hash']}") == (200, posted)
        assert other.ask("POST", "/v1/calibrations", measured(), key) == (200, posted)
        corrections.keep(database, of("new"), ACCEPTED, report={})
        deadline = time.monotonic() + 5
        while {one.ask("GET", "/readyz")[1]["corrections"], other.ask("GET", "/readyz")[1]["corrections"]} != {"new"}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for worker in (one, other):
            assert worker.ask("POST", "/v1/estimate", examples.QLORA)[1]["corrections"]["version"] == "new"
    with service.of_each_worker("192.0.2.2") as workers:
        codes = Counter(worker.ask("GET", "/v1/models?q=gpt2")[0] for _ in range(15) for worker in workers)
    assert codes == {200: 20, 429: 10}


# -- Redis ------------------------------------------------------------------------------------------------------------------------------


@NEEDS_REDIS
def test_replicas_count_an_address_together_and_let_requests_in_when_redis_is_gone_or_hangs() -> None:
    async def ask() -> None:
        with redis_server.serving() as redis:
            one, other = (RateLimiter("3/minute", redis.url) for _ in range(2))
            found = [await limiter.refuses("192.0.2.1") for limiter in (one, other, one, other, one)]
            assert [refusal is None for refusal in found] == [True, True, True, False, False]
            assert await one.refuses("192.0.2.2") is None
            redis.process.send_signal(signal.SIGSTOP)
            begun = time.monotonic()
            assert await one.refuses("192.0.2.1") is None
            assert time.monotonic() - begun < 3
            redis.process.send_signal(signal.SIGCONT)
        assert await one.refuses("192.0.2.1") is None
        for limiter in (one, other):
            storage: Any = limiter._strategy.storage
            await storage.bridge.storage.aclose()

    asyncio.run(ask())


@pytest.mark.parametrize("storage", ["redis://user:secret@127.0.0.1:port", "nonsense://user:secret@host", "memory"])
def test_a_storage_of_limits_that_cannot_be_is_refused_without_its_password(storage: str) -> None:
    with pytest.raises(RequestError, match="VRAMPLAN_RATE_LIMIT_STORAGE") as caught:
        RateLimiter("3/minute", storage)
    assert "secret" not in str(caught.value)


# -- Postgres that crashes ----------------------------------------------------------------------------------------------------------------


@NEEDS_POSTGRES
@pytest.mark.slow  # a server is set up, and recovers from a crash
def test_a_database_that_crashes_under_load_costs_no_answer_and_nothing_that_was_acknowledged() -> None:
    with postgres.serving() as server:
        settings = Configuration(database_url=server.url, rate_limit="none", max_concurrent=100)
        with TestClient(create_app(settings)) as one, TestClient(create_app(settings)) as other:
            database = Database(server.url)
            key = {"x-api-key": keys.create(database, "somebody", is_trusted=True)}
            estimates, posts, acknowledged = Counter[int](), Counter[int](), set[str]()
            plain, over = measured(), threading.Event()

            def ask(client: TestClient) -> None:
                while not over.is_set():
                    estimates[client.post("/v1/estimate", json=examples.QLORA).status_code] += 1

            def post(number: int) -> None:
                client = (one, other)[number % 2]
                while not over.is_set():
                    record = {**plain, "error": f"{number} {posts.total()}"}
                    response = client.post("/v1/calibrations", json=record, headers=key)
                    posts[response.status_code] += 1
                    if response.status_code in (200, 201):
                        acknowledged.add(response.json()["hash"])

            with ThreadPoolExecutor(4) as pool:
                running = [pool.submit(ask, one), *(pool.submit(post, number) for number in range(3))]
                until(lambda: posts[201] >= 5, seconds=60)
                server.restart(wait_seconds=0.5)
                before = posts[201]
                until(lambda: posts[201] >= before + 5, seconds=60)
                over.set()
                for one_running in running:
                    one_running.result()
            assert set(estimates) == {200}
            assert set(posts) <= {200, 201, 503}
            assert posts[503]
            assert one.get("/readyz").status_code == other.get("/readyz").status_code == 200
            with database.reading() as connection:
                kept = set(connection.execute(select(MEASUREMENTS.c.hash)).scalars())
            assert acknowledged <= kept
            database.close()
