"""Bodies made to do harm: each is refused or answered in its time, by every operation that takes one."""

import gzip
import json
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.http import create_app
from tests.mock_hub import CONFIG

CLIENT = TestClient(create_app(), raise_server_exceptions=False)
POSTS = ("/v1/estimate", "/v1/check", "/v1/plan", "/v1/sweep", "/v1/trace", "/v1/calibrations")
LONGEST_SECONDS = 10.0


def with_config(**changes: Any) -> bytes:
    return json.dumps({"model": {"config": {**CONFIG, **changes}}}).encode()


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "a null byte": b"\x00",
    "no JSON": b"<xml/>",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "a lone surrogate": b'{"model": "\\ud800"}',
    "NaN": b'{"model": NaN}',
    "infinity": b'{"model": "gpt2", "training": {"label_smoothing_factor": -Infinity}}',
    "a number without end": b'{"model": ' + b"9" * 200_000 + b"}",
    "an exponent without end": b'{"model": 1e' + b"9" * 1000 + b"}",
    "deep lists": b"[" * 500_000,
    "deep objects": b'{"model":' * 1000 + b"1" + b"}" * 1000,
    "deep config": b'{"model": {"config": ' + b'{"a":' * 200 + b"1" + b"}" * 202,
    "many keys": json.dumps({f"k{number}": 0 for number in range(60_000)}).encode(),
    "the same key often": b"{" + b'"model": "gpt2",' * 40_000 + b'"model": "gpt2"}',
    "a long name": json.dumps({"model": "a" * 900_000}).encode(),
    "a gzip bomb": gzip.compress(b"0" * 50_000_000),
    "booleans as numbers": with_config(num_hidden_layers=True),
    "a billion layers": with_config(num_hidden_layers=10**9),
    "a negative width": with_config(hidden_size=-64),
    "no width": with_config(hidden_size=0),
    "no heads": with_config(num_attention_heads=0),
    "heads that do not divide": with_config(num_attention_heads=7),
    "a width without end": with_config(hidden_size=2**17, intermediate_size=2**20, num_hidden_layers=512),
    "a million experts": with_config(model_type="mixtral", num_local_experts=10**6),
    "code": with_config(auto_map={"AutoConfig": "http://127.0.0.1/evil--x.y", "AutoModelForCausalLM": "os.system"}),
    "a class of Python": with_config(model_type="__class__", architectures=["builtins.eval"]),
    "a path": json.dumps({"model": "../../../etc/passwd", "revision": "../../x"}).encode(),
    "an address": json.dumps({"model": "http://169.254.169.254/latest/meta-data"}).encode(),
    "a template": json.dumps({"model": "{{7*7}}", "dtype": "${jndi:ldap://x}"}).encode(),
    "a terminal's commands": json.dumps({"model": "gpt2", "dtype": "\x1b]0;x\x07\r\n"}).encode(),
    "a file with commands of a terminal": json.dumps({"model": "gpt2", "files": [{"content": "\x1b[31m"}]}).encode(),
    "a file whose tags are wrong": json.dumps({"model": "gpt2", "files": [{"content": "dtype: !!bool x"}]}).encode(),
    "a slow pattern": json.dumps({"model": "gpt2", "peft": {"target_modules": "(a|a)*" * 50 + "$"}}).encode(),
    "a sweep without end": json.dumps({"model": "gpt2", "training": {}, "sweep": {"max_length": "1..999999999999"}}).encode(),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused_or_answered_in_its_time(name: str) -> None:
    for path in POSTS:
        start = time.monotonic()
        response = CLIENT.post(path, content=BODIES[name], headers={"content-type": "application/json"})
        # without state there are no calibrations, whatever is posted
        expected = (422, 503) if path == "/v1/calibrations" else (200, 413, 422, 404)
        assert response.status_code in expected, (path, response.text[:300])
        assert response.status_code == 200 or response.headers["content-type"] == "application/problem+json"
        assert time.monotonic() - start < LONGEST_SECONDS
        assert len(response.content) < 2_000_000
