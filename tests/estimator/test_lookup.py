"""What a service asks the Hub, and what it keeps: mostly nothing twice, never anything private."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from estimator.dtypes import DType
from estimator.errors import AccessDeniedError, ModelNotFoundError, SourceError, SourceUnavailableError
from estimator.sources import safetensors
from estimator.sources.access import PUBLIC, Access, current, using
from estimator.sources.breaker import Breaker
from estimator.sources.cache import InventoryCache
from estimator.sources.flight import SingleFlight
from estimator.sources.lookup import Lookup, MemoryStore
from estimator.sources.process import Inspector
from estimator.sources.resolve import resolve
from tests import mock_hub as mocked
from tests.mock_hub import COMMIT, CONFIG, MockHub

ANYONE = Access(uses_environment=False)
ALICE = Access(token=mocked.TOKEN, uses_environment=False)
BOB = Access(token="hf_bobbob", uses_environment=False)
CONFIG_FILE = json.dumps(CONFIG).encode()


@pytest.fixture
def mock(monkeypatch: pytest.MonkeyPatch) -> Iterator[MockHub]:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    with mocked.serving() as mock:
        yield mock


def lookup_of(mock: MockHub, **settings: Any) -> Lookup:
    return Lookup(endpoint=mock.endpoint, file_hosts=(mock.file_endpoint,), **settings)


def test_a_public_config_is_asked_for_once_while_it_is_fresh(mock: MockHub) -> None:
    lookup = lookup_of(mock)
    found = [lookup.config("owner/public", revision, access) for revision in (None, "main") for access in (ANYONE, ALICE)]
    assert {one.revision for one in found} == {COMMIT}
    assert mock.requests == [("/owner/public/resolve/main/config.json", None)]


def test_a_public_config_from_before_stands_in_while_the_hub_is_down_and_says_so(mock: MockHub) -> None:
    seen: list[str] = []
    lookup = lookup_of(mock, fresh_seconds=-1, observe=seen.append)
    assert not lookup.config("owner/public", None, ANYONE).is_stale
    mock.status = 503
    assert lookup.config("owner/public", None, ANYONE).is_stale
    with pytest.raises(SourceUnavailableError):
        lookup.config("owner/gated", None, ANYONE)
    assert seen == ["asked", "stale", "failed"]


def test_what_was_kept_too_long_does_not_stand_in(mock: MockHub) -> None:
    lookup = lookup_of(mock, fresh_seconds=-1, stale_seconds=-1)
    lookup.config("owner/public", None, ANYONE)
    mock.status = 503
    with pytest.raises(SourceUnavailableError):
        lookup.config("owner/public", None, ANYONE)


def test_a_model_that_became_private_is_forgotten(mock: MockHub) -> None:
    mock.repositories["model"] = {"config.json": CONFIG_FILE}
    lookup = lookup_of(mock, fresh_seconds=-1)
    lookup.config("owner/model", None, ANYONE)
    mock.private.add("model")
    with pytest.raises(ModelNotFoundError):
        lookup.config("owner/model", None, ANYONE)
    mock.status = 503
    with pytest.raises(SourceUnavailableError):
        lookup.config("owner/model", None, ANYONE)


@pytest.mark.parametrize("other", [ANYONE, BOB, Access(token="hf_revoked", uses_environment=False)])
def test_what_one_token_opened_stays_closed_to_others(mock: MockHub, inspector: Inspector, other: Access) -> None:
    store, inventories = MemoryStore(), InventoryCache(None)
    lookup = lookup_of(mock, store=store)
    for name in ("private", "gated"):
        with using(Access(token=mocked.TOKEN, uses_environment=False, lookup=lookup)):
            assert resolve(f"owner/{name}", inspector=inspector, cache=inventories).is_public is False
        with (
            pytest.raises((ModelNotFoundError, AccessDeniedError)),
            using(Access(token=other.token, uses_environment=False, lookup=lookup)),
        ):
            resolve(f"owner/{name}", inspector=inspector, cache=inventories)
    assert not store._configs
    assert not store._files
    assert not inventories._entries


def test_the_token_of_the_environment_is_not_lent_to_strangers(mock: MockHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", mocked.TOKEN)
    with pytest.raises(ModelNotFoundError):
        lookup_of(mock).config("owner/private", None, ANYONE)
    assert {authorization for _, authorization in mock.requests} == {None}


def test_an_access_ends_with_its_question_and_shows_no_token() -> None:
    with using(ALICE):
        assert current() is ALICE
    assert current().token is None
    assert mocked.TOKEN not in repr(ALICE)
    assert ALICE.scope not in (BOB.scope, ANYONE.scope, mocked.TOKEN)
    assert ANYONE.scope == PUBLIC


def test_those_who_ask_the_same_at_the_same_time_share_one_answer() -> None:
    flights, calls, arrived = SingleFlight(), [], threading.Event()

    def make() -> int:
        calls.append(1)
        arrived.wait(5)
        return len(calls)

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(flights.once, "key", make) for _ in range(8)]
        while not flights._running:
            pass
        threading.Timer(0.1, arrived.set).start()
        assert {one.result() for one in found} == {1}


def test_a_hub_that_keeps_failing_is_left_alone_and_then_tried_by_one() -> None:
    now = [0.0]
    breaker = Breaker(failures=3, rest_seconds=30, clock=lambda: now[0])
    for _ in range(3):
        breaker.enter()
        breaker.failed()
    with pytest.raises(SourceUnavailableError) as caught:
        breaker.enter()
    assert caught.value.retry_after_seconds == 30
    now[0] = 31.0
    breaker.enter()
    with pytest.raises(SourceUnavailableError):
        breaker.enter()
    breaker.succeeded()
    breaker.enter()


def test_a_hub_that_asks_to_be_left_alone_is(mock: MockHub) -> None:
    mock.status, mock.headers = 429, {"Retry-After": "120"}
    lookup = lookup_of(mock)
    for _ in range(3):
        with pytest.raises(SourceUnavailableError) as caught:
            lookup.config("owner/public", None, ANYONE)
        assert 110 <= caught.value.retry_after_seconds <= 120
    assert len(mock.requests) == 1


def test_a_failure_in_passing_is_tried_again(mock: MockHub) -> None:
    mock.status = 503
    threading.Timer(0.1, lambda: setattr(mock, "status", None)).start()
    assert lookup_of(mock).config("owner/public", None, ANYONE).revision == COMMIT


def test_a_refusal_does_not_count_as_failure(mock: MockHub) -> None:
    lookup = lookup_of(mock, breaker=Breaker(failures=2))
    for _ in range(4):
        with pytest.raises(ModelNotFoundError):
            lookup.config("owner/missing", None, ANYONE)
    assert not lookup.breaker.is_open


# -- headers ----------------------------------------------------------------------------------------------------------------------------

TENSORS = {
    "model.embed_tokens.weight": torch.zeros(100, 64, dtype=torch.bfloat16),
    "model.layers.0.q.weight": torch.zeros(64, 64, dtype=torch.bfloat16),
    "model.layers.1.q.weight": torch.zeros(64, 64, dtype=torch.bfloat16),
}
OWN_CODE = {**CONFIG, "model_type": "strange", "architectures": ["StrangeForCausalLM"], "auto_map": {"AutoModelForCausalLM": "evil.Model"}}


def of(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def test_sizes_of_a_repository_with_own_code_come_from_its_headers(mock: MockHub, inspector: Inspector) -> None:
    mock.repositories["strange"] = {"config.json": json.dumps(OWN_CODE).encode(), "model.safetensors": mocked.safetensors(TENSORS)}
    store = MemoryStore()
    with using(Access(token=mocked.TOKEN, lookup=lookup_of(mock, store=store))):
        found = resolve("owner/strange", inspector=inspector, cache=InventoryCache(None))
    assert found.checkpoint is not None
    assert found.checkpoint.files.stored_bytes == of(TENSORS)
    assert found.inventory.num_parameters == sum(tensor.numel() for tensor in TENSORS.values())
    assert {row.pattern: row.num_copies for row in found.inventory.rows} == {"model.embed_tokens.weight": 1, "model.layers.{}.q.weight": 2}
    assert (found.inventory.model_class, found.inventory.checkpoint_dtype) == ("StrangeForCausalLM", DType.BFLOAT16)
    # the host of the files is asked for the first bytes alone, and never sees a token
    assert mock.file_requests == [("/strange/model.safetensors", None)]
    assert store.files((mock.endpoint, "owner/strange", COMMIT)) == found.checkpoint.files


def test_a_split_checkpoint_is_read_part_by_part(mock: MockHub) -> None:
    parts = {f"model-0000{n}-of-00002.safetensors": {name: TENSORS[name]} for n, name in enumerate(list(TENSORS)[:2], 1)}
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    mock.repositories["split"] = {
        "config.json": CONFIG_FILE,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{file: mocked.safetensors(part) for file, part in parts.items()},
    }
    lookup = lookup_of(mock)
    files = lookup.files("owner/split", lookup.config("owner/split", None, ANYONE), ANYONE)
    assert (files.num_files, files.num_tensors) == (2, 2)
    assert files.stored_bytes == of(TENSORS) - TENSORS["model.layers.1.q.weight"].nbytes
    assert safetensors.Files.decoded(json.loads(json.dumps(files.encoded()))) == files


def test_a_long_header_is_read_to_its_end() -> None:
    tensors = {f"layers.{n}.{'x' * 40}.weight": torch.zeros(1) for n in range(2000)}
    content = mocked.safetensors(tensors)
    asked: list[tuple[int, int]] = []

    def read_file(name: str, byte_range: tuple[int, int] | None, max_bytes: int) -> bytes:
        assert byte_range is not None
        asked.append(byte_range)
        return content[byte_range[0] : byte_range[1] + 1]

    assert safetensors.read(read_file).num_tensors == 2000
    assert len(asked) == 2


def headed(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        headed(b"{}", 2**63),
        headed(b"{}", 1000),
        headed(b"[]"),
        headed(b"{"),
        headed(b"[" * 100_000),
        headed(b'{"a": 1}'),
        headed(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}'),
        headed(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'),
        headed(b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}'),
        headed(b'{"a": {"dtype": "F32", "shape": [1e3], "data_offsets": [0, 4000]}}'),
        headed(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}'),
        headed(b'{"a": {"dtype": 4, "shape": [1], "data_offsets": [0, 4]}}'),
        headed(b'{"\\u001b]0;a\\u0007": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
    ],
)
def test_a_malformed_header_is_refused(content: bytes) -> None:
    def read_file(name: str, byte_range: tuple[int, int] | None, max_bytes: int) -> bytes:
        assert byte_range is not None
        return content[byte_range[0] : byte_range[1] + 1]

    with pytest.raises(SourceError, match="safetensors files have"):
        safetensors.read(read_file)


def test_bytes_of_types_that_torch_has_no_name_for_are_counted() -> None:
    content = headed(b'{"a": {"dtype": "F8_E8M0", "shape": [3, 5], "data_offsets": [0, 15]}}')
    assert safetensors.read(lambda name, byte_range, max_bytes: content).stored_bytes == 15


@pytest.mark.parametrize("names", [["../x.safetensors"], ["a/b.safetensors"], ["x.bin"], [], [7], [f"{n}.safetensors" for n in range(600)]])
def test_an_index_that_leads_elsewhere_is_refused(names: list[Any]) -> None:
    index = json.dumps({"weight_map": {str(n): name for n, name in enumerate(names)}}).encode()

    def read_file(name: str, byte_range: tuple[int, int] | None, max_bytes: int) -> bytes:
        if name == safetensors.SINGLE_FILE:
            raise ModelNotFoundError("no such file")
        return index

    with pytest.raises(SourceError, match="in the same folder"):
        safetensors.read(read_file)


def test_a_file_on_a_host_that_is_not_known_is_not_fetched(mock: MockHub) -> None:
    mock.repositories["strange"] = {"config.json": CONFIG_FILE, "model.safetensors": mocked.safetensors(TENSORS)}
    lookup = Lookup(endpoint=mock.endpoint)
    with pytest.raises(SourceError, match="another host"):
        lookup.files("owner/strange", lookup.config("owner/strange", None, ANYONE), ANYONE)
    assert not mock.file_requests


def test_headers_of_a_private_model_are_read_with_its_token_and_not_kept(mock: MockHub) -> None:
    mock.repositories["secret"] = {"config.json": CONFIG_FILE, "model.safetensors": mocked.safetensors(TENSORS)}
    mock.private.add("secret")
    store = MemoryStore()
    lookup = lookup_of(mock, store=store)
    assert lookup.files("owner/secret", lookup.config("owner/secret", None, ALICE), ALICE).num_tensors == len(TENSORS)
    assert not store._files
    assert [authorization for _, authorization in mock.file_requests] == [None]
