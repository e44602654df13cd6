"""Threads for what blocks: the loop stays free, and what waits for the Hub, a trace or a database holds up nothing that does not."""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from enum import StrEnum
from functools import partial
from threading import BoundedSemaphore
from typing import Any, TypeVar

from starlette.requests import Request

from estimator.errors import SourceUnavailableError
from estimator.sources import catalogue
from estimator.sources.at_hand import NotAtHandError, only_at_hand

Result = TypeVar("Result")


class Need(StrEnum):
    """What a call may wait for beside the interpreter."""

    NOTHING = "nothing"
    """Arithmetic about a bundled model, or about no model."""
    TEXT = "text"
    """Files of trainers and pasted texts: a parser takes up to a second for one."""
    HUB = "hub"
    """A model that is looked up by its name, and then built."""
    BUILDER = "builder"
    """The process that builds models from pasted configs and traces steps, or something that is not known beforehand."""
    DATABASE = "database"
    """Measurements and corrections that are kept."""


class _Set:
    """Threads of one kind, and how many calls they may have.

    Args:
        name: of the threads.
        threads: at most; made as they are needed.
        max_calls: under way or waiting; None for any number.
    """

    def __init__(self, name: str, threads: int, max_calls: int | None) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"vramplan-{name}")
        self._places = BoundedSemaphore(max_calls) if max_calls is not None else None

    async def run(self, call: Callable[[], Result]) -> Result:
        """The result of a call.

        Raises:
            SourceUnavailableError: if there are as many as may be.
        """
        if (places := self._places) is None:
            return await asyncio.wrap_future(self._pool.submit(copy_context().run, call))
        if not places.acquire(blocking=False):
            raise SourceUnavailableError("too many such questions are under way; try again in a moment", retry_after_seconds=5)
        try:
            submitted = self._pool.submit(copy_context().run, call)
        except BaseException:
            places.release()
            raise
        # Counted until the thread is done, not until its caller has given up.
        submitted.add_done_callback(lambda _: places.release())
        return await asyncio.wrap_future(submitted)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Workers:
    """For each need two sets of threads, one for single runs and one for what evaluates many, so that none waits for another.

    Args:
        threads: of a set for single runs. Estimates are arithmetic that holds the interpreter's lock: more would only queue.
        long_threads: of a set for calls that evaluate many runs: plans, lists of cards, sweeps.
        max_long: calls of such a set under way or waiting; more are told to come back.
        max_waiting: the same of each set for single runs that may have to wait; those that need nothing are not counted. Four such sets and
            the three of plans (for nothing, the Hub, the builder) together have to stay below what the door lets in, see `Front`.
        timeout_seconds: after which a caller is told to come back; the thread ends by its own limits.
    """

    def __init__(
        self, *, threads: int = 8, long_threads: int = 4, max_long: int = 16, max_waiting: int = 32, timeout_seconds: float = 120.0
    ) -> None:
        self._threads, self._long_threads = threads, long_threads
        self._max_long, self._max_waiting = max_long, max_waiting
        self._sets: dict[tuple[Need, bool], _Set] = {}
        self._timeout_seconds = timeout_seconds

    async def run(self, call: Callable[[], Result], *, need: Need, is_long: bool = False) -> Result:
        """The result of a blocking call.

        Args:
            call: sees the context variables of the caller.
            need: what it may wait for.
            is_long: whether it evaluates many runs.

        Raises:
            SourceUnavailableError: if it takes too long, or too many of its kind are under way.
        """
        if (kind := self._sets.get((need, is_long))) is None:
            kind = self._sets[need, is_long] = self._set_for(need, is_long)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await kind.run(call)
        except TimeoutError:
            raise SourceUnavailableError("the answer takes too long; try again later", retry_after_seconds=10) from None

    def _set_for(self, need: Need, is_long: bool) -> _Set:
        if is_long:
            return _Set(f"{need}-long", self._long_threads, self._max_long)
        return _Set(need, self._threads, None if need is Need.NOTHING else self._max_waiting)

    def close(self) -> None:
        """Drops what has not begun, and lets threads end. An application that is started again gets new ones."""
        sets, self._sets = self._sets, {}
        for one in sets.values():
            one.close()


async def in_thread(request: Request, need: Need, call: Callable[[], Result], *, is_long: bool = False) -> Result:
    """The result of a blocking call, in the threads of the application that the request came to; see `Workers.run`.

    What was thought to need nothing, and turns out to need a trace or a model with another head, is begun anew where others wait for those.
    """
    workers: Workers = request.app.state.workers
    if need is Need.NOTHING:
        try:
            return await workers.run(partial(_at_hand, call), need=need, is_long=is_long)
        except NotAtHandError:
            need = Need.BUILDER
    return await workers.run(call, need=need, is_long=is_long)


def _at_hand(call: Callable[[], Result]) -> Result:
    with only_at_hand():
        return call()


def need_of(asked: Mapping[str, Any]) -> Need:
    """What a question may have to wait for, as far as it shows."""
    model, engine = asked.get("model"), asked.get("engine")
    if not isinstance(model, str) or not model or engine == "trace":
        return Need.BUILDER
    is_bundled = asked.get("revision") in (None, "main") and catalogue.find(model) is not None
    return Need.NOTHING if is_bundled else Need.HUB
