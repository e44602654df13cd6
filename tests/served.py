"""An application served on the loopback, in this process or in one of its own, and waiting for what it does."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import psutil
import uvicorn

from app.connection import Connection
from estimator.units import MIB


@contextmanager
def serving(app: Any, *, lifespan: Literal["on", "off"] = "off", idle_seconds: int = 15) -> Iterator[str]:
    """The address of the application.

    Args:
        app: an ASGI application.
        lifespan: whether what it does at its start and end is done.
        idle_seconds: for which a connection may rest.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(
            uvicorn.Config(app, http=Connection, ws="none", timeout_keep_alive=idle_seconds, log_level="warning", lifespan=lifespan)
        )
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


class Process:
    """A process that serves, as a module of Python with its arguments; `app serve` is what `vramplan serve` starts.

    Args:
        module, arguments: of the command, without the port.
        settings: of the service, without their prefix, in lower case.
    """

    def __init__(self, module: str = "app", *arguments: str, **settings: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", module, *(arguments or ("serve",)), "--port", str(self.port)]
        environment = {**os.environ, **{f"VRAMPLAN_{name.upper()}": value for name, value in settings.items()}}
        self._process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        self._seen = psutil.Process(self._process.pid)
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise SystemExit(f"{' '.join(command[2:])} does not start") from None
                time.sleep(0.05)
            else:
                break

    @property
    def resident_bytes(self) -> int:
        """Of the process alone, without the one that builds models [bytes]."""
        return int(self._seen.memory_info().rss)

    @property
    def processor_seconds(self) -> float:
        """Spent so far, by the process alone [s]."""
        times = self._seen.cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def growth(before_bytes: int, after_bytes: int, num_requests: int, limit_bytes: int) -> str | None:
    """A sentence if a process took more memory by the requests than it may; None if it did not.

    Args:
        before_bytes: resident after a warm-up [bytes].
        after_bytes: resident after the run [bytes].
        num_requests: of the run, without the warm-up.
        limit_bytes: of what it may have taken meanwhile [bytes].
    """
    grown = after_bytes - before_bytes
    if grown <= limit_bytes:
        return None
    return (
        f"the serving process held {before_bytes / MIB:.1f} MiB after its warm-up, and {grown / MIB:.1f} MiB more after {num_requests:,} "
        f"requests: {grown / max(1, num_requests):,.0f} bytes for each; accepted: {limit_bytes / MIB:.1f} MiB in all"
    )


class Watch:
    """Resident memory of a process over a long run, whose first half is the warm-up. A run of fewer than 1,000 requests is noted and never
    complained of, so that a test which asks so seldom tells nothing about memory.

    Args:
        process: that serves.
        limit_bytes: of what it may take in the second half [bytes].
    """

    _FEWEST = 1000
    """Requests: fewer leave caches half empty and modules not imported, and are not judged."""

    def __init__(self, process: Process, limit_bytes: int) -> None:
        self._process, self._limit_bytes = process, limit_bytes
        self._samples: list[int] = []

    def note(self) -> None:
        """After every request."""
        self._samples.append(self._process.resident_bytes)

    @property
    def complaint(self) -> str | None:
        """See `growth`; None too where there were too few requests to judge."""
        number, half = len(self._samples), len(self._samples) // 2
        if number < self._FEWEST:
            return None
        return growth(self._samples[half], self._samples[-1], number - half - 1, self._limit_bytes)


def until(holds: Callable[[], bool], *, seconds: float = 10) -> None:
    """Waits for what comes within some seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
