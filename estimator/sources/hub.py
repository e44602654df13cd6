"""A model's config.json from the Hugging Face Hub: one small file, with a deadline, and never written to disk."""

import os
import queue
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from estimator.errors import AccessDeniedError, ModelNotFoundError, RequestError, SourceError, SourceUnavailableError
from estimator.sources import bounds, configfile

DEADLINE_SECONDS = 8.0
MAX_REDIRECTS = 3

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]{0,126}[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


_Answer = tuple[int, Mapping[str, str], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """A config as the Hub has it."""

    config: dict[str, Any]
    revision: str
    """The commit, where the Hub names it; else the revision asked for."""
    is_public: bool
    """Whether it was read without a token: only then may anything made from it be stored."""


def check_id(model_id: str) -> str:
    """The id, if it is of the form that the Hub accepts.

    Raises:
        RequestError: if it is not.
    """
    if not _ID.fullmatch(model_id) or ".." in model_id or "--" in model_id or model_id.endswith(".git"):
        raise RequestError(f"model: {model_id[:120]!r} is not a model id; expected for instance 'meta-llama/Llama-3.1-8B'", field="model")
    return model_id


def check_revision(revision: str) -> str:
    """The revision, if it can be a branch, a tag or a commit.

    Raises:
        RequestError: if it cannot.
    """
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision:
        raise RequestError(f"revision: {revision[:120]!r} is not a branch, tag or commit", field="revision")
    return revision


def fetch(
    model_id: str,
    revision: str | None = None,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> HubConfig:
    """The checked config of a model on the Hub.

    Asked without a token first; a token is only sent where the Hub demands one, and what it opens is marked as not public.

    Args:
        model_id: `owner/name`.
        revision: branch, tag or commit; the default branch if None.
        token: access token; `HF_TOKEN` of the environment if None.
        endpoint: address of the Hub; `HF_ENDPOINT` of the environment if None.
        deadline_seconds: for everything together [s].

    Raises:
        RequestError: if the id or revision is malformed.
        ModelNotFoundError: if there is no such model, revision or config.json.
        AccessDeniedError: if it is gated or private and the token (or its absence) does not open it.
        SourceUnavailableError: if the Hub is down, too slow, unreachable, or this program is told to be offline.
        SourceError: if the Hub's answer makes no sense.
        ConfigError: if the config is out of bounds.
    """
    check_id(model_id)
    revision = check_revision(revision) if revision is not None else "main"
    if _truthy(os.environ.get("HF_HUB_OFFLINE")):
        raise SourceUnavailableError(
            f"model: {model_id!r} is not in the catalogue, and HF_HUB_OFFLINE is set; paste its config.json", field="model"
        )
    token = token or os.environ.get("HF_TOKEN") or None
    base = (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{base}/{model_id}/resolve/{quote(revision, safe='')}/config.json"
    deadline = time.monotonic() + deadline_seconds
    status, headers, body = _get(url, {}, deadline)
    is_public = True
    if status in (401, 403) and token:
        is_public = False
        status, headers, body = _get(url, {"authorization": f"Bearer {token}"}, deadline)
    if status != 200:
        raise _refusal(model_id, revision, status, headers, has_token=token is not None)
    commit = headers.get("x-repo-commit", "")
    if not body.lstrip().startswith(b"{"):
        raise SourceError(f"model: the Hub's answer for {model_id!r} is no config.json", field="model")
    return HubConfig(config=configfile.parse(body), revision=commit if _COMMIT.fullmatch(commit) else revision, is_public=is_public)


def _get(url: str, authorization: dict[str, str], deadline: float) -> _Answer:
    """`_request` in a thread of its own, left behind at the deadline: a client's timeouts start anew with every byte that drips in."""
    answers: queue.SimpleQueue[_Answer | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_request(url, authorization, deadline))
        except Exception as error:  # carried over to the caller's thread
            answers.put(error)

    threading.Thread(target=ask, daemon=True, name="vramplan-hub").start()
    try:
        answer = answers.get(timeout=_remaining(deadline))
    except queue.Empty:
        raise _too_slow() from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _request(url: str, authorization: dict[str, str], deadline: float) -> _Answer:
    """Status, headers and at most `bounds.MAX_BYTES` of the body; redirects only within the host."""
    # Imported here because the catalogue needs no HTTP.
    from huggingface_hub import get_session

    # Not `build_hf_headers`: it asks the Hub a question of its own first, and reads the token that a login left on disk.
    headers = {"user-agent": "vramplan", **authorization}
    session = get_session()
    http = import_module(type(session).__module__.partition(".")[0])  # httpx2, or httpx for huggingface_hub 1
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with session.stream("GET", url, headers=headers, timeout=_remaining(deadline), follow_redirects=False) as response:
                location = response.headers.get("location")
                if response.status_code in (301, 302, 303, 307, 308) and location:
                    url = _same_host(url, location)
                    continue
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    _remaining(deadline)
                    if len(body) > bounds.MAX_BYTES:
                        raise SourceError(f"model: the Hub's config.json has more than {bounds.MAX_BYTES} bytes", field="model")
                return response.status_code, response.headers, bytes(body)
    except http.TimeoutException:
        raise _too_slow() from None
    except (http.HTTPError, http.InvalidURL) as error:
        raise SourceUnavailableError(
            f"model: the Hub cannot be reached ({type(error).__name__}); paste the config.json", field="model"
        ) from None
    raise SourceError("model: the Hub redirects in circles", field="model")


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise _too_slow()
    return remaining


def _too_slow() -> SourceUnavailableError:
    return SourceUnavailableError("model: the Hub did not answer in time; try again, or paste the config.json", field="model")


def _same_host(url: str, location: str) -> str:
    """Where a redirect leads, if it stays on the host: a token must not leave it, nor may a stranger's answer choose what we fetch."""
    target = urljoin(url, location)
    if urlsplit(target)[:2] != urlsplit(url)[:2]:
        raise SourceError("model: the Hub redirects to another host", field="model")
    return target


def _refusal(model_id: str, revision: str, status: int, headers: Mapping[str, str], *, has_token: bool) -> SourceError:
    """The error for a status other than 200.

    Source: huggingface_hub, utils/_http.py, hf_raise_for_status: the header X-Error-Code tells the reasons apart, and the Hub answers 401
    for models that do not exist, so as not to tell which private ones do.
    """
    code = headers.get("x-error-code", "")
    if status == 429 or status >= 500:
        return SourceUnavailableError(f"model: the Hub answered {status}; try again later, or paste the config.json", field="model")
    if code == "GatedRepo" or status == 403:
        advice = "the token in HF_TOKEN has not been granted access" if has_token else "accept its terms on the Hub and set HF_TOKEN"
        return AccessDeniedError(f"model: {model_id!r} is gated: {advice}", field="model")
    if code == "RevisionNotFound":
        return ModelNotFoundError(f"revision: {model_id!r} has no revision {revision!r}", field="revision")
    if code == "EntryNotFound":
        return ModelNotFoundError(f"model: {model_id!r} has no config.json: it may hold only an adapter or GGUF files", field="model")
    if status == 401 and has_token and headers.get("x-error-message") == "Invalid credentials in Authorization header":
        return AccessDeniedError(f"model: the Hub does not accept the token in HF_TOKEN for {model_id!r}", field="model")
    if status in (401, 404):
        return ModelNotFoundError(
            f"model: {model_id!r} does not exist on the Hub, or is private and HF_TOKEN does not open it", field="model"
        )
    return SourceError(f"model: the Hub answered {status} for {model_id!r}", field="model")


def _truthy(value: str | None) -> bool:
    return (value or "").upper() in ("1", "ON", "YES", "TRUE")
