"""YAMLs of LLaMA-Factory. Facts are those of 0.9.5; its own parser is asked where it can be imported."""

from typing import Any

import pytest

from app.answer import Json
from app.reading import read_estimate
from app.trainer_files.opening import opened
from estimator.errors import RequestError

QLORA: Json = {
    "model_name_or_path": "meta-llama/Llama-3.1-8B",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 16,
    "lora_target": "all",
    "quantization_bit": 4,
    "dataset": "some_data",
    "template": "llama3",
    "cutoff_len": 2048,
    "output_dir": "out",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": "1.0e-4",
    "bf16": True,
    "flash_attn": "fa2",
}
FULL: Json = {**QLORA, "finetuning_type": "full", "quantization_bit": None, "lora_target": None, "lora_rank": None}


def _opened(values: Json, **others: Json) -> Json:
    files = [{"name": "train.yaml", "content": values}, *({"name": f"{name}.json", "content": content} for name, content in others.items())]
    return opened({"files": files})


def test_four_bits_are_nf4_with_nested_constants_in_the_compute_type() -> None:
    request = _opened(QLORA)
    assert request["quantization"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "bfloat16",
    }
    assert request["peft"] == {"r": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "use_dora": False, "use_rslora": False}
    assert (request["dtype"], request["prepare_model_for_kbit_training"], request["trainer"]) == ("auto", False, "transformers")
    assert request["attn_implementation"] == "flash_attention_2"
    read_estimate(request)


def test_checkpointing_is_on_and_reentrant_unless_it_is_switched_off() -> None:
    training = _opened(QLORA)["training"]
    assert training["gradient_checkpointing"] is True
    assert training["gradient_checkpointing_kwargs"] == {"use_reentrant": True}
    assert _opened({**QLORA, "disable_gradient_checkpointing": True})["training"]["gradient_checkpointing"] is False
    assert _opened({**QLORA, "use_reentrant_gc": False})["training"]["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert _opened({**QLORA, "disable_gradient_checkpointing": True, "gradient_checkpointing": True})["training"]["gradient_checkpointing"]


@pytest.mark.parametrize(
    ("changes", "dtype", "bf16"),
    [
        ({}, "float32", True),
        ({"pure_bf16": True, "bf16": False}, "auto", False),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "bfloat16", True),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "auto", True),
    ],
)
def test_trained_weights_are_float32_but_under_pure_bf16_and_zero(changes: Json, dtype: str, bf16: bool) -> None:
    request = _opened({**FULL, **changes})
    assert (request["dtype"], request["training"]["bf16"]) == (dtype, bf16)


@pytest.mark.parametrize(
    ("changes", "length", "padded"),
    [
        ({}, 2048, True),
        ({"per_device_train_batch_size": 1}, 2048, True),
        ({"packing": True, "cutoff_len": 2047}, 2048, False),
        ({"packing": True}, 2049, True),
        ({"neat_packing": True, "flash_attn": "sdpa"}, 2049, True),
        ({"neat_packing": True}, 2049, None),
        ({"stage": "pt"}, 2048, False),
        ({"stage": "pt", "packing": False}, 2048, True),
        ({"cutoff_len": None}, 2048, True),
    ],
)
def test_rows_are_those_of_its_collators(changes: Json, length: int, padded: bool | None) -> None:
    request = _opened({**QLORA, **changes})
    assert (request["training"]["max_length"], request.get("padded")) == (length, padded)
    assert request["training"].get("padding_free", False) == (padded is None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "dpo"}, "stage: 'dpo' is not known; accepted: pt, sft"),
        ({"finetuning_type": "freeze"}, "accepted: full, lora"),
        ({"quantization_bit": 3}, "quantization_bit: 3 is not accepted; expected 4 or 8"),
        ({"quantization_method": "hqq"}, "quantization_method: 'hqq' is not known"),
        ({"finetuning_type": "full"}, "needs finetuning_type: lora"),
        ({"flash_attn": "flash"}, "flash_attn: 'flash' is not known; accepted: auto, disabled, fa2"),
        ({"lora_rnak": 8}, "not a known field of LLaMA-Factory; did you mean 'lora_rank'"),
    ],
)
def test_what_cannot_be_translated_is_an_error_that_names_it(changes: Json, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _opened({**QLORA, **changes})


def test_keys_are_sorted_by_what_they_do_to_memory() -> None:
    found = _opened({**QLORA, "upcast_layernorm": True, "use_galore": False, "plot_loss": True})["set_aside"]
    assert set(found["not_modelled"]) == {"train.yaml: upcast_layernorm"}
    assert {"train.yaml: plot_loss", "train.yaml: use_galore", "train.yaml: template", "train.yaml: dataset"} <= set(found["ignored"])


@pytest.mark.parametrize("values", [QLORA, FULL], ids=["qlora", "full"])
def test_its_own_parser_reads_the_same(values: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    hparams: Any = pytest.importorskip("llamafactory.hparams")
    transformers = pytest.importorskip("transformers")
    classes = (hparams.ModelArguments, hparams.DataArguments, hparams.FinetuningArguments)
    given = {name: value for name, value in values.items() if value is not None}
    model, data, tuning = transformers.HfArgumentParser(classes).parse_dict(given, allow_extra_keys=True)
    request = _opened(values)
    assert request["training"]["max_length"] == data.cutoff_len
    assert request["training"]["gradient_checkpointing"] is not model.disable_gradient_checkpointing
    assert request["training"]["gradient_checkpointing_kwargs"]["use_reentrant"] == model.use_reentrant_gc
    assert ("quantization" in request) == (model.quantization_bit is not None)
    assert ("peft" in request) == (tuning.finetuning_type == "lora")
    if "peft" in request:
        assert (request["peft"]["r"], request["peft"]["lora_dropout"]) == (tuning.lora_rank, tuning.lora_dropout)
        assert request["quantization"]["bnb_4bit_quant_type"] == model.quantization_type
        assert request["quantization"]["bnb_4bit_use_double_quant"] == model.double_quantization
        assert tuning.lora_target == ["all"]
