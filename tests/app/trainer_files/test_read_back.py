"""Changes of a run that stands in a trainer's file stay within that trainer."""

from typing import Any

import pytest

from app.answer import Json
from app.check import check
from app.reading import read_estimate
from app.service import prepare
from app.settings import applied
from app.shortfall import Shortage
from app.trainer_files.opening import opened
from app.trainer_files.writing import written

MODEL = "HuggingFaceTB/SmolLM2-1.7B"
AXOLOTL: Json = {
    "base_model": MODEL,
    "adapter": "lora",
    "lora_r": 16,
    "lora_target_linear": True,
    "sequence_len": 8192,
    "micro_batch_size": 1,
    "gradient_checkpointing": True,
    "flash_attention": True,
    "bf16": True,
}
LLAMA_FACTORY: Json = {
    "model_name_or_path": MODEL,
    "finetuning_type": "full",
    "cutoff_len": 1024,
    "per_device_train_batch_size": 1,
    "bf16": True,
}
ARGUMENTS: Json = {
    "output_dir": "out",
    "model_name_or_path": MODEL,
    "per_device_train_batch_size": 1,
    "bf16": True,
    "gradient_checkpointing": True,
}


def _opened(content: Json, gpu: str, **changes: Any) -> Json:
    return opened({"files": [{"name": "train", "content": content}], "hardware": {"gpu": gpu}, **changes})


def _changes(request: Json) -> list[Json]:
    """What would be asked for, one by one and together."""
    case = prepare(read_estimate(request))
    shortage = Shortage(case=case, estimate=case.answerer.estimate(case.recipe), payload=request, global_batch=1)
    return [lever.set for lever in shortage.all_levers()]


CASES = pytest.mark.parametrize(
    ("content", "trainer", "changes"),
    [
        (AXOLOTL, "axolotl", {}),
        ({**LLAMA_FACTORY, "finetuning_type": "lora", "cutoff_len": 8192}, "llamafactory", {}),
        (ARGUMENTS, "transformers", {"training": {"max_length": 8192}}),
    ],
)


@CASES
def test_no_change_of_a_training_file_is_another_trainer(content: Json, trainer: str, changes: Json) -> None:
    request = _opened(content, "rtx4060", **changes)
    assert request["set_aside"]["trainer"] == trainer
    own = {**request, "set_aside": {}}
    assert any("trainer" in change for change in _changes(own))
    offered = _changes(request)
    assert offered
    assert not any("trainer" in change for change in offered)


def test_what_a_trainer_cannot_be_told_is_not_offered_and_what_it_makes_its_own_way_is() -> None:
    """LLaMA-Factory loads weights that are trained in full as float32, and a base model in the type of its checkpoint."""
    request = _opened(LLAMA_FACTORY, "rtx4060")
    free, within = (_changes({**request, "set_aside": aside}) for aside in ({}, request["set_aside"]))
    assert any("dtype" in change for change in free)
    assert not any("dtype" in change for change in within)
    assert any("quantization" in change for change in within)


def test_the_change_of_a_check_is_written_as_the_users_kind_of_file() -> None:
    request = _opened(AXOLOTL, "rtx4060")
    found = check(request)
    assert found["verdict"] == "does_not_fit"
    change = applied(request, found["change"]["set"])
    anew = written(change, "axolotl")
    assert (anew.differences, anew.fits) == ((), True)
