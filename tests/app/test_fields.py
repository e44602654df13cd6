"""Our lists of names against the installed libraries."""

import dataclasses
import inspect
from typing import Any

import pytest

from app import fields
from app.request import PeftFields, QuantizationFields, TrainingFields


def _names(config: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def test_every_field_of_the_installed_bitsandbytes_config_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    parameters = set(inspect.signature(transformers.BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    written = set(transformers.BitsAndBytesConfig(load_in_4bit=True).to_dict())
    assert parameters | written <= fields.BITS_AND_BYTES_CONFIG


def test_every_field_of_the_installed_lora_config_is_known() -> None:
    peft = pytest.importorskip("peft")
    assert _names(peft.LoraConfig) <= fields.LORA_CONFIG
    assert set(peft.LoraConfig().to_dict()) <= fields.LORA_CONFIG


def test_every_field_of_the_installed_training_arguments_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    assert _names(transformers.TrainingArguments) <= fields.TRAINING_ARGUMENTS


def test_every_field_of_the_installed_sft_config_is_known() -> None:
    trl = pytest.importorskip("trl")
    assert _names(trl.SFTConfig) <= fields.TRAINING


def test_every_field_of_the_installed_generation_config_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    assert {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")} <= fields.GENERATION_CONFIG


def test_every_optimizer_name_of_the_installed_transformers_is_known() -> None:
    training_args = pytest.importorskip("transformers.training_args")
    assert {name.value for name in training_args.OptimizerNames} <= fields.OPTIMIZERS


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (QuantizationFields, fields.BITS_AND_BYTES_CONFIG),
        (PeftFields, fields.LORA_CONFIG),
        (TrainingFields, fields.TRAINING),
    ],
)
def test_every_field_that_is_read_is_a_field_of_its_library(model: Any, known: frozenset[str]) -> None:
    assert set(model.model_fields) <= known


@pytest.mark.parametrize(
    ("unmodelled", "known"),
    [
        (fields.UNMODELLED_TRAINING, fields.TRAINING),
        (fields.UNMODELLED_LORA, fields.LORA_CONFIG),
        (fields.UNMODELLED_QUANTIZATION, fields.BITS_AND_BYTES_CONFIG),
        (fields.UNMODELLED_GENERATION, fields.GENERATION_CONFIG),
    ],
)
def test_fields_reported_as_unmodelled_are_known(unmodelled: frozenset[str], known: frozenset[str]) -> None:
    assert unmodelled <= known
