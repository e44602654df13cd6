"""An application served on the loopback, for as long as a context lasts, and waiting for what it does."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import uvicorn

from app.connection import Connection


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


def until(holds: Callable[[], bool], *, seconds: float = 10) -> None:
    """Waits for what comes within some seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
