"""Whole answers, in the form of the contract."""

from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict
from transformers import LlamaConfig

from app import examples
from app.catalogue import list_models
from app.service import answer
from estimator.correction import margin_without_interval
from estimator.errors import RequestError
from estimator.phases import Item, Phase
from estimator.units import gib

STRICT = ConfigDict(extra="forbid", strict=True)


class ModelJson(BaseModel):
    model_config = STRICT
    id: str | None
    revision: str | None
    model_type: str
    source: Literal["catalogue", "hub", "config"]
    num_parameters: int


class ParametersJson(BaseModel):
    model_config = STRICT
    total: int
    trainable: int
    adapter: int
    quantized: int


class IntervalJson(BaseModel):
    model_config = STRICT
    coverage: float
    allocated_low_bytes: int
    allocated_high_bytes: int
    device_low_bytes: int
    device_high_bytes: int
    basis: str


class PeakJson(BaseModel):
    model_config = STRICT
    phase: str
    allocated_bytes: int
    reserved_bytes: int
    reserved_basis: Literal["replayed", "modelled"]
    device_bytes: int
    paged_bytes: int
    interval: IntervalJson | None


class ItemJson(BaseModel):
    model_config = STRICT
    name: str
    bytes: int
    basis: Literal["exact", "modelled", "traced", "fitted"]
    formula: str
    source: str


class PhaseJson(BaseModel):
    model_config = STRICT
    phase: str
    allocated_bytes: int
    items: list[ItemJson]


class FitJson(BaseModel):
    model_config = STRICT
    gpu: str | None
    capacity_bytes: int
    headroom_bytes: int
    free_bytes: int
    verdict: Literal["fits", "tight", "does_not_fit"]


class WarningJson(BaseModel):
    model_config = STRICT
    code: str
    message: str


class RankJson(BaseModel):
    model_config = STRICT
    rank: int
    phase: str
    allocated_bytes: int
    reserved_bytes: int | None
    device_bytes: int | None
    holds: str


class AnswerJson(BaseModel):
    """The contract's answer to `estimate`."""

    model_config = STRICT
    schema_version: Literal[1]
    model: ModelJson
    parameters: ParametersJson
    recipe: dict[str, Any]
    engine: Literal["analytic", "trace"]
    engine_reason: str
    stack: dict[Literal["torch", "transformers", "peft", "bitsandbytes", "trl"], str]
    peak: PeakJson | None
    steady_state_bytes: int | None
    phases: list[PhaseJson]
    ranks: list[RankJson]
    host_bytes: int
    fit: FitJson | None
    warnings: list[WarningJson]
    ignored: list[str]


def codes(result: dict[str, Any]) -> set[str]:
    return {warning["code"] for warning in result["warnings"]}


@pytest.fixture(scope="module")
def qlora() -> dict[str, Any]:
    return answer(examples.QLORA)


@pytest.mark.parametrize("name", list(examples.ESTIMATE))
def test_every_example_is_answered_in_the_form_of_the_contract(name: str) -> None:
    result = answer(examples.ESTIMATE[name]["value"])
    AnswerJson.model_validate(result)
    assert result["peak"] is not None
    for phase in result["phases"]:
        assert phase["allocated_bytes"] == sum(item["bytes"] for item in phase["items"])
        assert phase["phase"] in set(Phase)
        for item in phase["items"]:
            assert item["name"] in set(Item)
            assert item["formula"]
            assert item["source"]


def test_training_goes_through_five_phases(qlora: dict[str, Any]) -> None:
    assert [phase["phase"] for phase in qlora["phases"]] == ["load", "forward", "loss", "backward", "optimizer_step"]


def test_inference_goes_through_three_phases() -> None:
    assert [phase["phase"] for phase in answer(examples.INFERENCE)["phases"]] == ["load", "prefill", "decode"]


def test_the_peak_is_the_largest_phase(qlora: dict[str, Any]) -> None:
    largest = max(qlora["phases"], key=lambda phase: phase["allocated_bytes"])
    assert (qlora["peak"]["phase"], qlora["peak"]["allocated_bytes"]) == (largest["phase"], largest["allocated_bytes"])
    assert qlora["peak"]["allocated_bytes"] <= qlora["peak"]["reserved_bytes"] <= qlora["peak"]["device_bytes"]


def test_the_parameters_of_the_guides_example_are_counted_logically(qlora: dict[str, Any]) -> None:
    # Source: peft 0.21, print_trainable_parameters on Llama-3.1-8B with r = 16 on all seven projections.
    assert qlora["parameters"] == {"total": 8_072_204_288, "trainable": 41_943_040, "adapter": 41_943_040, "quantized": 6_979_321_856}


def test_inert_fields_are_listed(qlora: dict[str, Any]) -> None:
    assert qlora["ignored"] == ["peft.lora_alpha"]


def test_defaults_are_shown_resolved() -> None:
    recipe = answer({"model": "meta-llama/Llama-3.1-8B", "trainer": "trl", "training": {}, "stack": {"trl": "1.16.0"}})["recipe"]
    assert recipe["dtype"] == "float32"
    assert recipe["training"]["per_device_train_batch_size"] == 8
    assert recipe["training"]["max_length"] == 1024
    assert recipe["training"]["bf16"] is True


def test_a_card_that_is_too_small_gets_does_not_fit_and_what_is_missing() -> None:
    result = answer({**examples.QLORA, "hardware": {"capacity_gib": 4.0}})
    assert result["fit"]["verdict"] == "does_not_fit"
    assert result["fit"]["gpu"] is None
    assert result["fit"]["free_bytes"] < 0


def test_a_card_that_is_large_enough_fits() -> None:
    assert answer({**examples.QLORA, "hardware": {"gpu": "h200-sxm"}})["fit"]["verdict"] == "fits"


def test_without_hardware_there_is_no_verdict_and_the_assumption_is_named() -> None:
    result = answer({**examples.QLORA, "hardware": None})
    assert result["fit"] is None
    assert result["recipe"]["compute_capability"] == "8.0"
    assert {"compute_capability_assumed", "bitsandbytes_needs_nvidia"} <= codes(result)


def test_loading_alone_says_so() -> None:
    result = answer({"model": "openai-community/gpt2"})
    assert [phase["phase"] for phase in result["phases"]] == ["load"]
    assert "load_only" in codes(result)


def test_what_the_guides_do_not_say_is_said(qlora: dict[str, Any]) -> None:
    expected = {"float32_upcast", "weights_not_quantized", "merge_needs_dequantized_copy", "paging_is_partial", "nvidia_smi_shows_more"}
    assert expected <= codes(qlora)
    merge = next(w["message"] for w in qlora["warnings"] if w["code"] == "merge_needs_dequantized_copy")
    assert "14.96 GiB" in merge  # 2 bytes × 8,030,261,248 parameters


def test_bfloat16_on_a_t4_brings_a_warning() -> None:
    result = answer({**examples.QLORA, "hardware": {"gpu": "t4"}})
    message = next(w["message"] for w in result["warnings"] if w["code"] == "no_bfloat16")
    assert "7.5" in message
    assert "fp16=True" in message


def test_what_is_advised_without_bfloat16_fits_what_is_asked() -> None:
    def advised(**request: Any) -> str:
        found = answer({"model": "meta-llama/Llama-3.2-1B", "dtype": "bfloat16", "hardware": {"gpu": "t4"}, **request})
        return warning(found, "no_bfloat16").partition("; use ")[2]

    nf4 = {"quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}}
    lora = {"peft": {"r": 8, "target_modules": ["q_proj"]}}
    assert advised(inference={}) == advised() == 'dtype="float16" instead.'
    assert advised(inference={}, **nf4) == 'dtype="float16", bnb_4bit_compute_dtype="float16" instead.'
    assert advised(training={"max_length": 8, "fp16": True}, **nf4, **lora, dtype="float16") == 'bnb_4bit_compute_dtype="float16" instead.'
    assert advised(training={"max_length": 8, "bf16": True}, **lora) == 'dtype="float16", fp16=True instead.'
    int8 = {"quantization": {"load_in_8bit": True, "bnb_4bit_compute_dtype": "bfloat16"}}
    assert advised(inference={}, **int8) == 'dtype="float16" instead.'


def test_a_compute_dtype_left_at_float32_brings_a_warning() -> None:
    request = {**examples.QLORA, "quantization": {"load_in_4bit": True}}
    assert "compute_dtype_float32" in codes(answer(request))
    assert "compute_dtype_float32" not in codes(answer(examples.QLORA))


def test_a_model_id_in_sft_trainer_brings_a_warning_unless_dtype_is_given() -> None:
    without = {key: value for key, value in examples.SFT_LORA.items() if key != "dtype"}
    assert "model_loaded_in_float32" in codes(answer({**without, "stack": {"trl": "1.16.0"}}))
    assert "model_loaded_in_float32" not in codes(answer(examples.SFT_LORA))


def test_fused_experts_that_stay_in_16_bits_are_named() -> None:
    result = answer({"model": "mistralai/Mixtral-8x7B-v0.1", "dtype": "bfloat16", "load_in_4bit": True, "stack": {"transformers": "5.23"}})
    message = next(w["message"] for w in result["warnings"] if w["code"] == "weights_not_quantized")
    assert "experts" in message


def test_quantization_that_takes_more_than_it_saves_is_named_with_both_peaks() -> None:
    training = {"per_device_train_batch_size": 1, "max_length": 512, "bf16": True, "gradient_checkpointing": True}
    plain = {
        "model": "mistralai/Mixtral-8x7B-v0.1",
        "dtype": "bfloat16",
        "peft": {"r": 8, "target_modules": ["q_proj"]},
        "training": training,
    }
    nf4 = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    quantized = answer({**plain, "quantization": nf4, "prepare_model_for_kbit_training": True})
    message = warning(quantized, "qlora_above_lora")
    assert gib(quantized["peak"]["allocated_bytes"]) in message
    assert gib(answer(plain)["peak"]["allocated_bytes"]) in message
    assert "qlora_above_lora" not in codes(answer({**plain, "quantization": nf4}))  # without the upcast to float32


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16", "hardware": {"gpu": "t4"}}, "8.0"),
    ],
)
def test_flash_attention_that_would_fail_is_named(request_: dict[str, Any], told: str) -> None:
    asked = {"model": "meta-llama/Llama-3.2-1B", "attn_implementation": "flash_attention_2", **request_}
    training = {"per_device_train_batch_size": 1, "max_length": 64}
    assert told in warning(answer({**asked, "training": training}), "flash_attention_unsupported")
    works = answer({**asked, "dtype": "bfloat16", "hardware": {"gpu": "a100-40"}, "training": training})
    assert "flash_attention_unsupported" not in codes(works)


def test_another_major_version_and_a_checkpoint_stored_quantized_are_named() -> None:
    llama = {"model": "meta-llama/Llama-3.2-1B", "dtype": "bfloat16"}
    assert "4.57" in warning(answer({**llama, "stack": {"transformers": "4.57"}}), "other_transformers_major")
    assert not {"other_transformers_major", "checkpoint_quantization"} & codes(answer({**llama, "stack": {"transformers": "5.20"}}))
    assert "mxfp4" in warning(answer({"model": "openai/gpt-oss-20b"}), "checkpoint_quantization")


def test_a_version_that_does_not_have_the_model_is_named() -> None:
    """The folder models/qwen3 is in the wheel of transformers 4.51, and not in that of 4.50."""
    qwen = {"model": "Qwen/Qwen3-8B", "dtype": "bfloat16"}
    assert "4.51" in warning(answer({**qwen, "stack": {"transformers": "4.50.3"}}), "model_newer_than_transformers")
    assert "model_newer_than_transformers" not in codes(answer({**qwen, "stack": {"transformers": "4.51.0"}}))


@pytest.mark.parametrize(("name", "version"), [("peft", "0.5"), ("bitsandbytes", "0.30"), ("transformers", "4.44"), ("trl", "0.12")])
def test_versions_before_what_is_known_are_refused_by_name(name: str, version: str) -> None:
    with pytest.raises(RequestError, match=rf"stack\.{name}: {version} is not covered; accepted: .* and later"):
        answer({"model": "gpt2", "stack": {name: version}})


def test_a_length_beyond_the_trained_positions_brings_a_warning() -> None:
    request = {"model": "meta-llama/Llama-2-7b-hf", "training": {"max_length": 8192, "per_device_train_batch_size": 1}}
    assert "beyond_max_position_embeddings" in codes(answer(request))


def test_checkpointing_left_off_beside_prepare_brings_a_warning() -> None:
    training = {**examples.QLORA["training"], "gradient_checkpointing": False}
    assert "kbit_checkpointing_default" in codes(answer({**examples.QLORA, "training": training}))


def test_a_field_that_is_not_modelled_brings_a_warning() -> None:
    training = {**examples.QLORA["training"], "torch_compile": True}
    result = answer({**examples.QLORA, "training": training})
    assert any(w["code"] == "field_not_modelled" and "training.torch_compile" in w["message"] for w in result["warnings"])


def test_a_step_that_is_not_modelled_has_an_exact_load_and_no_peak() -> None:
    result = answer({"model": "google-t5/t5-base", "training": {"max_length": 64}, "hardware": {"gpu": "t4"}})
    AnswerJson.model_validate(result)
    assert result["peak"] is None
    assert result["fit"] is None
    assert [phase["phase"] for phase in result["phases"]] == ["load"]
    assert "not_modelled" in codes(result)
    assert not {"interval_unavailable", "nvidia_smi_shows_more"} & codes(result)


def test_a_load_that_is_already_too_much_does_not_fit_even_when_the_step_is_unknown() -> None:
    result = answer({"model": "google-t5/t5-large", "training": {"max_length": 64}, "hardware": {"capacity_gib": 0.5}})
    assert result["fit"]["verdict"] == "does_not_fit"


def test_closed_forms_answer_for_every_bundled_model_or_say_that_they_cannot() -> None:
    for model in list_models():
        training = {"max_length": 64, "per_device_train_batch_size": 1}
        result = answer({"model": model["id"], "dtype": "bfloat16", "training": training, "engine": "analytic"})
        assert (result["peak"] is None) == ("not_modelled" in codes(result)), model["id"]
        assert result["model"]["num_parameters"] == model["num_parameters"]


# -- warnings with numbers of the run ---------------------------------------------------------------------------------------------------


def warning(result: dict[str, Any], code: str) -> str:
    (message,) = [w["message"] for w in result["warnings"] if w["code"] == code]
    return str(message)


INT8: dict[str, Any] = {
    "model": "meta-llama/Llama-3.2-1B",
    "dtype": "float16",
    "quantization": {"load_in_8bit": True},
    "peft": {"r": 16, "target_modules": "all-linear"},
    "training": {"per_device_train_batch_size": 4, "max_length": 1024, "fp16": True, "gradient_checkpointing": True},
    "stack": {"transformers": "5.23"},
}


def test_int8_inputs_that_checkpointing_cannot_drop_are_named_with_what_reentry_saves() -> None:
    without = answer(INT8)
    with_reentry = answer({**INT8, "training": {**INT8["training"], "gradient_checkpointing_kwargs": {"use_reentrant": True}}})
    saved = without["peak"]["allocated_bytes"] - with_reentry["peak"]["allocated_bytes"]
    assert saved > 0
    assert gib(saved) in warning(without, "int8_keeps_inputs")
    assert "int8_keeps_inputs" not in codes(with_reentry)
    assert "int8_keeps_inputs" not in codes(answer({**INT8, "training": {**INT8["training"], "gradient_checkpointing": False}}))


def test_float16_weights_cannot_be_trained_under_a_gradient_scaler() -> None:
    full = {"model": "openai-community/gpt2", "training": {"max_length": 64, "fp16": True}}
    refused = answer({**full, "dtype": "float16"})
    assert "Attempting to unscale FP16 gradients" in warning(refused, "fp16_gradients_refused")  # torch, amp/grad_scaler.py
    assert "fp16_gradients_refused" not in codes(answer({**full, "dtype": "float32"}))


def test_adapters_in_float32_train_under_a_gradient_scaler_and_trls_in_bfloat16_do_not() -> None:
    assert "fp16_gradients_refused" not in codes(answer(INT8))
    trl = answer({**INT8, "trainer": "trl", "stack": {"trl": "1.16.0"}})
    assert "BFloat16" in warning(trl, "fp16_gradients_refused")  # pytorch issue 127176


def test_int8_on_a_card_without_its_tensor_cores_brings_a_warning() -> None:
    def said(gpu: str, quantization: dict[str, Any]) -> dict[str, Any]:
        asked = {"model": "meta-llama/Llama-3.2-1B", "dtype": "float16", "inference": {}, "quantization": quantization}
        return answer({**asked, "hardware": {"gpu": gpu}})

    message = warning(said("v100-16", {"load_in_8bit": True}), "int8_without_tensor_cores")
    assert "7.0" in message
    assert gib(4 * 8192 * 2048) in message  # gate, up and down: the largest weights of Llama-3.2-1B
    for gpu, quantization in (("t4", {"load_in_8bit": True}), ("v100-16", {"load_in_4bit": True})):
        assert "int8_without_tensor_cores" not in codes(said(gpu, quantization))


def test_what_is_advised_on_a_card_without_bfloat16_does_not_fail_in_the_scaler() -> None:
    full = {"model": "openai-community/gpt2", "dtype": "bfloat16", "training": {"max_length": 64, "bf16": True}, "hardware": {"gpu": "t4"}}
    assert "loaded in float32" in warning(answer(full), "no_bfloat16")
    assert "fp16_gradients_refused" not in codes(answer({**full, "dtype": "float32", "training": {"max_length": 64, "fp16": True}}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hardware": {"gpu": "t4"}, "dtype": "float16"}, "compute capability 7.5"),
        ({"dtype": "float32", "training": {"max_length": 2048, "per_device_train_batch_size": 1}}, "float32"),
        ({"model": "tiiuae/falcon-7b", "dtype": "bfloat16"}, "these heads"),
    ],
)
def test_attention_that_is_written_out_is_named_with_its_scores(changes: dict[str, Any], reason: str) -> None:
    training = {"max_length": 2048, "per_device_train_batch_size": 1, "fp16": True}
    request = {"model": "meta-llama/Llama-3.2-1B", "training": training, "stack": {"transformers": "5.23"}, **changes}
    result = answer(request)
    heads = {"meta-llama/Llama-3.2-1B": 32, "tiiuae/falcon-7b": 71}[request["model"]]
    message = warning(result, "attention_written_out")
    assert reason in message
    assert f"{heads} heads" in message
    assert gib(4 * heads * 2048 * 2048) in message


def test_attention_of_a_fused_kernel_is_not_warned_of(qlora: dict[str, Any]) -> None:
    assert "attention_written_out" not in codes(qlora)
    llama2 = {
        "model": "meta-llama/Llama-2-7b-hf",
        "dtype": "float16",
        "hardware": {"gpu": "t4"},
        "training": {"max_length": 512, "fp16": True},
    }
    assert "attention_written_out" not in codes(answer(llama2))  # as many key/value heads as query heads


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_a_checkpoint_stored_in_float32_is_named_unless_a_type_is_asked_for(dtype: str | None) -> None:
    request = {"model": "openai-community/gpt2", "training": {"max_length": 64}, "stack": {"transformers": "5.23"}}
    message = warning(answer({**request, "dtype": dtype}), "model_loaded_in_float32")
    assert "0.23 GiB more" in message  # 2 bytes × 124,439,808 parameters
    assert "model_loaded_in_float32" not in codes(answer({**request, "dtype": "float32"}))


def test_transformers_4_loads_float32_whatever_the_checkpoint_holds() -> None:
    request = {"model": "meta-llama/Llama-3.2-1B", "training": {"max_length": 64}}
    assert "transformers 4.57" in warning(answer({**request, "stack": {"transformers": "4.57"}}), "model_loaded_in_float32")
    assert "model_loaded_in_float32" not in codes(answer({**request, "stack": {"transformers": "5.23"}}))


def test_an_interval_of_versions_never_measured_is_called_that() -> None:
    today = answer(examples.QLORA)
    assert "transformers 4.39 to 4.48, not 5." in warning(today, "other_stack")
    assert "transformers 4.39 to 4.48, not 5." in today["peak"]["interval"]["basis"]


def test_an_interval_of_versions_that_were_measured_needs_no_word() -> None:
    stack = {"torch": "2.5.1", "transformers": "4.48.1", "peft": "0.13.2", "bitsandbytes": "0.43.3", "trl": "0.13.0"}
    then = answer({**examples.QLORA, "stack": stack})
    assert then["peak"]["interval"] is not None
    assert "other_stack" not in codes(then)


def test_without_an_interval_the_answer_says_what_fits_asks_for_and_why() -> None:
    unmeasured = {**examples.QLORA["training"], "gradient_checkpointing": False}
    message = warning(answer({**examples.QLORA, "training": unmeasured}), "interval_unavailable")
    margin = margin_without_interval()
    assert f"{100 * margin.share:.1f} % above the estimate" in message
    assert f"{margin.num_rows} rows of fms-accel" in message


PASTE = (
    "name, memory.total [MiB], memory.used [MiB]\nNVIDIA GeForce RTX 4090, 24564 MiB, 6000 MiB\nNVIDIA GeForce RTX 3060, 12288 MiB, 1 MiB\n"
)


def test_pasted_memory_in_use_counts_against_the_card() -> None:
    pasted = answer(examples.QLORA | {"hardware": {"nvidia_smi": PASTE}})
    alone = answer(examples.QLORA | {"hardware": {"gpu": "rtx4090"}})
    assert pasted["fit"]["gpu"] == "rtx4090"
    assert pasted["fit"]["occupied_bytes"] == 6000 * 2**20
    assert pasted["fit"]["free_bytes"] == alone["fit"]["free_bytes"] - 6000 * 2**20
    codes = {warning["code"]: warning["message"] for warning in pasted["warnings"]}
    assert "5.86 GiB of GPU 0" in codes["memory_in_use"]
    assert "GeForce RTX 3060" in codes["several_cards"]


@pytest.mark.parametrize(
    ("hardware", "field"),
    [
        ({"nvidia_smi": "nothing"}, "hardware.nvidia_smi"),
        ({"nvidia_smi": PASTE, "gpu": "rtx4090"}, "hardware.nvidia_smi"),
        ({"gpu": "m3 max"}, "hardware.gpu"),
    ],
)
def test_hardware_that_cannot_be_answered_for_is_refused_by_its_field(hardware: dict[str, str], field: str) -> None:
    with pytest.raises(RequestError) as error:
        answer(examples.QLORA | {"hardware": hardware})
    assert error.value.errors[0].field == field


def test_an_amd_card_is_outside_bitsandbytes_cuda_path_and_16_bit_methods_do_not_care() -> None:
    quantized = answer(examples.QLORA | {"hardware": {"gpu": "mi300x"}})
    plain = answer(examples.SFT_LORA | {"hardware": {"gpu": "mi300x"}})
    assert "outside_cuda" in {warning["code"] for warning in quantized["warnings"]}
    assert "outside_cuda" not in {warning["code"] for warning in plain["warnings"]}


def test_an_amd_card_has_no_interval_from_measurements_on_cards_of_cuda() -> None:
    found = answer(examples.SFT_LORA | {"hardware": {"gpu": "mi300x"}})
    assert found["peak"]["interval"] is None
    assert any("cards of AMD" in warning["message"] for warning in found["warnings"] if warning["code"] == "interval_unavailable")


_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}


def _engines(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The same question to the closed forms and to the trace."""
    training = {"per_device_train_batch_size": 4, "max_length": 256, "optim": "sgd", "bf16": True}
    asked = {"model": {"config": {**_SMALL, **config}}, "dtype": "bfloat16", "training": training}
    return [answer({**asked, "engine": engine}) for engine in ("analytic", "trace")]


# With so small a vocabulary activations are the peak.
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "hidden_act": "gelu_new"},
        {"model_type": "mixtral", "hidden_act": "gelu_fast", "num_local_experts": 4},
        {"model_type": "phi3", "hidden_act": "relu", "pad_token_id": 0},
        {"model_type": "gemma2", "hidden_activation": "gelu_new"},
    ],
)
def test_an_activation_that_is_written_out_takes_what_the_trace_sees(config: dict[str, Any]) -> None:
    closed, traced = _engines(config)
    assert closed["peak"]["allocated_bytes"] == pytest.approx(traced["peak"]["allocated_bytes"], rel=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "hidden_act": "relu2"},
        {"model_type": "llama", "output_hidden_states": True},
        {"model_type": "stablelm", "qk_layernorm": True},
        {"model_type": "mixtral", "router_jitter_noise": 0.1, "num_local_experts": 4},
    ],
)
def test_what_has_no_closed_form_is_left_to_the_trace(config: dict[str, Any]) -> None:
    closed, traced = _engines(config)
    assert closed["peak"] is None
    assert traced["peak"] is not None


def test_an_expert_is_as_wide_as_its_weights_whatever_other_architectures_call_it() -> None:
    closed, traced = _engines({"model_type": "olmoe", "moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2})
    assert closed["peak"]["allocated_bytes"] == pytest.approx(traced["peak"]["allocated_bytes"], rel=1e-4)


@pytest.mark.parametrize(
    "stray",
    [
        {"sliding_window": 64},
        {"layer_types": ["sliding_attention", "full_attention"] * 3, "sliding_window": 64},
        {"hidden_activation": "relu"},
        {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ],
)
def test_fields_that_the_class_does_not_declare_change_no_formula(stray: dict[str, Any]) -> None:
    assert not any(name in LlamaConfig.__dataclass_fields__ for name in stray)
    training = {"per_device_train_batch_size": 4, "max_length": 256, "bf16": True}
    asked = {"dtype": "bfloat16", "training": training, "engine": "analytic"}
    plain, carried = (answer({"model": {"config": {**_SMALL, "model_type": "llama", **more}}, **asked}) for more in ({}, stray))
    assert carried["phases"] == plain["phases"]


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({"model_type": "qwen2", "head_dim": 3}, "an odd width, 3"),
        ({"model_type": "stablelm", "intermediate_size": 0}, "0 does not divide"),
    ],
)
@pytest.mark.parametrize("run", [{"training": {"max_length": 64}}, {"inference": {}}], ids=["training", "inference"])
def test_sizes_that_no_formula_is_meant_for_are_answered_up_to_the_load(odd: dict[str, Any], told: str, run: dict[str, Any]) -> None:
    found = answer({"model": {"config": {**_SMALL, **odd}}, "engine": "analytic", **run})
    assert found["peak"] is None
    assert told in warning(found, "not_modelled")


def test_heads_of_gpt2_divide_the_hidden_size_whatever_the_config_says_beside() -> None:
    config = {"model_type": "gpt2", "n_embd": 512, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 512}
    training = {"per_device_train_batch_size": 4, "max_length": 256, "bf16": True}
    plain, carried = (answer({"model": {"config": config | more}, "training": training}) for more in ({}, {"head_dim": 48}))
    assert carried["phases"] == plain["phases"]


def _codes(**request: Any) -> list[str]:
    return [warning["code"] for warning in answer(request)["warnings"]]


def test_an_adapter_on_the_head_is_said_to_be_refused_by_trl() -> None:
    asked = {
        "model": "meta-llama/Llama-3.2-1B",
        "dtype": "bfloat16",
        "training": {"per_device_train_batch_size": 1, "max_length": 64, "bf16": True},
    }
    for targets, trainer, expected in ((["lm_head"], "trl", True), (["q_proj"], "trl", False), (["lm_head"], "transformers", False)):
        codes = _codes(**asked, trainer=trainer, peft={"r": 8, "target_modules": targets})
        assert ("adapter_on_head_refused" in codes) == expected, (targets, trainer)


SHORT = {"per_device_train_batch_size": 1, "max_length": 64, "bf16": True}


@pytest.mark.parametrize(
    ("model", "tokens", "more", "expected"),
    [
        ("Qwen/Qwen3-0.6B", [1, 2], {}, True),  # tied
        ("Qwen/Qwen3-0.6B", [1, 2], {"trainer": "transformers"}, False),
        ("Qwen/Qwen3-0.6B", [1, 2], {"stack": {"trl": "1.15.0"}}, False),
        ("microsoft/Phi-3-mini-4k-instruct", [1, 2], {}, False),  # not tied
        ("microsoft/Phi-3-mini-4k-instruct", {"lm_head": [1, 2]}, {}, True),
        ("Qwen/Qwen3-0.6B", None, {}, False),
        ("Qwen/Qwen3-0.6B", [1, 2], {"training": {**SHORT, "label_smoothing_factor": 0.1}}, True),  # for the metrics alone
        ("Qwen/Qwen3-0.6B", [1, 2], {"training": {**SHORT, "label_smoothing_factor": 0.1}, "stack": {"trl": "1.15.0"}}, False),
    ],
)
def test_trained_tokens_of_the_head_are_said_to_stop_trl(model: str, tokens: object, more: dict[str, Any], expected: bool) -> None:
    asked = {"dtype": "bfloat16", "training": SHORT, "trainer": "trl"}
    peft = {"r": 8, "target_modules": "all-linear", "trainable_token_indices": tokens}
    codes = _codes(model=model, peft=peft, engine="analytic", **(asked | more))
    assert ("trained_tokens_of_head_refused" in codes) == expected


def test_a_model_that_takes_images_is_answered_for_text_and_says_so() -> None:
    asked = {"dtype": "bfloat16", "training": {"per_device_train_batch_size": 1, "max_length": 64, "bf16": True}}
    assert "text_only" in _codes(model="google/gemma-3-4b-it", **asked)
    assert "text_only" not in _codes(model="google/gemma-2-2b", **asked)
