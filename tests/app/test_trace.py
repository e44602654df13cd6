"""Traces over HTTP, on the command line and as the engine of an estimate."""

import io
import json
import pickle
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch.cuda._memory_viz as viewer
from starlette.testclient import TestClient

from app import examples
from app.engine import routing_notice
from app.http import create_app
from app.service import answer
from estimator.allocator import SMALL_SEGMENT_BYTES
from estimator.errors import InspectionLimitError, RequestError
from estimator.sources.process import Inspector
from tests.app.test_cli import run
from tests.app.test_http import unnamed

SIZES: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 4096}
LLAMA = {"model_type": "llama", "intermediate_size": 352, "num_key_value_heads": 2, **SIZES}
OPT = {"model_type": "opt", "ffn_dim": 512, "word_embed_proj_dim": 128, "max_position_embeddings": 512, **SIZES}


def request(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    training = {"per_device_train_batch_size": 3, "max_length": 200, "bf16": True, "gradient_checkpointing": True}
    return {
        "model": {"config": config},
        "dtype": "bfloat16",
        "peft": {"r": 8, "target_modules": "all-linear"},
        "training": training,
    } | changes


def notices(answered: dict[str, Any]) -> set[str]:
    return {warning["code"] for warning in answered["warnings"]}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        yield client


def test_closed_forms_answer_where_there_are_some() -> None:
    answered = answer(request(LLAMA))
    assert answered["engine"] == "analytic"
    assert "llama" in answered["engine_reason"]


def test_a_family_without_closed_forms_is_traced() -> None:
    answered = answer(request(OPT))
    assert answered["engine"] == "trace"
    assert "no closed forms" in answered["engine_reason"]
    assert "not_modelled" not in notices(answered)
    assert {item["basis"] for phase in answered["phases"] for item in phase["items"]} >= {"exact", "traced"}
    assert all(item["formula"] for phase in answered["phases"] for item in phase["items"])


@pytest.mark.parametrize("trainer", ["transformers", "trl"])
def test_both_engines_agree_within_a_thousandth_and_on_logits(trainer: str) -> None:
    traced, closed = (answer(request(LLAMA, engine=engine, trainer=trainer)) for engine in ("trace", "analytic"))
    assert traced["engine"] == "trace"
    for ours, theirs in zip(traced["phases"], closed["phases"], strict=True):
        assert ours["allocated_bytes"] == pytest.approx(theirs["allocated_bytes"], rel=1e-3)
        logits = [[item["bytes"] for item in phase["items"] if item["name"] == "logits"] for phase in (ours, theirs)]
        assert logits[0] == logits[1]
        assert bool(logits[0]) == (ours["phase"] in ("loss", "backward"))


def test_a_trace_of_other_versions_than_the_installed_is_refused() -> None:
    with pytest.raises(RequestError, match=r"runs the installed versions .*request is for transformers 4\.48"):
        answer(request(LLAMA, engine="trace", stack={"transformers": "4.48"}))


def test_a_family_that_other_versions_keep_from_a_trace_is_answered_with_its_load() -> None:
    answered = answer(request(OPT, stack={"transformers": "4.48"}))
    assert answered["peak"] is None
    assert {"not_modelled", "not_traced"} <= notices(answered)


def test_inference_is_not_traced() -> None:
    with pytest.raises(RequestError, match="covers training steps only"):
        answer({"model": {"config": LLAMA}, "inference": {"batch_size": 1, "prompt_length": 8, "max_new_tokens": 4}, "engine": "trace"})


@pytest.mark.parametrize(("wanted", "attention"), [("padding_free", "eager"), ("packing", "sdpa"), ("packing", "flash_attention_2")])
def test_samples_end_to_end_in_one_row_are_traced_as_one(client: TestClient, wanted: str, attention: str) -> None:
    trainer = "trl" if wanted == "packing" else "transformers"
    asked = request(LLAMA, trainer=trainer, attn_implementation=attention)
    asked["training"] |= {wanted: True}
    traced, closed = (answer({**asked, "engine": engine}) for engine in ("trace", "analytic"))
    apart = answer({**asked, "engine": "analytic", "training": {**asked["training"], wanted: False}})
    for ours, theirs, others in zip(traced["phases"], closed["phases"], apart["phases"], strict=True):
        assert ours["allocated_bytes"] == pytest.approx(theirs["allocated_bytes"], rel=1e-3)
        if attention == "eager" and ours["phase"] == "forward":
            assert ours["allocated_bytes"] > others["allocated_bytes"] + 600 * 600 * 4
    shown = client.post("/v1/trace", json=asked).json()
    assert shown["peak"]["allocated_bytes"] == pytest.approx(traced["peak"]["allocated_bytes"], rel=1e-3)


def test_a_trace_says_what_would_stop_the_run(client: TestClient) -> None:
    asked = request(LLAMA, hardware={"gpu": "t4"})
    stopped = client.post("/v1/trace", json=asked).json()
    assert "no_bfloat16" in notices(stopped)
    assert "no_bfloat16" in notices(answer(asked))


def test_a_model_that_does_not_tell_packed_samples_apart_is_named() -> None:
    asked = request(OPT, attn_implementation="sdpa")
    asked["training"] |= {"padding_free": True}
    found = notices(answer(asked))
    assert "padding_free_mixes_samples" in found
    assert "padding_free_needs_mask" not in found
    found = notices(answer({**asked, "model": {"config": LLAMA}}))
    assert "padding_free_mixes_samples" not in found
    assert "padding_free_needs_mask" in found


def test_an_encoder_with_a_decoder_is_not_traced() -> None:
    asked = {"model": "google-t5/t5-small", "training": {"per_device_train_batch_size": 1, "max_length": 64}}
    with pytest.raises(RequestError, match="T5ForConditionalGeneration reads with an encoder and writes with a decoder"):
        answer({**asked, "engine": "trace"})
    assert {"not_modelled", "not_traced"} <= notices(answer(asked))


def test_a_trace_tells_what_is_alive_at_each_peak(client: TestClient) -> None:
    response = client.post("/v1/trace", json=request(LLAMA))
    assert response.status_code == 200, response.text
    traced = response.json()
    phases = {phase["phase"]: phase for phase in traced["phases"]}
    assert list(phases) == ["load", "forward", "loss", "backward", "optimizer_step"]
    for phase in phases.values():
        for parts in (phase["items"], phase["modules"]):
            assert sum(part["bytes"] for part in parts) == phase["allocated_bytes"]
    assert traced["peak"]["allocated_bytes"] == max(phase["allocated_bytes"] for phase in phases.values())
    allocator = traced["allocator"]
    assert allocator["allocated_at_peak_bytes"] <= allocator["reserved_at_peak_bytes"] <= allocator["max_reserved_bytes"]
    assert max(column["allocated_bytes"] for column in traced["timeline"]["columns"]) == traced["peak"]["allocated_bytes"]
    document = client.get("/openapi.json").json()
    schema = document["paths"]["/v1/trace"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema_rs.validate({**schema, "components": document["components"]}, traced)
    assert unnamed(traced, schema, document["components"]["schemas"]) == []


def test_the_peaks_of_a_trace_are_those_of_the_estimate(client: TestClient) -> None:
    traced = {phase["phase"]: phase["allocated_bytes"] for phase in client.post("/v1/trace", json=request(LLAMA)).json()["phases"]}
    estimated = {phase["phase"]: phase["allocated_bytes"] for phase in answer(request(LLAMA, engine="trace"))["phases"]}
    for phase in ("forward", "loss", "backward"):
        assert traced[phase] == pytest.approx(estimated[phase], abs=2048)


def test_a_trace_and_an_estimate_reserve_the_same(client: TestClient) -> None:
    asked = {**examples.QLORA, "model": "meta-llama/Llama-3.2-1B", "engine": "trace"}
    traced, estimated = client.post("/v1/trace", json=asked).json(), answer(asked)
    # the estimate has the ids of all micro-batches, and takes the stored tensors' sizes from the rows alone
    reserved = traced["allocator"]["max_reserved_bytes"]
    assert reserved == pytest.approx(estimated["peak"]["reserved_bytes"], abs=SMALL_SEGMENT_BYTES)
    # preparing the model has the embedding twice; tables of less than 512 B are made with their weights, and shown after them
    loads = [next(phase["allocated_bytes"] for phase in told["phases"] if phase["phase"] == "load") for told in (traced, estimated)]
    assert loads[0] == pytest.approx(loads[1], rel=0.001)


def one_by_one(width: int) -> dict[str, Any]:
    """LongCat runs its experts one by one, so that one expert on all tokens holds more than several on a share each."""
    sizes = {"hidden_size": 64, "num_layers": 1, "num_attention_heads": 4, "vocab_size": 512, "ffn_hidden_size": 64}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "zero_expert_num": 0, "moe_topk": 2, "expert_ffn_hidden_size": width}
    return request({"model_type": "longcat_flash", **sizes, **latent, **experts}, peft=None)


def test_where_sizes_depend_on_the_choice_of_experts_a_trace_states_the_worst_case(client: TestClient) -> None:
    asked = one_by_one(2048)
    traced = client.post("/v1/trace", json=asked).json()
    (stated,) = (warning["message"] for warning in traced["warnings"] if warning["code"] == "expert_routing")
    worst, balanced = re.findall(r"([\d.]+) MiB", stated)
    assert float(balanced) == pytest.approx(traced["peak"]["allocated_bytes"] / 2**20, abs=1)
    assert float(worst) > float(balanced)
    assert "expert_routing" in notices(answer({**asked, "engine": "trace"}))


def test_an_answer_stands_where_only_the_trace_of_the_worst_choice_of_experts_fails(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, runs = one_by_one(1024), Inspector.run

    def run_balanced(self: Inspector, task: str, payload: Mapping[str, Any], **limits: Any) -> Any:
        if payload.get("routing") == "worst":
            raise InspectionLimitError("tracing the step took longer than 60 s and was stopped", field="model")
        return runs(self, task, payload, **limits)

    monkeypatch.setattr(Inspector, "run", run_balanced)
    response = client.post("/v1/trace", json=asked)
    assert response.status_code == 200, response.text
    traced = response.json()
    estimated = answer({**asked, "engine": "trace"})
    assert traced["peak"]["allocated_bytes"] == pytest.approx(estimated["peak"]["allocated_bytes"], abs=2048)
    for answered in (traced, estimated):
        (stated,) = (warning["message"] for warning in answered["warnings"] if warning["code"] == "expert_routing")
        assert stated.endswith("is not known, since that trace failed: tracing the step took longer than 60 s and was stopped.")


def test_the_picture_is_an_svg_with_the_peak_named(client: TestClient) -> None:
    response = client.post("/v1/trace?format=svg", json=request(LLAMA))
    assert response.headers["content-type"].startswith("image/svg+xml")
    root = ET.fromstring(response.text)
    assert root.tag.endswith("svg")
    assert any("peak" in (text.text or "") for text in root.iter() if text.tag.endswith("text"))


def test_pytorchs_viewer_reads_the_snapshot(client: TestClient) -> None:
    response = client.post("/v1/trace?format=snapshot&alloc_conf=expandable_segments:True", json=request(LLAMA))
    assert response.headers["content-type"] == "application/octet-stream"
    snapshot = pickle.load(io.BytesIO(response.content))
    assert "expandable_segments" in snapshot["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"]
    assert viewer.segsum(snapshot)
    assert "free completed" in viewer.trace(snapshot)


@pytest.mark.parametrize(
    ("path", "changes", "field"),
    [
        ("/v1/trace?format=png", {}, "format"),
        ("/v1/trace?alloc_conf=max_split:1", {}, "PYTORCH_CUDA_ALLOC_CONF"),
        ("/v1/trace", {"training": None}, "training"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(client: TestClient, path: str, changes: dict[str, Any], field: str) -> None:
    response = client.post(path, json=request(LLAMA, **changes))
    assert response.status_code == 422
    assert field in response.text


def test_the_command_line_shows_the_timeline_and_writes_both_files(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(request(LLAMA)))
    svg, snapshot = tmp_path / "timeline.svg", tmp_path / "snapshot.pickle"
    done = run("trace", "--request", str(tmp_path / "request.json"), "--svg", str(svg), "--snapshot", str(snapshot))
    assert done.returncode == 0, done.stderr
    assert "Peak" in done.stdout
    assert "backward" in done.stdout
    assert svg.read_text().lstrip().startswith("<svg")
    assert pickle.loads(snapshot.read_bytes())["device_traces"][0]


def test_experts_that_change_nothing_worth_showing_are_told_so() -> None:
    assert "would be 0.50 GiB too" in routing_notice(lambda: 2**29 + 1, 2**29).message
    assert "would be 1.00 GiB instead of 0.50 GiB" in routing_notice(lambda: 2**30, 2**29).message
