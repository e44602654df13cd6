"""`fsdp`, `deepspeed` and `ddp_*` of TrainingArguments in a request."""

import json
from pathlib import Path
from typing import Any

import pytest

from app import examples
from app.answer import Json
from app.check import check
from app.plan import plan
from app.reading import read_estimate
from app.request_file import read_request
from app.service import answer, prepare
from app.settings import applied
from app.shortfall import Shortage
from estimator.errors import RequestError
from tests.app.test_service import codes

FULL: Json = {
    "model": "HuggingFaceTB/SmolLM2-1.7B",
    "dtype": "bfloat16",
    "training": {"per_device_train_batch_size": 1, "max_length": 512, "bf16": True, "gradient_checkpointing": True},
}
ZERO3: Json = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}, "reduce_bucket_size": "auto"},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": 1.0,
}


def _with(training: Json, hardware: Json | None = None, **changes: Any) -> Json:
    own = {} if hardware is None else {"hardware": hardware}
    return {**FULL, **own, **changes, "training": {**FULL["training"], **training}}


def _read(training: Json, hardware: Json | None = None, **changes: Any) -> Any:
    return read_estimate(_with(training, hardware, **changes)).request.hardware


@pytest.mark.parametrize(
    ("fsdp", "config"),
    [
        ("full_shard auto_wrap", {}),
        ("shard_grad_op", {}),
        ("full_shard offload", {"reshard_after_forward": "false"}),
        (["shard_grad_op", "offload"], {"fsdp_reshard_after_forward": True}),
        (True, {"cpu_offload": True, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}),
        (True, None),
        ("full_shard", {"version": 1, "backward_prefetch": "backward_pre"}),
        (True, {"fsdp_version": 1, "use_orig_params": "false"}),
        ("", {}),
        (False, {"cpu_offload": True}),
    ],
)
def test_fsdp_is_read_as_the_trainer_reads_it(fsdp: Any, config: Json | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to what transformers hands to accelerate."""
    transformers: Any = pytest.importorskip("transformers")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # which it sets
    own = json.loads(json.dumps(config))  # which it changes
    theirs = transformers.TrainingArguments(output_dir="out", report_to=[], fsdp=fsdp, fsdp_config=own).fsdp_plugin_args
    hardware = _read({"fsdp": fsdp, "fsdp_config": config}, {"num_gpus": 2} if fsdp else None)
    if theirs is None:
        assert hardware is None
        return
    ours = hardware.fsdp_config
    assert (hardware.strategy, ours.version, ours.cpu_offload) == ("fsdp", theirs["fsdp_version"], theirs.get("cpu_offload", False))
    if ours.version == 2:
        assert ours.reshard_after_forward == theirs["reshard_after_forward"]
    else:
        assert (ours.use_orig_params, ours.backward_prefetch) == (theirs["use_orig_params"], theirs["backward_prefetch"])


def test_a_version_of_transformers_says_which_fsdp_it_means() -> None:
    read = {
        version: _read({"fsdp": "shard_grad_op auto_wrap"}, {"num_gpus": 2}, stack={"transformers": version})
        for version in ("4.57", "5.0", "5.3", "5.9", "5.10")
    }
    assert [hardware.fsdp_config.version for hardware in read.values()] == [1, 1, 1, 1, 2]
    # accelerate passes over what transformers since 5.4 hands on to FSDP1
    assert [hardware.fsdp_config.reshard_after_forward for hardware in read.values()] == [False, False, False, True, False]
    assert "read_from_file" in codes(answer(_with({"fsdp": "shard_grad_op auto_wrap"}, {"num_gpus": 2}, stack={"transformers": "5.9"})))


@pytest.mark.parametrize(("version", "number", "reshards"), [("4.57", 1, True), ("5.0", 2, False), ("5.3", 2, False), ("5.4", 2, True)])
def test_what_a_version_of_transformers_makes_of_an_asked_fsdp2(version: str, number: int, reshards: bool) -> None:
    """4.57 does not read `version`; 5.0 to 5.3 keep parameters gathered where nothing is said."""
    asked = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}}
    found = _read(asked, {"num_gpus": 2}, stack={"transformers": version}).fsdp_config
    assert (found.version, found.reshard_after_forward) == (number, reshards)


@pytest.mark.parametrize("words", ["offload", "full_shard shard_grad_op auto_wrap"])
def test_words_that_trainers_refuse_together_or_alone_are_refused_for_their_versions(words: str) -> None:
    with pytest.raises(RequestError, match=r"training\.fsdp: .*one of full_shard and shard_grad_op"):
        _read({"fsdp": words}, {"num_gpus": 2}, stack={"transformers": "5.9"})
    assert _read({"fsdp": words}, {"num_gpus": 2}, stack={"transformers": "5.10"}).strategy == "fsdp"


def test_without_auto_wrap_older_trainers_make_one_unit_of_the_model() -> None:
    asked = _with({"fsdp": "full_shard"}, {"num_gpus": 2}, stack={"transformers": "4.57"})
    assert any("the whole model is one unit" in w["message"] for w in answer(asked)["warnings"])


def test_deepspeed_is_read_from_what_it_holds_and_what_has_no_bearing_is_listed() -> None:
    inline, text = (_with({"deepspeed": value}, {"num_gpus": 4}) for value in (ZERO3, json.dumps(ZERO3)))
    found = answer(inline)
    assert (found["recipe"]["strategy"], found["host_bytes"] > 0) == ("zero3", True)
    assert {"training.deepspeed.gradient_clipping", "training.deepspeed.zero_optimization.offload_optimizer.pin_memory"} <= set(
        found["ignored"]
    )
    assert answer(text) == found
    named = _with({}, {"num_gpus": 4, "strategy": "zero3", "deepspeed": ZERO3})
    assert answer(named)["phases"] == found["phases"]


@pytest.mark.parametrize(
    ("training", "hardware", "message"),
    [
        ({"fsdp": "full_shard"}, {"strategy": "ddp"}, r"training\.fsdp: fsdp contradicts ddp of hardware\.strategy"),
        ({"deepspeed": ZERO3}, {"strategy": "zero2"}, r"training\.deepspeed\.zero_optimization\.stage: zero3 contradicts zero2"),
        (
            {"deepspeed": ZERO3},
            {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "none"}}}},
            r"offload_optimizer\.device: cpu contradicts none of hardware\.deepspeed\.zero_optimization\.offload_optimizer\.device",
        ),
        (
            {"fsdp": True, "fsdp_config": {"cpu_offload": True}},
            {"fsdp_config": {"cpu_offload": False}},
            r"training\.fsdp_config\.cpu_offload: True contradicts False of hardware\.fsdp_config\.cpu_offload",
        ),
        (
            {"ddp_bucket_cap_mb": 50},
            {"strategy": "ddp", "ddp": {"bucket_cap_mb": 25}},
            r"training\.ddp_bucket_cap_mb: 50 contradicts 25 of hardware\.ddp\.bucket_cap_mb",
        ),
        (
            {"deepspeed": {**ZERO3, "train_micro_batch_size_per_gpu": 4}},
            {},
            r"train_micro_batch_size_per_gpu: 4 contradicts 1 of training\.per_device_train_batch_size",
        ),
        ({"fsdp": True, "deepspeed": ZERO3}, {}, r"training\.deepspeed: together with training\.fsdp transformers refuses it"),
        ({"deepspeed": "zero3.json"}, {}, r"training\.deepspeed: 'zero3\.json' is a path, and a request reads no files"),
        ({"fsdp": True, "fsdp_config": "fsdp.json"}, {}, r"training\.fsdp_config: 'fsdp\.json' is a path"),
        ({"deepspeed": "{"}, {}, r"training\.deepspeed: '{' is not JSON"),
        ({"fsdp": "hybrid_shard"}, {}, r"training\.fsdp: 'hybrid_shard' is not modelled; accepted: full_shard"),
        ({"fsdp": "full"}, {}, r"training\.fsdp: 'full' is not known"),
        ({"fsdp": 7}, {}, r"training\.fsdp: 7 is not accepted"),
    ],
)
def test_what_contradicts_or_is_not_modelled_is_refused_with_both_fields(training: Json, hardware: Json, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _read(training, {"num_gpus": 4, **hardware})


def test_ddp_options_bear_on_ddp_alone() -> None:
    options = {"ddp_bucket_cap_mb": 50, "ddp_find_unused_parameters": False, "ddp_static_graph": True, "ddp_broadcast_buffers": False}
    several = read_estimate(_with(options, {"num_gpus": 2}))
    hardware = several.request.hardware
    assert hardware is not None
    assert (hardware.strategy, hardware.ddp.bucket_cap_mb, hardware.ddp.find_unused_parameters, hardware.ddp.static_graph) == (
        "ddp",
        50,
        False,
        True,
    )
    assert several.ignored == ("training.ddp_broadcast_buffers",)
    alone = answer(_with(options))
    assert alone["recipe"]["strategy"] == "single"
    assert {f"training.{name}" for name in options} <= set(alone["ignored"])


@pytest.mark.parametrize("training", [{"fsdp": True}, {"deepspeed": ZERO3}])
def test_on_one_gpu_the_answer_is_of_one_process_and_says_so(training: Json) -> None:
    found = answer(_with(training))
    assert found["recipe"]["num_gpus"] == 1
    assert "one_rank" in codes(found)
    assert "one_rank" not in codes(answer(_with(training, {"num_gpus": 2})))


def test_more_cards_are_offered_to_what_shares_out() -> None:
    asked = _with({"fsdp": True}, {"gpu": "rtx4060"})
    case = prepare(read_estimate(asked))
    shortage = Shortage(case=case, estimate=case.answerer.estimate(case.recipe), payload=asked, global_batch=8)
    more = [lever.set for lever in shortage.all_levers() if lever.family == "num_gpus"]
    assert [setting["hardware.num_gpus"] for setting in more] == [2, 4, 8]
    assert not any("hardware.strategy" in setting for setting in more)
    assert [answer(applied(asked, setting))["recipe"]["num_gpus"] for setting in more] == [2, 4, 8]


def test_sizes_of_a_deepspeed_file_do_not_keep_a_plan_from_its_own() -> None:
    asked = _with({"deepspeed": {**ZERO3, "gradient_accumulation_steps": 2}, "max_length": 8192}, {"gpu": "rtx3060-12", "num_gpus": 2})
    asked["training"].pop("per_device_train_batch_size")
    found = plan({**asked, "global_batch_size": 8})
    assert found["plan"] is not None or found["shortfall"]["changes"]


def test_the_command_line_reads_the_file_beside_the_request(tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO3))
    path = tmp_path / "request.json"
    path.write_text(json.dumps(_with({"deepspeed": "configs/zero3.json"}, {"num_gpus": 4})))
    assert read_request(str(path)) == _with({"deepspeed": ZERO3}, {"num_gpus": 4})
    path.write_text(json.dumps(_with({"deepspeed": "other.json"})))
    with pytest.raises(RequestError, match=r"training\.deepspeed: 'other\.json' is not found"):
        read_request(str(path))


def test_a_check_of_pasted_arguments_finds_changes() -> None:
    qlora = {**examples.QLORA, "hardware": {"gpu": "rtx4090", "num_gpus": 2}}
    found = check({**qlora, "training": {**qlora["training"], "deepspeed": {"zero_optimization": {"stage": 2}}}})
    assert found["verdict"] == "does_not_fit"
    assert found["change"] is not None
