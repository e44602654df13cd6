"""Threads for what blocks: the loop stays free, and a question that waits for the Hub or a trace holds up no arithmetic."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from enum import StrEnum
from threading import BoundedSemaphore
from typing import Any, TypeVar

from starlette.requests import Request

from estimator.errors import SourceUnavailableError
from estimator.sources import catalogue

Result = TypeVar("Result")


class Pace(StrEnum):
    """What holds a call up."""

    QUICK = "quick"
    """Milliseconds of arithmetic."""
    WAITING = "waiting"
    """The Hub, or a process that builds models."""
    LONG = "long"
    """Seconds of arithmetic: plans, lists of cards, sweeps, all of bundled models."""


class Workers:
    """A set of threads for each pace, so that none waits for another.

    Args:
        threads: of the sets that are quick or waiting. Estimates are arithmetic that holds the interpreter's lock: more would only queue.
        long_threads: of the other.
        max_counted: calls that evaluate many runs, at whatever pace, under way or waiting; more are told to come back.
        timeout_seconds: after which a caller is told to come back; the thread ends by its own limits.
    """

    def __init__(self, *, threads: int = 8, long_threads: int = 4, max_counted: int = 16, timeout_seconds: float = 120.0) -> None:
        self._threads = {Pace.QUICK: threads, Pace.WAITING: threads, Pace.LONG: long_threads}
        self._pools: dict[Pace, ThreadPoolExecutor] = {}
        self._counted = BoundedSemaphore(max_counted)
        self._timeout_seconds = timeout_seconds

    async def run(self, call: Callable[[], Result], *, pace: Pace, is_counted: bool = False) -> Result:
        """The result of a blocking call.

        Args:
            call: sees the context variables of the caller.
            pace: what holds it up.
            is_counted: whether it evaluates many runs, of which only so many may be under way.

        Raises:
            SourceUnavailableError: if it takes too long, or too many counted ones are under way.
        """
        if (pool := self._pools.get(pace)) is None:
            pool = self._pools[pace] = ThreadPoolExecutor(self._threads[pace], thread_name_prefix=f"vramplan-{pace}")
        submitted = self._submit_counted(pool, call) if is_counted else pool.submit(copy_context().run, call)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await asyncio.wrap_future(submitted)
        except TimeoutError:
            raise SourceUnavailableError("the answer takes too long; try again later", retry_after_seconds=10) from None

    def _submit_counted(self, pool: ThreadPoolExecutor, call: Callable[[], Result]) -> "Future[Result]":
        if not self._counted.acquire(blocking=False):
            raise SourceUnavailableError("too many plans and sweeps are under way; try again in a moment", retry_after_seconds=5)
        try:
            submitted = pool.submit(copy_context().run, call)
        except BaseException:
            self._counted.release()
            raise
        # Counted until the thread is done, not until its caller has given up.
        submitted.add_done_callback(lambda _: self._counted.release())
        return submitted

    def close(self) -> None:
        """Drops what has not begun, and lets threads end. An application that is started again gets new ones."""
        pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown(wait=False, cancel_futures=True)


async def in_thread(request: Request, asked: Mapping[str, Any], call: Callable[[], Result], *, is_long: bool = False) -> Result:
    """The result of a blocking call, off the event loop.

    Args:
        request: whose application has the threads.
        asked: the question, as far as it tells how long the answer may take.
        call: to make.
        is_long: whether it evaluates many runs. Those that wait for the Hub or a trace hold up no plan of a bundled model.
    """
    workers: Workers = request.app.state.workers
    pace = Pace.WAITING if not is_bundled(asked) else Pace.LONG if is_long else Pace.QUICK
    return await workers.run(call, pace=pace, is_counted=is_long)


def is_bundled(asked: Mapping[str, Any]) -> bool:
    """Whether a question is about a bundled model, and so asks neither the Hub nor, mostly, a process that builds models."""
    model = asked.get("model")
    return (
        isinstance(model, str)
        and asked.get("revision") in (None, "main")
        and asked.get("engine") != "trace"
        and catalogue.find(model) is not None
    )
