"""YAMLs of axolotl. Facts are those of axolotl 0.19.0; its own schema is asked where it can be imported."""

from typing import Any

import pytest
import yaml

from app.answer import Json
from app.reading import read_estimate
from app.trainer_files.opening import opened
from estimator.errors import RequestError

QLORA: Json = {
    "base_model": "meta-llama/Llama-3.1-8B",
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "sequence_len": 4096,
    "sample_packing": True,
    "attn_implementation": "flash_attention_2",
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "optimizer": "adamw_bnb_8bit",
    "learning_rate": "2e-4",
    "bf16": "auto",
    "gradient_checkpointing": True,
    "output_dir": "./out",
    "wandb_project": None,
    "datasets": [{"path": "some/data", "type": "alpaca"}],
}
FULL: Json = {
    "base_model": "HuggingFaceTB/SmolLM2-1.7B",
    "sequence_len": 2048,
    "learning_rate": 1e-5,
    "flash_attention": True,
    "datasets": [{"path": "some/data", "type": "alpaca"}],
}


def _opened(values: Json, **others: Json) -> Json:
    files = [{"name": "train.yaml", "content": values}, *({"name": f"{name}.json", "content": content} for name, content in others.items())]
    return opened({"files": files})


def test_qlora_means_nf4_with_nested_constants_in_the_type_of_the_weights() -> None:
    request = _opened(QLORA)
    assert request["quantization"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "bfloat16",
    }
    assert request["dtype"] == "bfloat16"
    assert request["peft"] == {"r": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
    assert request["prepare_model_for_kbit_training"] is False
    read_estimate(request)


def test_packed_samples_lie_in_one_row_under_flash_attention_alone() -> None:
    flash, sdpa = _opened(QLORA), _opened({**QLORA, "attn_implementation": "sdpa"})
    assert flash["training"]["padding_free"]
    assert "padded" not in flash
    assert "padding_free" not in sdpa["training"]
    assert sdpa["padded"]
    assert "train.yaml: sdpa_varlen" in sdpa["set_aside"]["not_modelled"]


@pytest.mark.parametrize(
    ("changes", "padded", "multiple"),
    [
        ({"micro_batch_size": 1}, True, 64),
        ({"micro_batch_size": 1, "pad_to_sequence_len": True}, True, 64),
        ({"micro_batch_size": 2}, True, 64),
        ({"micro_batch_size": 1, "pad_to_sequence_len": False}, False, None),
        ({"micro_batch_size": 2, "pad_to_sequence_len": False}, True, None),
        ({"micro_batch_size": 1, "pad_to_multiple_of": 8}, True, 8),
    ],
)
def test_batches_are_filled_to_a_multiple_of_64(changes: Json, padded: bool, multiple: int | None) -> None:
    request = _opened({**FULL, **changes})
    assert request["padded"] is padded
    assert request["training"].get("pad_to_multiple_of") == multiple


def test_defaults_are_those_of_the_schema() -> None:
    request = _opened({"base_model": "HuggingFaceTB/SmolLM2-1.7B"})
    training = request["training"]
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"], training["max_length"]) == (1, 1, 512)
    assert (training["optim"], training["gradient_checkpointing"], training["bf16"]) == ("adamw_torch_fused", False, True)
    assert "peft" not in request
    assert "quantization" not in request


@pytest.mark.parametrize(
    ("changes", "dtype", "bf16", "fp16"),
    [
        ({}, "bfloat16", True, False),
        ({"bf16": "auto", "fp16": True}, "float16", False, True),
        ({"bf16": False, "fp16": True}, "float16", False, True),
        ({"bf16": False}, "float32", False, False),
        ({"bf16": False, "bfloat16": True}, "bfloat16", True, False),
        ({"bf16": "full"}, "bfloat16", False, False),
    ],
)
def test_the_type_of_the_weights_follows_the_precision(changes: Json, dtype: str, bf16: bool, fp16: bool) -> None:
    request = _opened({**FULL, **changes})
    assert (request["dtype"], request["training"]["bf16"], request["training"]["fp16"]) == (dtype, bf16, fp16)


@pytest.mark.parametrize(
    ("changes", "reentrant"),
    [
        ({"gradient_checkpointing": True}, True),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, False),
        ({"gradient_checkpointing": False}, None),
    ],
)
def test_checkpoints_are_reentrant_unless_it_says_otherwise(changes: Json, reentrant: bool | None) -> None:
    training = _opened({**FULL, **changes})["training"]
    assert training.get("gradient_checkpointing_kwargs", {}).get("use_reentrant") is reentrant


def test_fused_adapter_kernels_are_reported_since_axolotl_turns_them_on() -> None:
    def names(changes: Json) -> set[str]:
        return {key for key in _opened({**QLORA, **changes})["set_aside"].get("not_modelled", {}) if "kernel" in key}

    off = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False)
    assert len(names({})) == 1
    assert not names(off)
    assert names({**off, "lora_o_kernel": True}) == {"train.yaml: lora_o_kernel"}
    assert not names({"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True})


def test_keys_of_a_plugin_count_where_it_is_listed() -> None:
    fused = {"liger_fused_linear_cross_entropy": True, "liger_rms_norm": True}
    listed = _opened({**FULL, **fused, "plugins": ["axolotl.integrations.liger.LigerPlugin"]})
    assert listed["training"]["use_liger_kernel"]
    assert "train.yaml: liger_rms_norm" in listed["set_aside"]["not_modelled"]
    without = _opened({**FULL, **fused})
    assert "use_liger_kernel" not in without["training"]
    assert len(without["set_aside"]["assumed"]) == 2
    cut = _opened({**FULL, "plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]})
    assert "train.yaml: cut_cross_entropy" in cut["set_aside"]["not_modelled"]


def test_full_fine_tuning_without_a_flash_attention_keeps_modules_in_float32() -> None:
    assert "train.yaml: attn_implementation" in _opened({**FULL, "flash_attention": False})["set_aside"]["not_modelled"]
    assert "not_modelled" not in _opened(FULL)["set_aside"]


def test_evaluation_needs_data_and_a_time() -> None:
    assert _opened({**FULL, "val_set_size": 0.1, "evals_per_epoch": 4})["training"]["eval_strategy"] == "steps"
    assert "eval_strategy" not in _opened({**FULL, "val_set_size": 0, "evals_per_epoch": 4})["training"]
    assert "eval_strategy" not in _opened({**FULL, "val_set_size": 0.1})["training"]


def test_a_deepspeed_file_is_found_by_the_name_the_yaml_gives_it() -> None:
    zero = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}
    hardware = _opened({**FULL, "deepspeed": "deepspeed_configs/zero2.json"}, zero2=zero)["hardware"]
    assert hardware["strategy"] == "zero2"
    assert hardware["deepspeed"]["zero_optimization"]["overlap_comm"] is True
    assert _opened({**FULL, "deepspeed": zero})["hardware"] == hardware
    with pytest.raises(RequestError, match="give it as another file"):
        _opened({**FULL, "deepspeed": "deepspeed_configs/zero2.json"})


def test_fsdp_is_version_1_unless_it_says_otherwise() -> None:
    config = {"fsdp_offload_params": True, "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    hardware = _opened({**FULL, "fsdp_version": 2, "fsdp_config": config})["hardware"]
    assert hardware["strategy"] == "fsdp"
    assert hardware["fsdp_config"] == {"version": 2, "cpu_offload": True}
    old = _opened({**FULL, "fsdp_config": {**config, "fsdp_sharding_strategy": "SHARD_GRAD_OP", "fsdp_use_orig_params": False}})["hardware"]
    assert old["fsdp_config"] == {"version": 1, "cpu_offload": True, "reshard_after_forward": False, "use_orig_params": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "qlora", "load_in_4bit": False}, "qlora needs load_in_4bit"),
        ({"adapter": "lora"}, "adapter: qlora alone"),
        ({"adapter": None}, "needs an adapter"),
        ({"adapter": "ia3"}, "adapter: 'ia3' is not known; accepted: lora, qlora"),
        ({"lora_r": None}, "lora_r: is required"),
        ({"lora_target_linear": False}, "lora_target_modules: is required"),
        ({"lora_target_modules": ["lm_head"]}, "'lm_head' beside lora_target_linear"),
        ({"optimizer": "muon"}, "optimizer: 'muon' is not known; accepted: adafactor"),
        ({"attn_implementation": "xformers"}, "attn_implementation: xformers is not accepted"),
        ({"flash_attention": True}, "contradicts attn_implementation"),
        ({"rl": "dpo"}, "rl: dpo is not modelled"),
        ({"gptq": True}, "gptq: True is not modelled"),
        ({"micro_batch_size": "two"}, "micro_batch_size: two is not accepted; expected a whole number"),
        ({"bf16": "yes"}, "bf16: yes is not accepted"),
        ({"gradient_checkpointing": "unsloth"}, "expected true, false, offload"),
        ({"model_type": "AutoModelForSequenceClassification"}, "expected AutoModelForCausalLM"),
    ],
)
def test_what_cannot_be_translated_is_an_error_that_names_it(changes: Json, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _opened({**QLORA, **changes})


def test_no_key_is_dropped_in_silence() -> None:
    odd = {"lora_modules_to_sav": ["lm_head"], "neftune_noise_alpha": 5, "torch_compile": True, "context_parallel_size": 1, "relora": None}
    found = _opened({**FULL, **odd})["set_aside"]
    named = {*found["ignored"], *found["not_modelled"]}
    assert {f"train.yaml: {key}" for key, value in {**FULL, **odd}.items() if value is not None} - named == {
        f"train.yaml: {key}" for key in ("base_model", "sequence_len", "flash_attention")
    }
    assert "did you mean 'lora_modules_to_save'" in found["not_modelled"]["train.yaml: lora_modules_to_sav"]


@pytest.mark.parametrize("values", [QLORA, FULL], ids=["qlora", "full"])
def test_axolotls_own_schema_reads_the_same(values: Json) -> None:
    schema: Any = pytest.importorskip("axolotl.utils.schemas.config")
    theirs = schema.AxolotlInputConfig(**yaml.safe_load(yaml.safe_dump(values)))
    training = _opened(values)["training"]
    assert training["per_device_train_batch_size"] == theirs.micro_batch_size
    assert training["gradient_accumulation_steps"] == theirs.gradient_accumulation_steps
    assert training["max_length"] == theirs.sequence_len
    assert training["optim"] == theirs.optimizer
    assert training["gradient_checkpointing"] == theirs.gradient_checkpointing
    assert _opened(values).get("attn_implementation") == theirs.attn_implementation
    assert ("padding_free" in training) == bool(theirs.sample_packing and theirs.attn_supports_packing)
