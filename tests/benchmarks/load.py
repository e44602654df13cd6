"""The service under load, beside a bare FastAPI endpoint of the same run: `python -m tests.benchmarks.load`.

The service is the one that `vramplan serve` starts. The bare endpoint validates the same request with the same pydantic model, and returns
a document of the same size. Warm means that a question was asked before; a few questions take turns. What a new
question costs is printed too. On a machine with two cores the clients take one of them. Rates are those of `wrk` where it is installed
(Debian: `apt install wrk`), else of a client of our own, which takes more of its core; fixed rates and floods are that client's.
"""

import asyncio
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from typing import Annotated, Any

import orjson

from app import examples
from app.request import Request
from app.service import answer
from estimator.units import MIB
from tests.served import Process, growth

SECONDS = float(os.environ.get("VRAMPLAN_LOAD_SECONDS", "8"))
GOAL_RATIO, GOAL_P99_MS = 0.7, 50.0
QUESTIONS = 16
FLOOD = 640
"""Connections at once."""
FLOODED = 30_000
"""Requests at least between two looks at the memory: a leak first fills what the first flood leaves free in the pools, a few MiB."""
MAX_GROWTH_BYTES = MIB // 2
"""Seven floods of 6,000 requests, one after the other, took not a page more after the first: whatever grows is kept of requests. A dict of
one entry kept of each breaks it."""
WRK = shutil.which("wrk")

_DOCUMENT = answer(examples.QLORA)


def bare() -> Any:
    """The application to compare with."""
    from fastapi import Body, FastAPI, Response

    application = FastAPI()

    @application.post("/v1/estimate")
    async def estimate(asked: Annotated[Request, Body()]) -> Response:
        assert asked.model
        return Response(orjson.dumps(_DOCUMENT), media_type="application/json")

    return application


def main() -> None:
    """Prints one line per measurement."""
    print(f"documents of {len(orjson.dumps(_DOCUMENT)):,} bytes, {SECONDS:g} s each, {os.cpu_count()} cores")
    with Process("uvicorn", "--factory", "tests.benchmarks.load:bare", "--no-access-log", "--log-level", "warning") as server:
        reference = rate(server.port)
    print(f"{'rates are those of':<64}{'wrk' if WRK else 'our own client':>9}")
    print(f"{'bare FastAPI: validates, returns a document of that size':<64}{reference:>9.0f} /s")
    with _service("1000000/second") as server:
        new = run(server.port, connections=1, seconds=SECONDS)
        print(f"{'a question not asked before: median':<64}{statistics.median(new.in_order_ms[:QUESTIONS]):>9.1f} ms")
        warm_up(server.port)
        ours = rate(server.port)
        print(f"{'warm POST /v1/estimate':<64}{ours:>9.0f} /s   {ours / reference:.2f} × (goal {GOAL_RATIO} ×)")
        half = run(server.port, connections=4, per_second=ours / 2)
        print(f"{'at half that load: 99th percentile':<64}{half.quantile(0.99):>9.1f} ms   (goal {GOAL_P99_MS:g} ms)")
    # As a service that lets in half of what it can do: the rest is told to come back.
    with _service(f"{max(1, round(ours / 2))}/second") as server:
        warm_up(server.port)
        run(server.port, connections=FLOOD)  # takes once what so many connections take: their buffers, and the allocator's pools for them
        before = server.resident_bytes
        flood = run(server.port, connections=FLOOD)
        num_requests = flood.statuses.total()
        while num_requests < FLOODED:
            num_requests += run(server.port, connections=FLOOD).statuses.total()
        after = server.resident_bytes
        served = flood.statuses.get(200, 0)
        others = {status: count for status, count in flood.statuses.items() if status != 200}
        print(f"{f'{FLOOD} connections: served':<64}{served / flood.seconds:>9.0f} /s   others {others}")
        print(f"{f'{FLOOD} connections: 99th percentile of those served':<64}{flood.quantile(0.99):>9.1f} ms")
        print(f"{'resident after one such flood':<64}{before / MIB:>9.2f} MiB, {num_requests:,} requests later {after / MIB:.2f} MiB")
    if (broken := growth(before, after, num_requests, MAX_GROWTH_BYTES)) is not None:
        raise SystemExit(f"memory is not flat: {broken}")


def _service(rate_limit: str) -> Process:
    return Process(database_url="none", rate_limit=rate_limit, log_level="warning")


class Load:
    """What came of a load."""

    def __init__(self, statuses: Counter[int], served_ms: list[float], seconds: float) -> None:
        self.statuses, self.in_order_ms, self.served_ms, self.seconds = statuses, served_ms, sorted(served_ms), seconds

    @property
    def rate(self) -> float:
        """Answers with 200 a second."""
        return self.statuses.get(200, 0) / self.seconds

    def quantile(self, share: float) -> float:
        """Of the time until those answers were whole [ms]."""
        if len(self.served_ms) < 2:
            return float("nan")
        return statistics.quantiles(self.served_ms, n=1000)[round(1000 * share) - 1]


def warm_up(port: int) -> None:
    """Every question is asked before it counts."""
    while sum(run(port, connections=4).statuses.values()) < 4 * QUESTIONS:
        pass


def rate(port: int, connections: int = 8) -> float:
    """Warm answers a second, as fast as they come."""
    if not WRK:
        return run(port, connections=connections).rate
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        bodies = ", ".join(f"[==[{_request(number).decode()}]==]" for number in range(QUESTIONS))
        script.write(f"local sent, bodies = 0, {{{bodies}}}\nfunction request() sent = sent + 1; return bodies[sent % #bodies + 1] end\n")
        script.flush()
        command = [WRK, "-t1", f"-c{connections}", f"-d{SECONDS:g}s", "-s", script.name, f"http://127.0.0.1:{port}"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "Non-2xx" in said or (found := re.search(r"Requests/sec:\s*([\d.]+)", said)) is None:
        raise SystemExit(f"not all was answered:\n{said}")
    return float(found.group(1))


def run(port: int, *, connections: int, per_second: float | None = None, seconds: float = SECONDS) -> Load:
    """Sends requests from a process of its own, each connection one after the other."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        statuses, served, taken = pool.apply(_client, (port, connections, per_second, seconds))
    return Load(statuses, served, taken)


def _client(port: int, connections: int, per_second: float | None, seconds: float) -> tuple[Counter[int], list[float], float]:
    return asyncio.run(_send(port, connections, per_second, seconds))


async def _send(port: int, connections: int, per_second: float | None, seconds: float) -> tuple[Counter[int], list[float], float]:
    statuses: Counter[int] = Counter()
    served: list[float] = []
    bodies = [_request(number) for number in range(QUESTIONS)]
    start = time.perf_counter()

    async def one(index: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        number = index * 7919
        due = start + (index / per_second if per_second else 0.0)
        try:
            while (now := time.perf_counter()) < start + seconds:
                if per_second and due > now:
                    await asyncio.sleep(due - now)
                # with a rate the clock starts when the request is due: waiting for a slow answer before it counts too
                begun = due if per_second else time.perf_counter()
                due += connections / per_second if per_second else 0.0
                writer.write(bodies[number % len(bodies)])
                number += 1
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                status = int(head[9:12])
                statuses[status] += 1
                if status == 200:
                    served.append(1000 * (time.perf_counter() - begun))
                else:
                    await asyncio.sleep(0.05)  # a client that is told to come back does not come back at once
        finally:
            writer.close()

    await asyncio.gather(*(one(index) for index in range(connections)))
    return statuses, served, time.perf_counter() - start


def _request(number: int) -> bytes:
    training = {
        **examples.QLORA["training"],
        "per_device_train_batch_size": 1 + number % 4,
        "max_length": 512 * (1 + number // 4),
    }
    # what pydantic alone accepts: fields that are only set aside are left out
    peft = {"r": 16, "target_modules": examples.QLORA["peft"]["target_modules"]}
    body = orjson.dumps({**examples.QLORA, "peft": peft, "training": training})
    head = f"POST /v1/estimate HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


if __name__ == "__main__":
    main()
