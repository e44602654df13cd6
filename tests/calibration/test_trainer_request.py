"""What is read off a trainer's objects is the request that they were made from."""

from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from transformers import TrainingArguments

from app.service import answer
from calibration.trainer_request import longest_row, name_of, request_of
from calibration.worker.model import adapted, build
from estimator.errors import RequestError
from tests.calibration.cases import GPT2, LLAMA, NF4, QLORA, case

CPU = torch.device("cpu")
DORA = {"r": 8, "target_modules": "all-linear", "use_dora": True, "lora_alpha": 16, "modules_to_save": ["lm_head"]}
TRAINING: dict[str, Any] = {**QLORA["training"], "optim": "adamw_torch", "gradient_accumulation_steps": 2}


def arguments(fields: dict[str, Any], folder: Any) -> TrainingArguments:
    own = {name: value for name, value in fields.items() if name != "max_length"}
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **own)


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA, {}),
        (LLAMA, {"prepare_model_for_kbit_training": True}),
        (LLAMA, {"quantization": {"load_in_8bit": True}, "training": {**TRAINING, "optim": "adamw_bnb_8bit"}}),
        (LLAMA, {"quantization": None, "peft": None, "training": TRAINING}),
        (LLAMA, {"quantization": None, "peft": DORA, "attn_implementation": "eager"}),
        (LLAMA, {"quantization": {**NF4, "bnb_4bit_use_double_quant": False}, "training": {**TRAINING, "gradient_checkpointing": False}}),
        ({**GPT2, "n_positions": 32}, {"quantization": None, "peft": None, "dtype": "float32", "training": TRAINING}),
    ],
    ids=["nf4", "prepared", "int8", "full", "dora", "not nested", "gpt2"],
)
def test_what_is_read_off_a_run_is_answered_as_the_request_it_came_from(
    config: dict[str, Any], changes: dict[str, Any], tmp_path: Any
) -> None:
    one = case(config, **changes)
    model = adapted(one, build(one, CPU))
    found = request_of(model, arguments(one.training, tmp_path), batch_size=one.batch_size, max_length=one.sequence_length)
    expected = answer({**one.request, "model": {"config": config}})
    answered = answer(found)
    if (adapter := expected["recipe"]["peft"]) is not None and adapter["target_modules"] == "all-linear":
        adapter["target_modules"] = answered["recipe"]["peft"]["target_modules"]  # PEFT has written them out
        assert adapter["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    for name in ("phases", "peak", "parameters", "recipe"):
        assert answered[name] == expected[name], name


def test_checkpointing_that_the_script_switched_on_itself_is_seen(tmp_path: Any) -> None:
    one = case(quantization=None, peft=None)
    model = build(one, CPU)
    off = arguments({"per_device_train_batch_size": 1, "gradient_checkpointing": False}, tmp_path)

    def checkpoints() -> object:
        training = request_of(model, off, batch_size=1, max_length=16)["training"]
        assert isinstance(training, dict)
        return training["gradient_checkpointing"]

    assert checkpoints() is False
    model.activation_checkpointing_enable()
    assert checkpoints() is True


def test_an_adapter_of_another_kind_is_refused_by_name(tmp_path: Any) -> None:
    one = case(quantization=None, peft=None)
    model = get_peft_model(build(one, CPU), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(RequestError, match="IA3Config"):
        request_of(model, arguments({}, tmp_path), batch_size=1, max_length=16)


def test_arguments_of_another_trainer_are_refused_by_name(tmp_path: Any) -> None:
    trl = pytest.importorskip("trl")
    model = build(case(quantization=None, peft=None), CPU)
    with pytest.raises(RequestError, match="DPOConfig"):
        request_of(model, trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[]), batch_size=1, max_length=16)
    asked = request_of(model, trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[]), batch_size=1, max_length=16)
    assert asked["trainer"] == "trl"


def test_a_folder_is_no_name_of_a_model(tmp_path: Any) -> None:
    model = build(case(quantization=None, peft=None), CPU)
    model.config._name_or_path = str(tmp_path)
    assert name_of(model) is None
    model.config._name_or_path = "meta-llama/Llama-3.1-8B"
    assert name_of(model) == "meta-llama/Llama-3.1-8B"


class _Loader:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset


def test_the_longest_row_is_looked_up_where_a_dataset_can_be_asked() -> None:
    assert longest_row(_Loader([{"input_ids": [1] * length} for length in (3, 9, 4)])) == 9
    assert longest_row(_Loader([{"text": "hello"}])) is None
    assert longest_row(_Loader(iter([{"input_ids": [1]}]))) is None
    assert longest_row(None) is None
