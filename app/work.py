"""Threads for what blocks: the loop stays free, and a question that waits for the Hub or a trace holds up no arithmetic."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from starlette.requests import Request

from estimator.errors import SourceUnavailableError
from estimator.sources import catalogue

Result = TypeVar("Result")


class Workers:
    """Two sets of threads.

    Args:
        threads: of each set. Estimates are arithmetic that holds the interpreter's lock: more would only queue there.
        timeout_seconds: after which a caller is told to come back; the thread ends by its own limits.
    """

    def __init__(self, *, threads: int = 8, timeout_seconds: float = 120.0) -> None:
        self._threads = threads
        self._pools: dict[bool, ThreadPoolExecutor] = {}
        self._timeout_seconds = timeout_seconds

    async def run(self, call: Callable[[], Result], *, is_quick: bool) -> Result:
        """The result of a blocking call.

        Args:
            call: sees the context variables of the caller.
            is_quick: whether it asks neither the Hub nor a process that builds models.

        Raises:
            SourceUnavailableError: if it takes too long.
        """
        if (pool := self._pools.get(is_quick)) is None:
            name = "vramplan-quick" if is_quick else "vramplan-slow"
            pool = self._pools[is_quick] = ThreadPoolExecutor(self._threads, thread_name_prefix=name)
        future = asyncio.wrap_future(pool.submit(copy_context().run, call))
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await future
        except TimeoutError:
            raise SourceUnavailableError("the answer takes too long; try again later", retry_after_seconds=10) from None

    def close(self) -> None:
        """Drops what has not begun, and lets threads end. An application that is started again gets new ones."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


async def in_thread(request: Request, asked: Mapping[str, Any], call: Callable[[], Result]) -> Result:
    """The result of a blocking call, off the event loop.

    Args:
        request: whose application has the threads.
        asked: the question, as far as it tells how long the answer may take.
        call: to make.
    """
    workers: Workers = request.app.state.workers
    return await workers.run(call, is_quick=is_bundled(asked))


def is_bundled(asked: Mapping[str, Any]) -> bool:
    """Whether a question is about a bundled model, and so asks neither the Hub nor, mostly, a process that builds models."""
    model = asked.get("model")
    return (
        isinstance(model, str)
        and asked.get("revision") in (None, "main")
        and asked.get("engine") != "trace"
        and catalogue.find(model) is not None
    )
