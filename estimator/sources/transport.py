"""One answer of the Hub: with a deadline over everything, a bound on its size, and redirects that lead nowhere unforeseen."""

import queue
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from urllib.parse import SplitResult, urljoin, urlsplit

from estimator.errors import SourceError, SourceUnavailableError
from estimator.sources.breaker import MAX_REST_SECONDS

MAX_REDIRECTS = 3
MAX_TRIES = 3
# Before the second and the third try, and up to as much again at random.
_PAUSE_SECONDS = 0.15
_PASSING_STATUS = (500, 502, 503, 504)
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """What to get, and how much of it."""

    url: str
    token: str | None = None
    """Sent to the host of `url` alone."""
    max_bytes: int
    byte_range: tuple[int, int] | None = None
    """First and last byte."""
    file_hosts: tuple[str, ...] = ()
    """Patterns of other hosts that a redirect may lead to, by https and without the token."""
    name: str = "config.json"
    """Of the file, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the Hub answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_ok(self) -> bool:
        return self.status in (200, 206)

    @property
    def retry_after_seconds(self) -> int | None:
        """How long the Hub asks to be left alone, in whole seconds; None where it does not say."""
        given = self.headers.get("retry-after", "")
        return min(int(given), int(MAX_REST_SECONDS)) if re.fullmatch(r"\d{1,9}", given) else None


def get(fetch: Fetch, deadline: float) -> Answer:
    """The answer; what fails in passing is tried again while there is time.

    Args:
        fetch: what to get.
        deadline: of `time.monotonic` [s].

    Raises:
        SourceUnavailableError: if the Hub cannot be reached, or not in time.
        SourceError: if its answer makes no sense.
    """
    for attempt in range(1, MAX_TRIES + 1):
        pause = _PAUSE_SECONDS * 2 ** (attempt - 1) * (1 + random.random())
        is_last = attempt == MAX_TRIES or time.monotonic() + pause >= deadline
        try:
            answer = _in_time(fetch, deadline)
        except _Unreachable:
            if is_last:
                raise
        else:
            if answer.status not in _PASSING_STATUS or is_last:
                return answer
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


class _Unreachable(SourceUnavailableError):
    """No connection, or one that broke."""


def _in_time(fetch: Fetch, deadline: float) -> Answer:
    """`_request` in a thread of its own, left behind at the deadline: a client's timeouts start anew with every byte that drips in."""
    answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_request(fetch, deadline))
        except Exception as error:  # carried over to the caller's thread
            answers.put(error)

    threading.Thread(target=ask, daemon=True, name="vramplan-hub").start()
    try:
        answer = answers.get(timeout=_remaining(deadline))
    except queue.Empty:
        raise too_slow() from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _request(fetch: Fetch, deadline: float) -> Answer:
    # Imported here because the catalogue needs no HTTP.
    from huggingface_hub import get_session

    # Not `build_hf_headers`: it asks the Hub a question of its own first, and reads the token that a login left on disk.
    headers = {"user-agent": "vramplan"}
    if fetch.token is not None:
        headers["authorization"] = f"Bearer {fetch.token}"
    if fetch.byte_range is not None:
        # A compressed answer has no bytes of the file to count.
        headers |= {"range": "bytes={}-{}".format(*fetch.byte_range), "accept-encoding": "identity"}
    session = get_session()
    http = import_module(type(session).__module__.partition(".")[0])  # httpx2, or httpx for huggingface_hub 1
    url, seen = fetch.url, dict[str, str]()
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with session.stream("GET", url, headers=headers, timeout=_remaining(deadline), follow_redirects=False) as response:
                location = response.headers.get("location")
                if response.status_code in _REDIRECTS and location:
                    # The Hub names the commit where it redirects; the host of the file does not.
                    seen |= {name: value for name, value in response.headers.items() if name.startswith("x-repo-")}
                    target = _target(url, location, fetch.file_hosts)
                    if urlsplit(target)[:2] != urlsplit(url)[:2]:
                        headers.pop("authorization", None)
                    url = target
                    continue
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    _remaining(deadline)
                    if len(body) > fetch.max_bytes:
                        raise SourceError(f"model: the Hub's {fetch.name} has more than {fetch.max_bytes} bytes", field="model")
                return Answer(status=response.status_code, headers={**seen, **_lowered(response.headers)}, body=bytes(body))
    except http.TimeoutException:
        raise too_slow() from None
    except http.HTTPError as error:
        raise _Unreachable(f"model: the Hub cannot be reached ({type(error).__name__}); paste the config.json", field="model") from None
    except (http.InvalidURL, UnicodeError):
        raise SourceError("model: the Hub redirects to what is no address", field="model") from None
    raise SourceError("model: the Hub redirects in circles", field="model")


def _lowered(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise too_slow()
    return remaining


def too_slow() -> SourceUnavailableError:
    """The error for a deadline that has passed."""
    return SourceUnavailableError("model: the Hub did not answer in time; try again, or paste the config.json", field="model")


def _target(url: str, location: str, file_hosts: tuple[str, ...]) -> str:
    """Where a redirect leads: the same host, or for files a host that is known to keep them.

    A stranger's answer must not choose what is fetched.
    """
    target = urljoin(url, location)
    parts = urlsplit(target)
    if parts[:2] == urlsplit(url)[:2] or _keeps_files(parts, file_hosts):
        return target
    raise SourceError("model: the Hub redirects to another host", field="model")


def _keeps_files(parts: SplitResult, file_hosts: tuple[str, ...]) -> bool:
    """Whether one of the patterns stands for the host; `http://…` in a pattern lets plain HTTP in, for mirrors on the loopback."""
    name = parts.netloc.lower()
    schemes = {"https": "", "http": "http://"}
    return parts.username is None and parts.scheme in schemes and any(fnmatchcase(schemes[parts.scheme] + name, p) for p in file_hosts)
