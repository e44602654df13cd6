"""Threads for what blocks: the loop stays free, and a question that waits for the Hub or a trace holds up no arithmetic."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from estimator.errors import SourceUnavailableError

Result = TypeVar("Result")


class Workers:
    """Two sets of threads.

    Args:
        threads: of each set. Estimates are arithmetic that holds the interpreter's lock: more would only queue there.
        timeout_seconds: after which a caller is told to come back; the thread ends by its own limits.
    """

    def __init__(self, *, threads: int = 8, timeout_seconds: float = 120.0) -> None:
        self._quick = ThreadPoolExecutor(threads, thread_name_prefix="vramplan-quick")
        self._slow = ThreadPoolExecutor(threads, thread_name_prefix="vramplan-slow")
        self._timeout_seconds = timeout_seconds

    async def run(self, call: Callable[[], Result], *, is_quick: bool) -> Result:
        """The result of a blocking call.

        Args:
            call: sees the context variables of the caller.
            is_quick: whether it asks neither the Hub nor a process that builds models.

        Raises:
            SourceUnavailableError: if it takes too long.
        """
        pool = self._quick if is_quick else self._slow
        future = asyncio.wrap_future(pool.submit(copy_context().run, call))
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await future
        except TimeoutError:
            raise SourceUnavailableError("the answer takes too long; try again later", retry_after_seconds=10) from None

    def close(self) -> None:
        """Takes no more work; what has not begun is dropped."""
        for pool in (self._quick, self._slow):
            pool.shutdown(wait=False, cancel_futures=True)
