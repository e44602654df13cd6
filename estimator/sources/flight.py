"""One call for all who ask the same while it runs."""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any


class SingleFlight:
    """Shares the result of a call between threads that ask for it at the same time; nothing is kept once it has ended."""

    def __init__(self) -> None:
        self._running: dict[Hashable, Future[Any]] = {}
        self._lock = threading.Lock()

    def once(self, key: Hashable, make: Callable[[], Any], *, timeout: float | None = None) -> Any:
        """The result of one call of `make`.

        Args:
            key: what callers share; whoever may not see another's result must have another key.
            make: called by the first.
            timeout: how long the others wait [s].

        Raises:
            TimeoutError: if the first caller takes longer than that.
            Exception: what `make` raised, for everyone.
        """
        with self._lock:
            running = self._running.get(key)
            if running is None:
                own = self._running[key] = Future()
        if running is not None:
            return running.result(timeout)
        try:
            own.set_result(make())
        except BaseException as error:
            own.set_exception(error)
        finally:
            with self._lock:
                del self._running[key]
        return own.result()
