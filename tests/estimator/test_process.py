"""The inspecting process: its limits, and what it is not given."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from estimator.errors import ConfigError, InspectionError, InspectionLimitError, SourceUnavailableError
from estimator.sources.process import Inspector, Limits, Process

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
SLOW = {**LLAMA, "num_hidden_layers": 1024}


def inventory(inspector: Inspector, config: dict[str, Any]) -> Any:
    return inspector.run("inventory", {"config": config, "content_hash": "0" * 64})


def test_a_model_is_built_in_another_process(inspector: Inspector) -> None:
    assert inventory(inspector, LLAMA)["model_class"] == "LlamaForCausalLM"


def test_a_warm_process_answers_within_a_second(inspector: Inspector) -> None:
    inventory(inspector, LLAMA)
    start = time.perf_counter()
    inventory(inspector, {**LLAMA, "num_hidden_layers": 32, "model_type": "qwen3"})
    assert time.perf_counter() - start < 1


def test_a_model_type_that_transformers_does_not_know_is_an_error_of_the_config(inspector: Inspector) -> None:
    with pytest.raises(ConfigError, match="'baichuan' is not known to transformers"):
        inventory(inspector, {**LLAMA, "model_type": "baichuan"})


def test_a_value_that_the_config_class_refuses_is_an_error_of_the_config(inspector: Inspector) -> None:
    with pytest.raises(ConfigError, match="LlamaConfig refuses"):
        inventory(inspector, {**LLAMA, "hidden_size": "64"})


def test_a_dtype_that_torch_does_not_have_is_an_error_of_the_config(inspector: Inspector) -> None:
    with pytest.raises(ConfigError, match="'os' is not known; accepted: bfloat16"):
        inventory(inspector, {**LLAMA, "torch_dtype": "os"})


def test_a_model_that_cannot_be_built_is_an_inspection_error(inspector: Inspector) -> None:
    with pytest.raises(InspectionError, match="cannot be built"):
        inventory(inspector, {**LLAMA, "hidden_act": "no_such_activation"})


def test_a_task_that_does_not_exist_is_an_inspection_error(inspector: Inspector) -> None:
    with pytest.raises(InspectionError, match="KeyError"):
        inspector.run("no_such_task", {})


def test_code_named_by_a_config_is_not_run(inspector: Inspector, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    names = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Model")
    hostile = {
        "auto_map": names,
        "_attn_implementation": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "_name_or_path": str(tmp_path),
    }
    built = inventory(inspector, {**LLAMA, **hostile})
    assert built["model_class"] == "LlamaForCausalLM"
    assert built["default_attention"] == "sdpa"
    assert not (tmp_path / "ran").exists()
    assert [one for process in inspector._idle for one in psutil.Process(process.pid).children(recursive=True)] == []


def test_the_process_has_no_secrets_and_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "canary")
    process = Process(Limits())
    try:
        process.request("versions", {}, Limits())
        environment = Path(f"/proc/{process.pid}/environ").read_text()
    finally:
        process.close()
    assert "canary" not in environment
    assert "HF_HUB_OFFLINE=1" in environment


def test_a_request_that_hangs_is_stopped_and_a_warm_spare_steps_in() -> None:
    inspector = Inspector(keep_spare=True)
    try:
        inventory(inspector, LLAMA)
        spare = inspector._idle[-1]
        spare._wait_until_ready()
        with pytest.raises(InspectionLimitError, match=r"took longer than 0\.2 s"):
            inspector.run("inventory", {"config": SLOW, "content_hash": "0"}, wall_seconds=0.2)
        assert inventory(inspector, LLAMA)["model_class"] == "LlamaForCausalLM"
        assert spare.num_requests == 1
    finally:
        inspector.close()


def test_a_request_that_takes_too_much_memory_is_stopped() -> None:
    inspector = Inspector(limits=Limits(resident_bytes=2**20), keep_spare=False)
    try:
        with pytest.raises(InspectionLimitError, match="bytes of memory"):
            inventory(inspector, SLOW)
    finally:
        inspector.close()


def test_a_process_that_died_is_replaced() -> None:
    inspector = Inspector(keep_spare=False)
    try:
        inventory(inspector, LLAMA)
        os.kill(inspector._idle[0].pid, 9)
        time.sleep(0.2)
        assert inventory(inspector, LLAMA)["num_layers"] == 2
    finally:
        inspector.close()


def test_processes_are_replaced_after_their_share_of_requests() -> None:
    inspector = Inspector(limits=Limits(requests_per_process=1), keep_spare=False)
    try:
        inventory(inspector, LLAMA)
        assert not inspector._idle
    finally:
        inspector.close()


def test_concurrent_callers_each_get_their_own_answer(inspector: Inspector) -> None:
    found: dict[int, int] = {}

    def ask(num_layers: int) -> None:
        found[num_layers] = inventory(inspector, {**LLAMA, "num_hidden_layers": num_layers})["num_layers"]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: n for n in range(1, 9)}


def test_callers_do_not_wait_for_ever() -> None:
    inspector = Inspector(queue_seconds=0.1, keep_spare=False)
    try:
        inspector._places.acquire()
        with pytest.raises(SourceUnavailableError, match="busy"):
            inventory(inspector, LLAMA)
    finally:
        inspector.close()


def test_a_closed_inspector_says_so() -> None:
    inspector = Inspector()
    inspector.close()
    with pytest.raises(SourceUnavailableError, match="closed"):
        inventory(inspector, LLAMA)


def test_an_oversized_request_is_refused(inspector: Inspector) -> None:
    with pytest.raises(ConfigError, match="at most"):
        inventory(inspector, {**LLAMA, "x": "y" * (5 * 2**20)})
