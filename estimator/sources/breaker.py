"""A Hub that is down is not asked again and again: after some failures in a row it is left alone for a while."""

import math
import threading
import time
from collections.abc import Callable

from estimator.errors import SourceUnavailableError

MAX_REST_SECONDS = 300.0


class Breaker:
    """Counts failures in a row; safe to use from many threads.

    Args:
        failures: after which nothing is asked.
        rest_seconds: for how long; then one caller may try.
        clock: monotonic [s].
    """

    def __init__(self, *, failures: int = 5, rest_seconds: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._rest_seconds = rest_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._closed_until = -math.inf
        self._someone_tries = False

    @property
    def is_open(self) -> bool:
        """Whether the Hub is being left alone."""
        with self._lock:
            return self._clock() < self._closed_until

    def enter(self) -> None:
        """To be called before asking; `succeeded` or `failed` has to follow.

        Raises:
            SourceUnavailableError: if the Hub is being left alone.
        """
        with self._lock:
            remaining = self._closed_until - self._clock()
            if remaining > 0 or self._someone_tries:
                wait = max(1, math.ceil(remaining))
                raise SourceUnavailableError(
                    "model: the Hub has not answered lately and is left alone for a moment; try again, or paste the config.json",
                    field="model",
                    retry_after_seconds=wait,
                )
            self._someone_tries = self._failures >= self._limit

    def succeeded(self) -> None:
        """The Hub answered, if only with a refusal."""
        with self._lock:
            self._failures, self._someone_tries, self._closed_until = 0, False, -math.inf

    def failed(self, *, rest_seconds: float | None = None) -> None:
        """The Hub did not answer.

        Args:
            rest_seconds: how long it asked to be left alone, if it did.
        """
        with self._lock:
            self._failures += 1
            self._someone_tries = False
            if rest_seconds is not None:
                self._closed_until = self._clock() + min(rest_seconds, MAX_REST_SECONDS)
            elif self._failures >= self._limit:
                self._closed_until = self._clock() + self._rest_seconds
