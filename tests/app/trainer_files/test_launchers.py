"""DeepSpeed's JSON, accelerate's YAML, FSDP's options and PEFT's adapter_config.json, alone and with training files."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.answer import Json
from app.reading import read_estimate
from app.trainer_files.opening import opened
from estimator.errors import RequestError

ZERO3: Json = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 5e7,
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
FSDP: Json = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": False,
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_activation_checkpointing": True,
    },
    "mixed_precision": "bf16",
    "num_machines": 1,
    "num_processes": 4,
    "use_cpu": False,
}
SFT: Json = {"model_name_or_path": "Qwen/Qwen2.5-7B", "dataset_name": "some/data", "max_length": 1024, "per_device_train_batch_size": 2}


def _opened(**files: Json) -> Json:
    return opened({"files": [{"name": name, "content": content} for name, content in files.items()]})


def test_a_deepspeed_json_says_who_holds_what() -> None:
    hardware = _opened(zero3=ZERO3)["hardware"]
    assert hardware == {
        "strategy": "zero3",
        "deepspeed": {
            "zero_optimization": {
                "stage": 3,
                "offload_optimizer": {"device": "cpu"},
                "offload_param": {"device": "none"},
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": 50_000_000,
                "stage3_max_live_parameters": 1_000_000_000,
                "stage3_param_persistence_threshold": "auto",
                "overlap_comm": True,
                "contiguous_gradients": True,
            }
        },
    }


def test_every_key_of_a_deepspeed_json_is_accounted_for() -> None:
    found = _opened(zero3={**ZERO3, "zero_optimization": {**ZERO3["zero_optimization"], "zero_quantized_weights": True}, "odd": 1})[
        "set_aside"
    ]
    assert set(found["not_modelled"]) == {"zero3: zero_optimization.zero_quantized_weights", "zero3: odd"}
    assert {"zero3: zero_optimization.sub_group_size", "zero3: zero_optimization.offload_optimizer.pin_memory"} <= set(found["ignored"])


def test_numbers_must_agree_with_the_trainers_as_transformers_wants_them_to() -> None:
    assert _opened(sft=SFT, zero3={**ZERO3, "train_micro_batch_size_per_gpu": 2})["training"]["per_device_train_batch_size"] == 2
    with pytest.raises(RequestError, match="sft: per_device_train_batch_size: 2 contradicts 4 of zero3: train_micro_batch_size_per_gpu"):
        _opened(sft=SFT, zero3={**ZERO3, "train_micro_batch_size_per_gpu": 4})


def test_deepspeeds_own_optimizer_stands_above_the_trainers() -> None:
    request = _opened(sft={**SFT, "optim": "paged_adamw_8bit"}, zero3={**ZERO3, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}})
    assert request["training"]["optim"] == "adamw_torch_fused"
    with pytest.raises(RequestError, match=r"optimizer\.type: OneBitAdam is not accepted; expected Adam or AdamW"):
        _opened(zero3={**ZERO3, "optimizer": {"type": "OneBitAdam"}})


def test_offloading_to_a_disk_is_not_modelled() -> None:
    with pytest.raises(RequestError, match=r"offload_param\.device: 'nvme' is not known; accepted: cpu, none"):
        _opened(zero3={"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}})


def test_accelerates_fsdp_brings_ranks_precision_and_checkpoints() -> None:
    request = _opened(launch=FSDP, args={"output_dir": "out", "per_device_train_batch_size": 1})
    assert request["hardware"] == {
        "num_gpus": 4,
        "strategy": "fsdp",
        "fsdp_config": {"version": 2, "reshard_after_forward": True, "cpu_offload": False},
    }
    training = request["training"]
    assert (training["bf16"], training["gradient_checkpointing"], training["gradient_checkpointing_kwargs"]) == (
        True,
        True,
        {"use_reentrant": False},
    )


@pytest.mark.parametrize(
    ("config", "read"),
    [
        ({}, {}),
        ({"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, {"reshard_after_forward": False}),
        ({"fsdp_sharding_strategy": 2, "fsdp_backward_prefetch": 1}, {"reshard_after_forward": False, "backward_prefetch": "BACKWARD_PRE"}),
        ({"fsdp_backward_prefetch_policy": "no_prefetch", "fsdp_use_orig_params": "false"}, {"use_orig_params": False}),
        ({"fsdp_reshard_after_forward": "SHARD_GRAD_OP", "fsdp_offload_params": True}, {"cpu_offload": True}),
    ],
)
def test_accelerates_fsdp_is_version_1_where_it_does_not_say(config: Json, read: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to accelerate's own plugin, made of the environment that its launcher makes of the file."""
    utils: Any = pytest.importorskip("accelerate.utils")
    hardware = _opened(launch={**FSDP, "fsdp_config": config})["hardware"]
    ours = {"version": 1, "reshard_after_forward": True, "use_orig_params": True, "cpu_offload": False, **hardware["fsdp_config"]}
    assert ours == {**ours, **read}
    for key, value in {"fsdp_sharding_strategy": "FULL_SHARD", "fsdp_use_orig_params": "true", **config}.items():
        monkeypatch.setenv(key.upper().removesuffix("_POLICY"), str(value))
    theirs = utils.FullyShardedDataParallelPlugin()
    prefetch = theirs.backward_prefetch
    assert ours == {
        "version": theirs.fsdp_version,
        "reshard_after_forward": theirs.sharding_strategy.name == "FULL_SHARD",
        "use_orig_params": theirs.use_orig_params,
        "cpu_offload": theirs.cpu_offload.offload_params,
        **({"backward_prefetch": "NO_PREFETCH" if prefetch is None else prefetch.name} if "backward_prefetch" in ours else {}),
    }


def test_fsdp_of_training_arguments_is_version_2() -> None:
    arguments = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": False},
    }
    hardware = _opened(sft={**SFT, **arguments})["hardware"]
    assert hardware == {"strategy": "fsdp", "fsdp_config": {"version": 2, "reshard_after_forward": False}}
    assert _opened(sft={**SFT, **arguments, "fsdp_config": "fsdp.json"}, **{"fsdp.json": arguments["fsdp_config"]})["hardware"] == hardware


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distributed_type": "MEGATRON_LM"}, "distributed_type: 'MEGATRON_LM' is not known"),
        ({"fsdp_config": {"fsdp_version": 3}}, "version: 3 is not accepted; expected 1 or 2"),
        ({"fsdp_config": {"fsdp_sharding_strategy": "HYBRID_SHARD"}}, "sharding_strategy: HYBRID_SHARD is not accepted"),
        ({"fsdp_config": {"fsdp_sharding_strategy": 3}}, "sharding_strategy: 3 is not accepted"),
        ({"fsdp_config": {"fsdp_backward_prefetch": "BACKWARD"}}, "expected BACKWARD_PRE, BACKWARD_POST, NO_PREFETCH"),
        ({"use_cpu": True}, "use_cpu: True is not modelled"),
        ({"num_proceses": 2}, "not a known field of accelerate; did you mean 'num_processes'"),
    ],
)
def test_what_a_launcher_asks_for_beyond_that_is_refused(changes: Json, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _opened(launch={**FSDP, **changes})


@pytest.mark.parametrize("content", [FSDP, {**FSDP, "distributed_type": "MULTI_GPU", "fsdp_config": {}}], ids=["fsdp", "ddp"])
def test_accelerates_own_loader_reads_the_same(content: Json, tmp_path: Path) -> None:
    config_args: Any = pytest.importorskip("accelerate.commands.config.config_args")
    path = tmp_path / "launch.yaml"
    path.write_text(yaml.safe_dump(content))
    theirs = config_args.load_config_from_file(str(path))
    hardware = _opened(launch=content)["hardware"]
    assert hardware["num_gpus"] == theirs.num_processes
    assert hardware["strategy"] == {"FSDP": "fsdp", "MULTI_GPU": "ddp"}[theirs.distributed_type.value]


def test_an_adapter_config_brings_its_model(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    peft.LoraConfig(r=24, target_modules=["q_proj", "v_proj"], base_model_name_or_path="Qwen/Qwen2.5-7B", lora_dropout=0.1).save_pretrained(
        tmp_path
    )
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    question = read_estimate(_opened(adapter=content))
    assert question.request.model == "Qwen/Qwen2.5-7B"
    assert question.request.peft is not None
    assert question.request.peft.r == 24
    assert set(question.request.peft.target_modules or ()) == {"q_proj", "v_proj"}
    assert "peft.lora_alpha" in question.ignored
    both = opened({"files": [{"name": "adapter", "content": content}], "model": "Qwen/Qwen2.5-0.5B"})
    assert both["model"] == "Qwen/Qwen2.5-0.5B"


def test_an_adapter_stands_beside_training_arguments_and_against_another_adapter() -> None:
    adapter = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "Qwen/Qwen2.5-7B"}
    assert _opened(sft=SFT, adapter=adapter)["peft"]["r"] == 8
    with pytest.raises(RequestError, match="adapter: r: 8 contradicts 16 of sft: lora_r"):
        _opened(sft={**SFT, "use_peft": True}, adapter=adapter)


def test_two_training_files_are_refused() -> None:
    with pytest.raises(RequestError, match="a second training file beside one"):
        _opened(one=SFT, two=SFT)


def test_several_gpus_without_a_strategy_are_ddp_where_a_trainer_launches_them() -> None:
    assert opened({"files": [{"name": "sft", "content": SFT}], "hardware": {"num_gpus": 2}})["hardware"]["strategy"] == "ddp"
    assert "hardware" not in _opened(sft=SFT)
