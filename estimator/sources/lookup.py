"""The Hub as a service asks it: nothing twice, nothing while it is down, and what is public from before where it does not answer."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol

from estimator.errors import AccessDeniedError, ModelNotFoundError, SourceError, SourceUnavailableError
from estimator.sources import hub, safetensors
from estimator.sources.access import Access
from estimator.sources.breaker import Breaker
from estimator.sources.flight import SingleFlight
from estimator.sources.hub import HubConfig
from estimator.sources.safetensors import Files
from estimator.sources.transport import Answer, Fetch, get, too_slow

FRESH_SECONDS = 600.0
STALE_SECONDS = 7 * 86_400.0
FILE_HOSTS = ("*.huggingface.co", "*.hf.co")
"""Where the Hub keeps large files: `cdn-lfs.huggingface.co`, `cas-bridge.xethub.hf.co`, by region."""

Place = tuple[str, str, str]
"""Endpoint, id and revision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A public config from before."""

    found: HubConfig
    kept_at: float
    """Seconds since 1970."""


class PublicStore(Protocol):
    """Where public configs and file headers are kept. Nothing that a token opened is ever handed to it."""

    def config(self, place: Place) -> Kept | None:
        """The config kept of a place."""

    def keep_config(self, place: Place, found: HubConfig) -> None:
        """Keeps a config."""

    def forget_config(self, place: Place) -> None:
        """Forgets what is no longer public."""

    def files(self, place: Place) -> Files | None:
        """The headers kept of a commit."""

    def keep_files(self, place: Place, files: Files) -> None:
        """Keeps headers."""


class MemoryStore:
    """In this process, the newest few hundred."""

    def __init__(self, *, max_entries: int = 256) -> None:
        self._max_entries = max_entries
        self._configs: OrderedDict[Place, Kept] = OrderedDict()
        self._files: OrderedDict[Place, Files] = OrderedDict()
        self._lock = threading.Lock()

    def config(self, place: Place) -> Kept | None:
        with self._lock:
            return self._configs.get(place)

    def keep_config(self, place: Place, found: HubConfig) -> None:
        self.keep(place, Kept(found=found, kept_at=time.time()))

    def keep(self, place: Place, kept: Kept) -> None:
        """Keeps what was kept elsewhere before."""
        with self._lock:
            self._configs[place] = kept
            self._configs.move_to_end(place)
            while len(self._configs) > self._max_entries:
                self._configs.popitem(last=False)

    def forget_config(self, place: Place) -> None:
        with self._lock:
            self._configs.pop(place, None)

    def files(self, place: Place) -> Files | None:
        with self._lock:
            return self._files.get(place)

    def keep_files(self, place: Place, files: Files) -> None:
        with self._lock:
            self._files[place] = files
            while len(self._files) > self._max_entries:
                self._files.popitem(last=False)


def _unobserved(_: str) -> None:
    pass


class Lookup:
    """Asks the Hub; safe to use from many threads.

    Args:
        store: of what is public; in memory if None.
        breaker: shared by all that is asked.
        endpoint: address of the Hub; `HF_ENDPOINT` at each question if None.
        deadline_seconds: for everything that one question asks of the Hub [s].
        fresh_seconds: for which a kept public config is not asked for again [s].
        stale_seconds: for which it stands in where the Hub does not answer [s].
        file_hosts: patterns of hosts that the Hub may redirect to for files.
        observe: told what became of each question: `kept`, `asked`, `stale`, `refused`, `failed`.
    """

    def __init__(
        self,
        *,
        store: PublicStore | None = None,
        breaker: Breaker | None = None,
        endpoint: str | None = None,
        deadline_seconds: float = hub.DEADLINE_SECONDS,
        fresh_seconds: float = FRESH_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        file_hosts: tuple[str, ...] = FILE_HOSTS,
        observe: Callable[[str], None] = _unobserved,
    ) -> None:
        self._store: PublicStore = store if store is not None else MemoryStore()
        self.breaker = breaker if breaker is not None else Breaker()
        self._endpoint = endpoint
        self._deadline_seconds = deadline_seconds
        self._fresh_seconds = fresh_seconds
        self._stale_seconds = stale_seconds
        self._file_hosts = file_hosts
        self._observe = observe
        self._flights = SingleFlight()

    def config(self, model_id: str, revision: str | None, access: Access) -> HubConfig:
        """The config of a model, of the Hub or kept from before.

        Raises:
            as `hub.fetch`.
        """
        place = self._place(model_id, revision)
        revision = place[2]
        kept = self._store.config(place)
        age = time.time() - kept.kept_at if kept is not None else 0.0
        if kept is not None and age <= self._fresh_seconds:
            self._observe("kept")
            return kept.found
        try:
            found = hub.fetch(
                model_id, revision, access=access, endpoint=self._address, deadline_seconds=self._deadline_seconds, ask=self._ask
            )
        except SourceUnavailableError:
            if kept is None or age > self._stale_seconds:
                self._observe("failed")
                raise
            self._observe("stale")
            return replace(kept.found, is_stale=True)
        except SourceError as error:
            self._observe("refused")
            if isinstance(error, ModelNotFoundError | AccessDeniedError):
                self._store.forget_config(place)
            raise
        self._observe("asked")
        if not found.is_public:
            self._store.forget_config(place)
        elif found.has_commit:
            self._store.keep_config(place, found)
        return found

    def kept(self, model_id: str, revision: str | None) -> HubConfig | None:
        """A public config that is fresh; nothing is asked.

        Raises:
            RequestError: for an id or a revision of another form.
        """
        kept = self._store.config(self._place(model_id, revision))
        return kept.found if kept is not None and time.time() - kept.kept_at <= self._fresh_seconds else None

    def _place(self, model_id: str, revision: str | None) -> Place:
        hub.check_id(model_id)
        return self._address, model_id, hub.check_revision(revision) if revision is not None else hub.DEFAULT_REVISION

    def files(self, model_id: str, found: HubConfig, access: Access) -> Files:
        """What the safetensors files of a config's commit hold.

        Args:
            model_id: of the config.
            found: the config; where the Hub named no commit, config and files could be of two states, and are refused.

        Raises:
            ModelNotFoundError: if there are no such files.
            SourceError: if they are malformed, or cannot be had.
        """
        if not found.has_commit:
            raise SourceError("model: the Hub names no commit, so its files cannot be told to belong to the config", field="model")
        place = (self._address, model_id, found.revision)
        if found.is_public and (kept := self._store.files(place)) is not None:
            return kept
        token = None if found.is_public else access.secret
        deadline = time.monotonic() + self._deadline_seconds

        def read_file(name: str, byte_range: tuple[int, int] | None, max_bytes: int) -> bytes:
            fetch = Fetch(
                url=hub.file_url(self._address, model_id, found.revision, name),
                token=token,
                max_bytes=max_bytes,
                byte_range=byte_range,
                file_hosts=self._file_hosts,
                name=name,
            )
            answer = self._ask(fetch, deadline)
            if answer.status == 404:
                raise ModelNotFoundError(f"model: {model_id!r} has no {name}", field="model")
            if not answer.is_ok:
                raise hub.refusal(model_id, found.revision, answer, access)
            return answer.body

        files = safetensors.read(read_file)
        if found.is_public:
            self._store.keep_files(place, files)
        return files

    @property
    def _address(self) -> str:
        return self._endpoint.rstrip("/") if self._endpoint is not None else hub.endpoint_in_use()

    def _ask(self, fetch: Fetch, deadline: float) -> Answer:
        """One answer for all who ask the same with the same token at the same time."""
        scope = Access(token=fetch.token, uses_environment=False).scope
        key = (fetch.url, fetch.byte_range, scope)
        try:
            answer = self._flights.once(key, lambda: self._guarded(fetch, deadline), timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise too_slow() from None
        assert isinstance(answer, Answer)
        return answer

    def _guarded(self, fetch: Fetch, deadline: float) -> Answer:
        self.breaker.enter()
        try:
            answer = get(fetch, deadline)
        except SourceUnavailableError:
            self.breaker.failed()
            raise
        except SourceError:  # it answered, if only nonsense
            self.breaker.succeeded()
            raise
        except BaseException:
            self.breaker.failed()
            raise
        if answer.status == 429:
            self.breaker.failed(rest_seconds=answer.retry_after_seconds or 30)
        elif answer.status >= 500:
            self.breaker.failed()
        else:
            self.breaker.succeeded()
        return answer


@cache
def default_lookup() -> Lookup:
    """The lookup of this program."""
    return Lookup()
