"""Reading requests: aliases, pasted objects, refusals."""

from typing import Any

import pytest

from app.reading import MAX_BODY_BYTES, Question, read_estimate, read_json, read_plan, read_sweep
from app.request import Request
from app.yaml_text import parse
from estimator.errors import RequestError


def read(**payload: Any) -> Question[Request]:
    return read_estimate({"model": "gpt2", **payload})


def refusal(**payload: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(**payload)
    return caught.value


def test_torch_dtype_is_another_name_of_dtype() -> None:
    assert read(torch_dtype="bfloat16").request.dtype == "bfloat16"


def test_max_seq_length_is_another_name_of_max_length() -> None:
    training = read(training={"max_seq_length": 77}).request.training
    assert training is not None
    assert training.max_length == 77


def test_activation_checkpointing_is_another_name_of_gradient_checkpointing() -> None:
    pasted = {"activation_checkpointing": True, "gradient_checkpointing": False, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    training = read(training=pasted).request.training
    assert training is not None
    assert training.gradient_checkpointing is True
    assert training.gradient_checkpointing_kwargs is not None
    assert training.gradient_checkpointing_kwargs.use_reentrant is True


def test_load_in_4bit_may_stand_beside_the_model() -> None:
    quantization = read(load_in_4bit=True, bnb_4bit_quant_type="nf4").request.quantization
    assert quantization is not None
    assert quantization.load_in_4bit
    assert quantization.bnb_4bit_quant_type == "nf4"


def test_two_spellings_that_disagree_are_refused() -> None:
    assert "contradicts" in refusal(dtype="float32", torch_dtype="bfloat16").message
    assert "contradicts" in refusal(training={"max_length": 5, "max_seq_length": 6}).message


def test_model_init_kwargs_are_the_fields_of_the_request() -> None:
    kwargs = {"dtype": "bfloat16", "attn_implementation": "eager", "device_map": "auto", "quantization_config": {"load_in_8bit": True}}
    request = read(trainer="trl", training={"model_init_kwargs": kwargs}).request
    assert (request.dtype, request.attn_implementation) == ("bfloat16", "eager")
    assert request.quantization is not None
    assert request.quantization.load_in_8bit


@pytest.mark.parametrize(
    ("fields", "field", "quoted", "accepted"),
    [
        ({"optim": ""}, "training.optim", "''", "expected one of adafactor, adagrad, adamw_8bit"),
        ({"optim": 5}, "training.optim", "5", "expected one of adafactor, adagrad, adamw_8bit"),
        ({"optim_args": 3}, "training.optim_args", "3", "expected text such as momentum=0.9"),
        ({"optim_args": {"momentum": [0.9]}}, "training.optim_args.momentum", "list", "expected text, a number, true or false"),
        ({"weight_decay": "0.1"}, "training.weight_decay", "'0.1'", "expected a number from 0 on"),
        ({"weight_decay": -1}, "training.weight_decay", "-1", "expected a number from 0 on"),
    ],
)
def test_errors_about_the_optimizer_name_field_value_and_what_is_accepted(
    fields: dict[str, Any], field: str, quoted: str, accepted: str
) -> None:
    (error,) = refusal(training={"max_length": 8, **fields}).errors
    assert error.field == field
    assert error.message.startswith(f"{field}: {quoted} is not accepted; {accepted}")


def test_a_whole_adapter_config_is_accepted() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=32, target_modules=["c_attn"], lora_alpha=64, task_type="CAUSAL_LM").to_dict()
    pasted = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    question = read(peft={**pasted, "peft_type": "LORA"})
    assert question.request.peft is not None
    assert question.request.peft.r == 32
    assert "peft.lora_alpha" in question.ignored
    assert question.unmodelled == ()


def test_a_whole_bitsandbytes_config_is_accepted() -> None:
    transformers = pytest.importorskip("transformers")
    pasted = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4").to_dict()
    pasted["quant_method"] = "bitsandbytes"
    quantization = read(quantization=pasted).request.quantization
    assert quantization is not None
    assert quantization.load_in_4bit


def test_whole_training_arguments_are_accepted() -> None:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(output_dir="out", bf16=False, gradient_checkpointing=True, max_steps=3, use_cpu=True)
    question = read(training=arguments.to_dict())
    assert question.request.training is not None
    assert question.request.training.gradient_checkpointing is True
    assert "training.learning_rate" in question.ignored


def test_known_fields_without_bearing_are_listed_and_null_ones_are_not() -> None:
    question = read(training={"learning_rate": 1e-4, "seed": None, "warmup_steps": 5})
    assert question.ignored == ("training.learning_rate", "training.warmup_steps")


def test_a_field_that_changes_memory_in_an_unknown_way_is_not_passed_over() -> None:
    question = read(training={"torch_compile": True, "neftune_noise_alpha": 5.0, "fsdp": ""})
    assert question.unmodelled == ("training.torch_compile", "training.neftune_noise_alpha")
    assert question.request.set_aside.ignored == ["training.fsdp"]


def test_an_unknown_field_is_refused_by_name_with_the_nearest_known_one() -> None:
    error = refusal(training={"lerning_rate": 1e-4})
    assert error.errors[0].field == "training.lerning_rate"
    assert "'learning_rate'" in error.message


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"training": {"per_device_train_batch_size": True}}, "training.per_device_train_batch_size"),
        ({"training": {"per_device_train_batch_size": 0}}, "training.per_device_train_batch_size"),
        ({"training": {"per_device_train_batch_size": 10**9}}, "training.per_device_train_batch_size"),
        ({"training": {"max_length": 2.5}}, "training.max_length"),
        ({"training": {"max_length": "2048"}}, "training.max_length"),
        ({"training": {"max_length": -1}}, "training.max_length"),
        ({"peft": {"r": 0}}, "peft.r"),
        ({"peft": {"r": False}}, "peft.r"),
        ({"peft": {"lora_dropout": float("nan")}}, "peft.lora_dropout"),
        ({"peft": {"target_modules": [1]}}, "peft.target_modules.0"),
        ({"hardware": {"capacity_gib": float("inf")}}, "hardware.capacity_gib"),
        ({"quantization": {"load_in_4bit": 1}}, "quantization.load_in_4bit"),
        ({"quantization": {"bnb_4bit_quant_type": "nf5"}}, "quantization.bnb_4bit_quant_type"),
        ({"trainer": "axolotl"}, "trainer"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_refusal_names_the_field(payload: dict[str, Any], field: str) -> None:
    assert field in [error.field for error in refusal(**payload).errors]


@pytest.mark.parametrize("peft_type", ["IA3", "PREFIX_TUNING"])
def test_adapters_other_than_lora_are_refused(peft_type: str) -> None:
    assert "LORA" in refusal(peft={"peft_type": peft_type}).message


GENERATED = {"model": "gpt2", "inference": {"prompt_length": 64, "max_new_tokens": 8}}


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("num_beams", 4, "beam search"),
        ("prompt_lookup_num_tokens", 3, "assisted decoding"),
        ("assistant_model", "distilgpt2", "assisted decoding"),
        ("cache_config", {"backend": "quanto", "nbits": 4}, "a cache of another kind"),
        ("cache_implementation", "quantized", "quantized"),
        ("cache_implementation", "offloaded", "offloaded"),
        ("output_logits", True, "logits kept to the end"),
        ("use_cache", False, "without a cache"),
        ("max_new_tokens", 0, "greater than or equal to 1"),  # generate refuses it too
        ("num_beans", 1, "did you mean 'num_beams'?"),
    ],
)
def test_generation_of_another_kind_is_refused_by_name(field: str, value: object, named: str) -> None:
    with pytest.raises(RequestError, match=named.replace("?", r"\?")) as refused:
        read_estimate({**GENERATED, "inference": {**GENERATED["inference"], field: value}})
    assert refused.value.errors[0].field == f"inference.{field}"


def test_a_whole_generation_config_is_accepted() -> None:
    transformers = pytest.importorskip("transformers")
    written = transformers.GenerationConfig(do_sample=True, temperature=0.7, num_beams=1).to_dict()
    question = read_estimate(
        {**GENERATED, "inference": {**GENERATED["inference"], **{k: v for k, v in written.items() if k != "max_new_tokens"}}}
    )
    assert {"inference.temperature", "inference.num_beams"} <= set(question.ignored)
    assert question.unmodelled == ("inference.do_sample",)


def test_quantization_other_than_bitsandbytes_is_refused() -> None:
    assert "bitsandbytes" in refusal(quantization={"quant_method": "gptq", "bits": 4}).message


def test_a_token_is_never_repeated() -> None:
    token = "hf_abcdefghijklmnop"
    assert token not in refusal(**{token: token}).message
    assert token not in refusal(dtype=["x"], engine=token).message
    question = read(training={"hub_token": token})
    assert question.ignored == ("training.hub_token",)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"model": NaN}',
        b'{"model": Infinity}',
        b'{"x": 1e999}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"x" * (MAX_BODY_BYTES + 1),
    ],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        read_json(body)


def test_deep_nesting_is_refused() -> None:
    nested: Any = 1
    for _ in range(200):
        nested = {"a": nested}
    with pytest.raises(RequestError, match="nested"):
        read_estimate({"model": {"config": nested}})


# -- what is accepted ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headroom", [[], {}, -1, 1.5, True, "x" * 40, 2**60])
def test_a_headroom_that_is_not_accepted_says_what_is(headroom: Any) -> None:
    error = refusal(hardware={"gpu": "t4", "headroom": headroom})
    assert [one.field for one in error.errors] == ["hardware.headroom"]
    assert "bytes, a size such as 512MiB, or a share such as 5%" in error.message


@pytest.mark.parametrize("number", [0, -1, "16", 1.5, True, 2**30, [16]])
def test_a_global_batch_that_is_not_accepted_says_what_is(number: Any) -> None:
    with pytest.raises(RequestError, match=r"expected a whole number of samples, 1 to 1,048,576, or null") as caught:
        read_plan({"model": "gpt2", "global_batch_size": number})
    assert [one.field for one in caught.value.errors] == ["global_batch_size"]


def test_the_bounds_that_messages_name_are_those_of_the_fields() -> None:
    assert read_plan({"model": "gpt2", "global_batch_size": 1_048_576}).request.global_batch_size == 1_048_576


@pytest.mark.parametrize(
    ("axis", "field"), [(0, "max_length"), (["512"], "max_length.0"), ([512, 0], "max_length.1"), (1.5, "max_length"), ({}, "max_length")]
)
def test_an_axis_that_is_not_accepted_names_its_element_and_says_what_is(axis: Any, field: str) -> None:
    with pytest.raises(RequestError, match=r"one, a list, or first\.\.last:step such as 512\.\.8192:512") as caught:
        read_sweep({"model": "gpt2", "sweep": {"max_length": axis}})
    assert [one.field for one in caught.value.errors] == [f"sweep.{field}"]


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"model": "gpt2", "model": "t5"}', "model"),
        (b'{"model": "gpt2", "training": {"max_length": 5, "optim": "sgd", "max_length": 6}}', "max_length"),
        (b'{"model": {"config": {"layers": [{"a": 1, "\\u0061": 1}]}}}', "a"),
    ],
)
def test_a_key_that_stands_twice_is_refused_by_its_name(body: bytes, key: str) -> None:
    with pytest.raises(RequestError, match=rf"^{key}: is given twice") as caught:
        read_json(body)
    assert [one.field for one in caught.value.errors] == [key]
    with pytest.raises(RequestError, match=rf"^{key}: is given twice"):
        parse("request", body.decode())


def test_the_same_key_in_several_objects_is_no_repetition() -> None:
    body = b'{"model": "gpt2", "peft": {"r": 8}, "sweep": {"r": 8}}'
    assert read_json(body) == parse("request", body.decode())


def test_a_merged_mapping_may_be_overridden() -> None:
    assert parse("request", "base: &b {r: 8, bias: none}\npeft:\n  <<: *b\n  r: 16\n")["peft"] == {"r": 16, "bias": "none"}


def test_nesting_that_python_cannot_follow_is_refused() -> None:
    with pytest.raises(RequestError):
        read_json(b'{"a":' * 1000 + b"1" + b"}" * 1000)
