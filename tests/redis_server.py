"""A Redis server of one's own, from the distribution's packages, for as long as a context lasts."""

import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_START_SECONDS = 30.0


def why_not() -> str | None:
    """What keeps a server from being started and asked here; None if nothing does."""
    if shutil.which("redis-server") is None:
        return "no Redis server is installed (Debian: apt-get install redis-server)"
    if importlib.util.find_spec("redis") is None:
        return "redis-py is not installed: `make install-test`"
    return None


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def serving() -> Iterator[Server]:
    """A fresh server on the loopback that keeps nothing on disk."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd="/")
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the Redis server does not start")
            time.sleep(0.02)
        yield Server(url=f"redis://127.0.0.1:{port}", process=process)
    finally:
        process.kill()
        process.wait()
