"""Our lists of names against the installed libraries."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import pytest

from app import fields, unmodelled
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
    ("named", "known"),
    [
        (unmodelled.TRAINING, fields.TRAINING),
        (unmodelled.LORA, fields.LORA_CONFIG),
        (unmodelled.QUANTIZATION, fields.BITS_AND_BYTES_CONFIG),
        (unmodelled.GENERATION, fields.GENERATION_CONFIG),
    ],
)
def test_fields_reported_as_unmodelled_are_known(named: Mapping[str, object], known: frozenset[str]) -> None:
    assert set(named) <= known


def test_a_field_is_either_read_or_reported() -> None:
    assert not set(unmodelled.TRAINING) & (set(TrainingFields.model_fields) | unmodelled.EVALUATION)
    assert not set(unmodelled.LORA) & set(PeftFields.model_fields)
    assert unmodelled.EVALUATION <= fields.TRAINING


def test_every_field_of_evaluation_is_reported() -> None:
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    of_evaluation = {name for config in (transformers.TrainingArguments, trl.SFTConfig) for name in _names(config) if "eval" in name}
    assert of_evaluation <= unmodelled.EVALUATION


def test_the_defaults_of_the_installed_libraries_change_nothing() -> None:
    """What `to_dict` writes for fields that nobody set is not reported."""
    transformers = pytest.importorskip("transformers")
    trl = pytest.importorskip("trl")
    peft = pytest.importorskip("peft")
    for config, table in (
        (transformers.TrainingArguments, unmodelled.TRAINING),
        (trl.SFTConfig, unmodelled.TRAINING),
        (peft.LoraConfig, unmodelled.LORA),
    ):
        for field in dataclasses.fields(config):
            default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            assert not unmodelled.changes_memory(table.get(field.name), default), field.name
