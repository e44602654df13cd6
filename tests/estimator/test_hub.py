"""The Hub, played by a server on the loopback."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from estimator.errors import AccessDeniedError, ConfigError, ModelNotFoundError, RequestError, SourceError, SourceUnavailableError
from estimator.sources import hub
from estimator.sources.cache import InventoryCache
from estimator.sources.process import Inspector
from estimator.sources.resolve import ModelSource, resolve

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "intermediate_size": 96,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_canary"


@dataclass
class MockHub:
    """What the server saw, and where it listens."""

    endpoint: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def mock_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    mock = MockHub()
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            mock.requests.append((self.path, self.headers.get("authorization")))
            allowed = self.headers.get("authorization") == f"Bearer {TOKEN}"
            match self.path.split("/")[2]:
                case "public":
                    self.answer(200, json.dumps(CONFIG).encode(), {"X-Repo-Commit": COMMIT})
                case "moved":
                    self.answer(307, b"", {"Location": "/owner/public/resolve/main/config.json"})
                case "elsewhere":
                    self.answer(302, b"", {"Location": "http://127.0.0.2:9/stolen"})
                case "circle":
                    self.answer(302, b"", {"Location": self.path})
                case "gated":
                    self.answer(*((200, json.dumps(CONFIG).encode()) if allowed else (401, b"")), {"X-Error-Code": "GatedRepo"})
                case "private":
                    self.answer(*((200, json.dumps(CONFIG).encode()) if allowed else (401, b"")), {"X-Error-Code": "RepoNotFound"})
                case "revoked":
                    known = self.headers.get("authorization") is None
                    message = {} if known else {"X-Error-Message": "Invalid credentials in Authorization header"}
                    self.answer(401, b"", message)
                case "no-revision":
                    self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
                case "no-config":
                    self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                case "down":
                    self.answer(503, b"<html>maintenance</html>", {})
                case "busy":
                    self.answer(429, b"", {"Retry-After": "300"})
                case "html":
                    self.answer(200, b"<html>sign in</html>", {})
                case "broken":
                    self.answer(200, b'{"model_type": "llama", "hidden_size": }', {})
                case "hostile":
                    self.answer(200, json.dumps({**CONFIG, "num_hidden_layers": 10**9}).encode(), {})
                case "huge":
                    self.answer(200, b'{"x": "' + b"y" * (2 * 2**20) + b'"}', {})
                case "hanging":
                    stop.wait(20)
                case "dripping":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    for _ in range(1000):
                        if stop.wait(0.05):
                            return
                        self.wfile.write(b" ")
                case _:
                    self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(OSError):  # the client gave up
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    mock.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", mock.endpoint)
    yield mock
    stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_public_config_comes_with_its_commit(mock_hub: MockHub) -> None:
    found = hub.fetch("owner/public", "main")
    assert (found.config["hidden_size"], found.revision, found.is_public) == (64, COMMIT, True)
    assert mock_hub.requests == [("/owner/public/resolve/main/config.json", None)]


def test_a_token_is_not_sent_where_none_is_needed(mock_hub: MockHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.fetch("owner/public").is_public
    assert [authorization for _, authorization in mock_hub.requests] == [None]


def test_a_redirect_on_the_host_is_followed(mock_hub: MockHub) -> None:
    assert hub.fetch("owner/moved").config["hidden_size"] == 64


@pytest.mark.parametrize("name", ["gated", "private"])
def test_a_token_from_the_environment_opens_a_model_and_marks_it_as_not_public(
    mock_hub: MockHub, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.fetch(f"owner/{name}").is_public is False


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("missing", ModelNotFoundError, "does not exist on the Hub, or is private"),
        ("private", ModelNotFoundError, "does not exist on the Hub, or is private"),
        ("no-revision", ModelNotFoundError, "no revision 'main'"),
        ("no-config", ModelNotFoundError, "no config.json"),
        ("gated", AccessDeniedError, "accept its terms on the Hub and set HF_TOKEN"),
        ("down", SourceUnavailableError, "answered 503"),
        ("busy", SourceUnavailableError, "answered 429"),
        ("html", SourceError, "no config.json"),
        ("huge", SourceError, "more than 1048576 bytes"),
        ("elsewhere", SourceError, "another host"),
        ("circle", SourceError, "in circles"),
        ("broken", ConfigError, "not JSON"),
        ("hostile", ConfigError, "num_hidden_layers"),
    ],
)
def test_a_refusal_or_garbage_is_an_error_that_says_what_to_do(mock_hub: MockHub, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        hub.fetch(f"owner/{name}")


@pytest.mark.parametrize(("name", "words"), [("gated", "has not been granted access"), ("revoked", "does not accept the token")])
def test_a_token_that_does_not_open_a_model_is_named_and_never_shown(
    mock_hub: MockHub, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AccessDeniedError, match=words) as caught:
        hub.fetch(f"owner/{name}")
    assert "hf_wrong" not in str(caught.value)


@pytest.mark.parametrize("name", ["hanging", "dripping"])
def test_a_slow_hub_is_given_up_at_the_deadline(mock_hub: MockHub, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(SourceUnavailableError, match="did not answer in time"):
        hub.fetch(f"owner/{name}", deadline_seconds=0.5)
    assert time.monotonic() - start < 1.5


def test_a_hub_that_cannot_be_reached_is_unavailable(mock_hub: MockHub) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(SourceUnavailableError, match="cannot be reached"):
        hub.fetch("owner/public", endpoint=f"http://127.0.0.1:{port}")


def test_offline_means_that_nothing_is_asked(mock_hub: MockHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceUnavailableError, match="HF_HUB_OFFLINE"):
        hub.fetch("owner/public")
    assert not mock_hub.requests


NO_IDS = ["/", "a/b/c", "../etc/passwd", "owner/..", "http://127.0.0.1/x", "owner/x?y", "owner/x#y", "owner/a--b", "-a"]


@pytest.mark.parametrize("model_id", ["", "owner/na me", "a\nb", "o" * 200, *NO_IDS])
def test_an_id_of_another_form_is_refused_before_anything_is_asked(mock_hub: MockHub, model_id: str) -> None:
    with pytest.raises(RequestError, match="is not a model id"):
        hub.fetch(model_id)
    assert not mock_hub.requests


@pytest.mark.parametrize("revision", ["", "../../../x", "a//b", "/main", "main\n", "x y", "a" * 200, "main?x"])
def test_a_revision_of_another_form_is_refused_before_anything_is_asked(mock_hub: MockHub, revision: str) -> None:
    with pytest.raises(RequestError, match="is not a branch, tag or commit"):
        hub.fetch("owner/public", revision)
    assert not mock_hub.requests


def test_a_branch_with_a_slash_stays_one_part_of_the_address(mock_hub: MockHub) -> None:
    hub.fetch("owner/public", "refs/pr/3")
    assert mock_hub.requests[0][0] == "/owner/public/resolve/refs%2Fpr%2F3/config.json"


def test_a_public_model_is_stored_and_a_private_one_is_not(
    mock_hub: MockHub, monkeypatch: pytest.MonkeyPatch, inspector: Inspector, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, num_files in (("private", 0), ("public", 1)):
        found = resolve(f"owner/{name}", inspector=inspector, cache=InventoryCache(tmp_path))
        assert (found.id, found.source) == (f"owner/{name}", ModelSource.HUB)
        assert len(list(tmp_path.iterdir())) == num_files


def test_another_revision_of_a_catalogue_model_is_asked_of_the_hub(mock_hub: MockHub) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve("meta-llama/Llama-3.1-8B", "some-branch")
    assert len(mock_hub.requests) == 1
