"""Defaults, resolved as each version of the libraries would."""

import dataclasses
from typing import Any

import pytest

from app.reading import read_estimate
from app.resolution import resolve_recipe
from app.service import answer
from estimator.dtypes import DType
from estimator.errors import RequestError, UnknownNameError
from estimator.inventory import Inventory
from estimator.recipe import Attention, Loss, QuantizationKind, Recipe
from estimator.sources.resolve import resolve as resolve_model

LLAMA = "meta-llama/Llama-3.1-8B"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LORA = {"r": 8, "target_modules": ["q_proj"]}
NOW = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2", "trl": "1.16.0"}


def inventory(model: str = LLAMA) -> Inventory:
    return resolve_model(model).inventory


def recipe(model: str = LLAMA, *, stack: dict[str, str] | None = None, **payload: Any) -> Recipe:
    question = read_estimate({"model": model, "stack": {**NOW, **(stack or {})}, **payload})
    return resolve_recipe(question.request, inventory(model), None)


def training(model: str = LLAMA, *, stack: dict[str, str] | None = None, **fields: Any) -> Any:
    trainer = fields.pop("trainer", "transformers")
    return recipe(model, stack=stack, trainer=trainer, training={"max_length": 512, **fields}).training


@pytest.mark.parametrize(
    ("transformers", "payload", "expected"),
    [
        ("5.23", {}, DType.BFLOAT16),
        ("4.57", {}, DType.FLOAT32),
        ("4.57", {"quantization": NF4}, DType.FLOAT16),
        ("5.23", {"quantization": NF4}, DType.BFLOAT16),
        ("4.57", {"dtype": "auto"}, DType.BFLOAT16),
        ("5.23", {"dtype": "torch.float16"}, DType.FLOAT16),
    ],
)
def test_dtype_defaults_follow_the_version_of_transformers(transformers: str, payload: dict[str, Any], expected: DType) -> None:
    assert recipe(stack={"transformers": transformers}, **payload).dtype is expected


def test_a_model_id_in_sft_trainer_is_loaded_in_float32_since_trl_0_27() -> None:
    run: dict[str, Any] = {"trainer": "trl", "training": {}}
    assert recipe(**run).dtype is DType.FLOAT32
    assert recipe(stack={"trl": "0.26.2"}, **run).dtype is DType.BFLOAT16
    assert recipe(dtype="bfloat16", **run).dtype is DType.BFLOAT16


@pytest.mark.parametrize(("trl", "expected"), [("0.19.1", None), ("0.20.0", DType.BFLOAT16), ("1.16.0", DType.BFLOAT16)])
def test_sft_config_turns_bf16_on_since_0_20(trl: str, expected: DType | None) -> None:
    assert training(trainer="trl", stack={"trl": trl}).autocast_dtype is expected
    assert training(trainer="trl", stack={"trl": trl}, fp16=True).autocast_dtype is DType.FLOAT16


@pytest.mark.parametrize(("trl", "expected"), [("0.21.0", False), ("0.22.0", True), ("1.16.0", True)])
def test_sft_config_turns_checkpointing_on_since_0_22(trl: str, expected: bool) -> None:
    assert training(trainer="trl", stack={"trl": trl}).gradient_checkpointing is expected


def test_defaults_equal_those_of_the_installed_training_arguments() -> None:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(output_dir="out", use_cpu=True)
    resolved = training()
    assert resolved.micro_batch_size == arguments.per_device_train_batch_size
    assert resolved.gradient_accumulation_steps == arguments.gradient_accumulation_steps
    assert resolved.optimizer == arguments.optim
    assert (resolved.autocast_dtype is DType.BFLOAT16) == arguments.bf16
    assert resolved.gradient_checkpointing == arguments.gradient_checkpointing


def test_defaults_equal_those_of_the_installed_sft_config() -> None:
    trl = pytest.importorskip("trl")
    arguments = trl.SFTConfig(output_dir="out", use_cpu=True)
    resolved = recipe(trainer="trl", training={}).training
    assert resolved is not None
    assert resolved.micro_batch_size == arguments.per_device_train_batch_size
    assert resolved.sequence_length == arguments.max_length
    assert resolved.optimizer == arguments.optim
    assert (resolved.autocast_dtype is DType.BFLOAT16) == arguments.bf16
    assert resolved.gradient_checkpointing == arguments.gradient_checkpointing


@pytest.mark.parametrize(
    ("transformers", "torch", "expected"),
    [
        ("5.23", "2.13", "adamw_torch_fused"),
        ("4.57", "2.8", "adamw_torch_fused"),
        ("4.57", "2.7", "adamw_torch"),
        ("4.51", "2.8", "adamw_torch"),
    ],
)
def test_the_default_optimizer_follows_transformers_and_torch(transformers: str, torch: str, expected: str) -> None:
    assert training(stack={"transformers": transformers, "torch": torch}).optimizer == expected


@pytest.mark.parametrize(
    ("stack", "fields", "expected"),
    [
        ({"transformers": "4.57"}, {}, True),
        ({"transformers": "5.23"}, {}, False),
        ({"transformers": "5.23"}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, True),
        ({"transformers": "4.57"}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, False),
        ({"transformers": "4.57", "trl": "0.27.0"}, {"trainer": "trl"}, False),
        ({"transformers": "4.57", "trl": "0.25.0"}, {"trainer": "trl"}, True),
    ],
)
def test_reentrance_follows_the_versions_unless_given(stack: dict[str, str], fields: dict[str, Any], expected: bool) -> None:
    assert training(stack=stack, gradient_checkpointing=True, **fields).use_reentrant is expected


def test_the_trainer_overrides_the_reentrance_that_prepare_set() -> None:
    run: dict[str, Any] = {"quantization": NF4, "peft": LORA, "prepare_model_for_kbit_training": True}
    resolved = recipe(**run, training={"max_length": 512, "gradient_checkpointing": True}).training
    assert resolved is not None
    assert resolved.use_reentrant is False


@pytest.mark.parametrize(
    ("trl", "fields", "expected"),
    [
        ("1.16.0", {}, Loss.TRL_TILED),
        ("1.16.0", {"loss_type": "chunked_nll"}, Loss.TRL_TILED),
        ("1.16.0", {"label_smoothing_factor": 0.1}, Loss.STOCK),
        ("1.16.0", {"use_liger_kernel": True}, Loss.TRL_TILED),
        ("1.7.0", {}, Loss.TRL_CHUNKED),
        ("1.4.0", {}, Loss.STOCK),
        ("1.4.0", {"loss_type": "chunked_nll"}, Loss.TRL_CHUNKED),
        ("1.4.0", {"use_liger_kernel": True}, Loss.LIGER),
        ("0.25.0", {"use_liger": True}, Loss.LIGER),
    ],
)
def test_the_loss_of_sft_trainer_follows_its_version(trl: str, fields: dict[str, Any], expected: Loss) -> None:
    assert training(trainer="trl", stack={"trl": trl}, **fields).loss is expected


def test_an_unknown_loss_type_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="chunked_nll"):
        training(trainer="trl", stack={"trl": "1.2.0"}, loss_type="chunked_nll")


def test_liger_replaces_the_loss_of_the_trainer_unless_its_config_says_no() -> None:
    assert training(use_liger_kernel=True).loss is Loss.LIGER
    assert training(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False, "rope": True}).loss is Loss.STOCK


@pytest.mark.parametrize(("trl", "expected"), [("0.25.1", True), ("0.26.0", False), ("1.16.0", False)])
def test_sft_trainer_prepared_quantized_models_until_0_25(trl: str, expected: bool) -> None:
    run: dict[str, Any] = {"quantization": NF4, "peft": LORA, "trainer": "trl", "training": {}}
    assert recipe(stack={"trl": trl}, **run).prepare_for_kbit_training is expected
    assert recipe(stack={"trl": trl}, **run, prepare_model_for_kbit_training=True).prepare_for_kbit_training is True


def test_the_trainer_itself_never_prepares() -> None:
    assert recipe(quantization=NF4, peft=LORA, training={"max_length": 8}).prepare_for_kbit_training is False


def test_absent_attention_is_what_transformers_would_choose() -> None:
    assert recipe().attention is Attention.SDPA
    assert recipe("openai/gpt-oss-20b").attention is Attention.EAGER


def test_attention_that_the_class_refuses_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="attn_implementation"):
        recipe("openai/gpt-oss-20b", attn_implementation="sdpa")
    with pytest.raises(UnknownNameError, match="attn_implementation"):
        recipe(attn_implementation="quantum")


def test_the_trainer_needs_a_length_and_trl_has_one() -> None:
    with pytest.raises(RequestError, match=r"training\.max_length"):
        recipe(training={})
    assert recipe(trainer="trl", training={}).training.sequence_length == 1024  # type: ignore[union-attr]


def test_learned_positions_cannot_be_exceeded_and_rotary_ones_can() -> None:
    assert training("openai-community/gpt2", max_length=1024).sequence_length == 1024
    with pytest.raises(RequestError, match="1024 learned positions"):
        training("openai-community/gpt2", max_length=1025)
    with pytest.raises(RequestError, match="2048 learned positions"):
        training("facebook/opt-1.3b", max_length=2049)
    assert training("meta-llama/Llama-2-7b-hf", max_length=8192).sequence_length == 8192


def test_padding_to_a_multiple_lengthens_the_sequence() -> None:
    assert training(trainer="trl", max_length=1000, pad_to_multiple_of=64).sequence_length == 1024


def test_a_purely_quantized_model_cannot_be_trained() -> None:
    with pytest.raises(RequestError, match="purely quantized"):
        recipe(quantization=NF4, training={"max_length": 8})


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"quantization": {"load_in_4bit": True, "load_in_8bit": True}}, "quantization.load_in_8bit"),
        ({"training": {"max_length": 8, "bf16": True, "fp16": True}}, "training.fp16"),
        ({"training": {"max_length": 8}, "inference": {}}, "training"),
        ({"training": {"max_length": 8, "optim": "adamw_magic"}}, "training.optim"),
        ({"training": {"max_length": 8, "optim_args": "nonsense"}}, "training.optim_args"),
        ({"training": {"max_length": 8, "optim_args": "momentum=0=9"}}, "training.optim_args"),
        ({"training": {"max_length": 8, "weight_decay": -0.1}}, "training.weight_decay"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "floaty"}, "dtype"),
        ({"hardware": {"gpu": "t4", "capacity_gib": 3}}, "hardware.capacity_gib"),
        ({"hardware": {"gpu": "t4", "num_gpus": 2}}, "hardware.strategy"),
        ({"stack": {"transformers": "4.30"}}, "stack.transformers"),
        ({"stack": {"trl": "zero"}}, "stack.trl"),
        ({"quantization": {**NF4, "bnb_4bit_compute_dtype": "int8"}}, "quantization.bnb_4bit_compute_dtype"),
        ({"quantization": {**NF4, "bnb_4bit_quant_storage": "int64"}}, "quantization.bnb_4bit_quant_storage"),
        ({"peft": {"target_modules": "(a+)+"}}, "peft.target_modules"),
    ],
)
def test_contradictions_are_refused_by_field(payload: dict[str, Any], field: str) -> None:
    stack = payload.pop("stack", None)
    with pytest.raises(RequestError) as caught:
        recipe(stack=stack, **payload)
    assert field in [error.field for error in caught.value.errors]


def test_quantization_fields_reach_the_recipe() -> None:
    quantization = recipe(quantization={**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}).quantization
    assert quantization is not None
    assert (quantization.kind, quantization.double_quant, quantization.compute_dtype) == (QuantizationKind.NF4, True, DType.BFLOAT16)
    int8 = recipe(quantization={"load_in_8bit": True, "llm_int8_threshold": 0}).quantization
    assert int8 is not None
    assert (int8.kind, int8.threshold) == (QuantizationKind.INT8, 0.0)


@pytest.mark.parametrize("fields", [{}, {"bnb_4bit_quant_type": "nf4"}, {"load_in_4bit": False, "bnb_4bit_compute_dtype": "bfloat16"}])
def test_a_quantization_without_a_switch_is_refused_since_transformers_takes_it_for_4_bits(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="neither load_in_4bit nor load_in_8bit"):
        answer({"model": "meta-llama/Llama-3.2-1B", "quantization": fields})


def test_generation_past_learned_positions_is_refused() -> None:
    with pytest.raises(RequestError, match=r"2010 is beyond the 1024 learned positions"):
        answer({"model": "openai-community/gpt2", "inference": {"batch_size": 1, "prompt_length": 2000, "max_new_tokens": 10}})


def test_a_quantization_that_is_switched_off_is_none() -> None:
    assert recipe(quantization={"load_in_4bit": False}).quantization is None


def test_weight_decay_is_none_by_default_as_in_transformers_and_trl() -> None:
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    for config in (transformers.TrainingArguments, trl.SFTConfig):
        assert training().weight_decay == next(f.default for f in dataclasses.fields(config) if f.name == "weight_decay") == 0


def test_weight_decay_adds_a_copy_of_the_gradients_to_a_step_of_sgd_alone_among_these() -> None:
    def temporary(**fields: Any) -> int:
        asked = {"max_length": 64, "per_device_train_batch_size": 1, **fields}
        found = answer({"model": "meta-llama/Llama-3.2-1B", "dtype": "bfloat16", "engine": "analytic", "training": asked})
        assert "training.weight_decay" not in found["ignored"]
        assert found["recipe"]["training"]["weight_decay"] == fields.get("weight_decay", 0)
        (step,) = (phase for phase in found["phases"] if phase["phase"] == "optimizer_step")
        return sum(int(item["bytes"]) for item in step["items"] if item["name"] == "temporary")

    # torch, optim/sgd.py, _multi_tensor_sgd: the gradients of the tied embedding and of the projections, in two bytes; norms are spared
    decayed = 2 * (128256 * 2048 + 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192))
    assert temporary(optim="sgd", weight_decay=0.01) == decayed
    assert temporary(optim="sgd", weight_decay=0.0) == temporary(optim="sgd") == 0
    assert temporary(optim="sgd", optim_args="weight_decay=0.01") == 0  # parameter groups carry the trainer's own
    assert temporary(weight_decay=0.01) == 0


def test_optimizer_arguments_are_split() -> None:
    assert training(optim="adafactor", optim_args="beta1=0.9, scale_parameter=True").optimizer_arguments == (
        ("beta1", "0.9"),
        ("scale_parameter", "True"),
    )
