"""A model's config.json from the Hugging Face Hub: one small file, with a deadline, and never written to disk."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from estimator.errors import AccessDeniedError, ModelNotFoundError, RequestError, SourceError, SourceUnavailableError
from estimator.sources import bounds, configfile
from estimator.sources.access import Access, current
from estimator.sources.transport import Answer, Fetch, get

DEADLINE_SECONDS = 8.0
DEFAULT_ENDPOINT = "https://huggingface.co"
ENDPOINT_VARIABLE = "HF_ENDPOINT"
ACCEPTED_ADDRESSES = f"accepted: an address such as {DEFAULT_ENDPOINT}, with http:// or https:// and a host"
DEFAULT_REVISION = "main"

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_REVISION = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._/-]{0,126}[A-Za-z0-9_])?")
# Up to the last @: in what is malformed, a password may hold any of the signs that end one.
_CREDENTIALS = re.compile(r"(\A[A-Za-z][A-Za-z0-9+.-]*://)?.*@", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubConfig:
    """A config as the Hub has it."""

    config: dict[str, Any]
    revision: str
    """The commit, where the Hub names it; else the revision asked for."""
    is_public: bool
    """Whether it was read without a token: only then may anything made from it be stored."""
    is_stale: bool = False
    """Whether it was kept from before, since the Hub does not answer."""

    @property
    def has_commit(self) -> bool:
        """Whether the revision can no longer change."""
        return is_commit(self.revision)


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit, in full."""
    return _COMMIT.fullmatch(revision) is not None


def endpoint_in_use() -> str:
    """Address of the Hub: `HF_ENDPOINT`, or the public one.

    Raises:
        RequestError: if the variable holds no address.
    """
    stated = os.environ.get(ENDPOINT_VARIABLE) or DEFAULT_ENDPOINT
    if not is_address(stated):
        raise RequestError(f"{ENDPOINT_VARIABLE}: {without_credentials(stated)!r}: {ACCEPTED_ADDRESSES}", field=ENDPOINT_VARIABLE)
    return stated.rstrip("/")


def is_address(text: str) -> bool:
    """Whether paths can be put behind it."""
    try:
        parts = urlsplit(text)
        has_place = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    return has_place and parts.scheme in ("http", "https") and not (parts.query or parts.fragment) and text.split() == [text]


def without_credentials(text: str) -> str:
    """What may be told of an address, which need not be one: a name and a password before its host are left out."""
    return _CREDENTIALS.sub(r"\1…@", text)


def is_offline() -> bool:
    """Whether the program is told to ask nothing."""
    return (os.environ.get("HF_HUB_OFFLINE") or "").upper() in ("1", "ON", "YES", "TRUE")


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
    access: Access | None = None,
    endpoint: str | None = None,
    deadline_seconds: float = DEADLINE_SECONDS,
    ask: Callable[[Fetch, float], Answer] = get,
) -> HubConfig:
    """The checked config of a model on the Hub.

    Asked without a token first; a token is only sent where the Hub demands one, and what it opens is marked as not public.

    Args:
        model_id: `owner/name`.
        revision: branch, tag or commit; the default branch if None.
        access: of the caller; that of the question being answered if None.
        endpoint: address of the Hub; `HF_ENDPOINT` of the environment if None.
        deadline_seconds: for everything together [s].
        ask: how one answer is got.

    Raises:
        RequestError: if the id or revision is malformed, or the address of the Hub.
        ModelNotFoundError: if there is no such model, revision or config.json.
        AccessDeniedError: if it is gated or private and the token (or its absence) does not open it.
        SourceUnavailableError: if the Hub is down, too slow, unreachable, or this program is told to be offline.
        SourceError: if the Hub's answer makes no sense.
        ConfigError: if the config is out of bounds.
    """
    check_id(model_id)
    revision = check_revision(revision) if revision is not None else DEFAULT_REVISION
    if is_offline():
        raise SourceUnavailableError(
            f"model: {model_id!r} is not in the catalogue, and HF_HUB_OFFLINE is set; paste its config.json", field="model"
        )
    access = access if access is not None else current()
    url = file_url(endpoint or endpoint_in_use(), model_id, revision, "config.json")
    deadline = time.monotonic() + deadline_seconds
    answer = ask(Fetch(url=url, max_bytes=bounds.MAX_BYTES), deadline)
    token = access.secret
    is_public = True
    if answer.status in (401, 403) and token:
        is_public = False
        answer = ask(Fetch(url=url, token=token, max_bytes=bounds.MAX_BYTES), deadline)
    if not answer.is_ok:
        raise refusal(model_id, revision, answer, access)
    commit = answer.headers.get("x-repo-commit", "")
    if not answer.body.lstrip().startswith(b"{"):
        raise SourceError(f"model: the Hub's answer for {model_id!r} is no config.json", field="model")
    return HubConfig(config=configfile.parse(answer.body), revision=commit if is_commit(commit) else revision, is_public=is_public)


def file_url(endpoint: str, model_id: str, revision: str, name: str) -> str:
    """Address of a file; id and revision are checked beforehand."""
    return f"{endpoint.rstrip('/')}/{model_id}/resolve/{quote(revision, safe='')}/{quote(name)}"


def refusal(model_id: str, revision: str, answer: Answer, access: Access) -> SourceError:
    """The error for a status other than 200.

    Source: huggingface_hub, utils/_http.py, hf_raise_for_status: the header X-Error-Code tells the reasons apart, and the Hub answers 401
    for models that do not exist, so as not to tell which private ones do.
    """
    status, code = answer.status, answer.headers.get("x-error-code", "")
    place, has_token = access.token_from, access.secret is not None
    if status == 429 or status >= 500:
        return SourceUnavailableError(
            f"model: the Hub answered {status}; try again later, or paste the config.json",
            field="model",
            retry_after_seconds=answer.retry_after_seconds or 30,
        )
    if code == "GatedRepo" or status == 403:
        advice = f"the token in {place} has not been granted access" if has_token else f"accept its terms on the Hub and set {place}"
        return AccessDeniedError(f"model: {model_id!r} is gated: {advice}", field="model")
    if code == "RevisionNotFound":
        return ModelNotFoundError(f"revision: {model_id!r} has no revision {revision!r}", field="revision")
    if code == "EntryNotFound":
        return ModelNotFoundError(f"model: {model_id!r} has no config.json: it may hold only an adapter or GGUF files", field="model")
    if status == 401 and has_token and answer.headers.get("x-error-message") == "Invalid credentials in Authorization header":
        return AccessDeniedError(f"model: the Hub does not accept the token in {place} for {model_id!r}", field="model")
    if status in (401, 404):
        return ModelNotFoundError(
            f"model: {model_id!r} does not exist on the Hub, or is private and {place} does not open it", field="model"
        )
    return SourceError(f"model: the Hub answered {status} for {model_id!r}", field="model")
