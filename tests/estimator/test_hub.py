"""The Hub, played by a server on the loopback."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from estimator.errors import AccessDeniedError, ConfigError, ModelNotFoundError, RequestError, SourceError, SourceUnavailableError
from estimator.sources import hub
from estimator.sources.cache import InventoryCache
from estimator.sources.process import Inspector
from estimator.sources.resolve import ModelSource, resolve
from tests.mock_hub import COMMIT, TOKEN, MockHub, serving


@pytest.fixture
def mock_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with serving() as mock:
        monkeypatch.setenv("HF_ENDPOINT", mock.endpoint)
        yield mock


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


def test_nothing_listening_elsewhere_on_this_machine_is_ever_asked(mock_hub: MockHub) -> None:
    with socket.socket() as canary:
        canary.bind(("127.0.0.1", 0))
        canary.listen()
        canary.setblocking(False)
        port = canary.getsockname()[1]
        for place in (
            f"http://127.0.0.1:{port}/x", f"http://localhost:{port}/x", f"//127.0.0.1:{port}/x", f"https://127.0.0.1:{port}/x",
            f"http://huggingface.co@127.0.0.1:{port}/x", f"http://0x7f000001:{port}/x", f"http://2130706433:{port}/x",
            f"http:/\\127.0.0.1:{port}/x", f"\\\\127.0.0.1:{port}\\x", f"http://[::ffff:127.0.0.1]:{port}/x", "file:///etc/passwd",
        ):  # fmt: skip
            mock_hub.status, mock_hub.headers = 302, {"Location": place}
            with pytest.raises(SourceError):
                hub.fetch("owner/public")
        for name in (f"127.0.0.1:{port}/x", f"http://127.0.0.1:{port}/x", f"@127.0.0.1:{port}/x", f"owner@127.0.0.1:{port}/x"):
            with pytest.raises(RequestError):
                hub.fetch(name)
            with pytest.raises(RequestError):
                hub.fetch("owner/public", revision=f"main@{name}")
        with pytest.raises(BlockingIOError):  # nobody called
            canary.accept()


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
