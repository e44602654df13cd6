"""The Hub, played by a server on the loopback; a second one plays the host where it keeps large files."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from safetensors.torch import save

CONFIG: dict[str, Any] = {
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
    """What the server saw, where it listens, and what its repositories hold beyond those that have a name in `_answer`."""

    endpoint: str = ""
    file_endpoint: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    file_requests: list[tuple[str, str | None]] = field(default_factory=list)
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of public repositories by name; all but JSON lie on the other host."""
    private: set[str] = field(default_factory=set)
    """Those of them that only `tokens` open."""
    tokens: set[str] = field(default_factory=lambda: {TOKEN})
    status: int | None = None
    """Answered to everything, if set."""
    headers: dict[str, str] = field(default_factory=dict)
    """Sent with it."""
    hangs: bool = False
    stopping: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    mock: MockHub

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer_file(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        if asked is None:
            self.answer(200, content, headers)
        else:
            self.answer(206, content[int(asked[1]) : int(asked[2]) + 1], headers)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError):  # the client gave up
            super().handle()


class _FileHandler(_Handler):
    def do_GET(self) -> None:
        self.mock.file_requests.append((self.path, self.headers.get("authorization")))
        _, name, file = self.path.split("/")
        self.answer_file(self.mock.repositories[name][file])


class _HubHandler(_Handler):
    def do_GET(self) -> None:
        mock = self.mock
        authorization = self.headers.get("authorization")
        mock.requests.append((self.path, authorization))
        if mock.hangs:
            mock.stopping.wait(20)
            return
        if mock.status is not None:
            self.answer(mock.status, b"<html>maintenance</html>", mock.headers)
            return
        is_allowed = authorization in {f"Bearer {token}" for token in mock.tokens}
        name = self.path.split("/")[2]
        if name in mock.repositories:
            self.answer_repository(name, is_allowed)
        else:
            self.answer_named(name, is_allowed)

    def answer_repository(self, name: str, is_allowed: bool) -> None:
        file, files = self.path.split("/")[-1], self.mock.repositories[name]
        if name in self.mock.private and not is_allowed:
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif file not in files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif file.endswith(".json"):
            self.answer_file(files[file], {"X-Repo-Commit": COMMIT})
        else:
            self.answer(302, b"", {"Location": f"{self.mock.file_endpoint}/{name}/{file}", "X-Repo-Commit": COMMIT})

    def answer_named(self, name: str, is_allowed: bool) -> None:
        match name:
            case "public":
                self.answer(200, json.dumps(CONFIG).encode(), {"X-Repo-Commit": COMMIT})
            case "moved":
                self.answer(307, b"", {"Location": "/owner/public/resolve/main/config.json"})
            case "elsewhere":
                self.answer(302, b"", {"Location": "http://127.0.0.2:9/stolen"})
            case "circle":
                self.answer(302, b"", {"Location": self.path})
            case "gated":
                self.answer(*((200, json.dumps(CONFIG).encode()) if is_allowed else (401, b"")), {"X-Error-Code": "GatedRepo"})
            case "private":
                self.answer(*((200, json.dumps(CONFIG).encode()) if is_allowed else (401, b"")), {"X-Error-Code": "RepoNotFound"})
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
                self.mock.stopping.wait(20)
            case "dripping":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for _ in range(1000):
                    if self.mock.stopping.wait(0.05):
                        return
                    self.wfile.write(b" ")
            case _:
                self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})


@contextmanager
def serving() -> Iterator[MockHub]:
    """The Hub and its file host, as long as the context lasts."""
    mock = MockHub()
    servers = []
    for handler in (_HubHandler, _FileHandler):
        bound = type("Handler", (handler,), {"mock": mock})
        server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        servers.append((server, thread))
    mock.endpoint, mock.file_endpoint = (f"http://127.0.0.1:{server.server_port}" for server, _ in servers)
    try:
        yield mock
    finally:
        mock.stopping.set()
        for server, thread in servers:
            server.shutdown()
            server.server_close()
            thread.join()


def safetensors(tensors: dict[str, Any]) -> bytes:
    """A file as the library writes it."""
    return bytes(save(tensors))
