"""YAMLs of `trl sft --config` and arguments of scripts, against the installed libraries' own parsers."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.answer import Json
from app.reading import read_estimate
from app.request import PeftFields, QuantizationFields, TrainingFields
from app.trainer_files.opening import opened
from estimator.errors import RequestError

QLORA: Json = {
    "model_name_or_path": "Qwen/Qwen2.5-7B",
    "dataset_name": "some/data",
    "dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "use_peft": True,
    "lora_r": 16,
    "lora_dropout": 0.1,
    "lora_target_modules": ["all-linear"],
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "max_length": 2048,
    "packing": True,
    "learning_rate": 2e-4,
    "optim": "paged_adamw_8bit",
    "gradient_checkpointing": True,
    "report_to": "none",
    "output_dir": "out",
}
LORA: Json = {
    key: value for key, value in QLORA.items() if key not in ("load_in_4bit", "use_bnb_nested_quant", "lora_r", "lora_dropout", "dtype")
}


def _opened(values: Json, name: str = "sft.yaml") -> Json:
    return opened({"files": [{"name": name, "content": values}]})


@pytest.fixture
def has_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's card is not asked."""
    training_args = pytest.importorskip("transformers.training_args")
    monkeypatch.setattr(training_args, "is_torch_bf16_gpu_available", lambda: True, raising=False)


@pytest.mark.usefixtures("has_bfloat16")
@pytest.mark.parametrize("values", [QLORA, LORA, {**QLORA, "load_in_8bit": True, "load_in_4bit": False}], ids=["qlora", "lora", "int8"])
def test_trls_own_parser_makes_the_same_objects(values: Json, tmp_path: Path) -> None:
    trl: Any = pytest.importorskip("trl")
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(values))
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig))
    _, arguments, model = parser.parse_args_and_config(args=["--config", str(path)])
    request = read_estimate(_opened(values)).request
    assert request.model == model.model_name_or_path
    assert (request.dtype or "float32") == model.dtype
    assert request.attn_implementation == model.attn_implementation
    quantization, adapter = trl.get_quantization_config(model), trl.get_peft_config(model)
    assert (request.quantization is None) == (quantization is None)
    if request.quantization is not None:
        theirs = quantization.to_dict()
        ours = request.quantization.model_dump()
        same = ("load_in_4bit", "load_in_8bit") if theirs["load_in_8bit"] else QuantizationFields.model_fields
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert request.peft is not None
    same = [name for name in PeftFields.model_fields if getattr(request.peft, name) is not None]
    assert {name: getattr(request.peft, name) for name in same} == {name: getattr(adapter, name) for name in same}
    assert request.training is not None
    for name in TrainingFields.model_fields:
        if (ours := getattr(request.training, name)) and hasattr(arguments, name):
            assert str(getattr(arguments, name)).rpartition(".")[2].lower() == str(ours).lower(), name


def test_adapter_fields_without_use_peft_are_without_effect() -> None:
    request = _opened({**LORA, "use_peft": False, "lora_r": 64})
    assert "peft" not in request
    assert "sft.yaml: lora_r" in request["set_aside"]["ignored"]


def test_the_allocators_settings_are_read_from_the_environment_of_the_file() -> None:
    request = _opened({**LORA, "env": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "WANDB_MODE": "offline"}})
    assert request["pytorch_cuda_alloc_conf"] == "expandable_segments:True"
    assert "sft.yaml: env.WANDB_MODE" in request["set_aside"]["ignored"]


def test_a_type_that_cannot_be_computed_in_is_refused() -> None:
    with pytest.raises(RequestError, match="'auto' cannot be the compute type"):
        _opened({**QLORA, "dtype": "auto"})


def test_a_key_that_trl_passes_over_is_reported() -> None:
    found = _opened({**LORA, "lora_dropuot": 0.1})["set_aside"]["not_modelled"]["sft.yaml: lora_dropuot"]
    assert "passes over" in found
    assert "'lora_dropout'" in found


def test_training_arguments_need_a_length() -> None:
    arguments = {"output_dir": "out", "per_device_train_batch_size": 1, "bf16": True, "optim": "adamw_torch", "logging_steps": 10}
    request = opened({"files": [{"name": "args.json", "content": arguments}], "model": "openai-community/gpt2"})
    question = read_estimate({**request, "training": {**request["training"], "max_length": 512}})
    assert question.request.trainer == "transformers"
    assert question.ignored == ("training.logging_steps", "training.output_dir")


def test_what_the_installed_training_arguments_write_is_read_back() -> None:
    """`TrainingArguments.to_json_string` is what scripts leave beside their checkpoints."""
    transformers: Any = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir="out", per_device_train_batch_size=4, gradient_checkpointing=True, report_to=[], use_cpu=False
    )
    request = opened({"files": [{"name": "args.json", "content": arguments.to_json_string()}], "model": "openai-community/gpt2"})
    training = read_estimate(request).request.training
    assert training is not None
    assert (training.per_device_train_batch_size, training.gradient_checkpointing, training.optim) == (4, True, arguments.optim)
