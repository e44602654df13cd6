"""Our lists of keys against the trainers' own: those that are installed are asked, those whose source is at hand are read."""

import ast
import dataclasses
import importlib.util
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from app import fields
from app.trainer_files import accelerate, axolotl, axolotl_fields, llamafactory, llamafactory_fields, trl_fields
from app.trainer_files.translation import Keys, Translation


def _source_of(package: str) -> Path:
    """The folder of a package, found without importing it: its requirements need not be there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


def _fields_of(path: Path, *suffixes: str) -> Iterator[str]:
    """Annotated fields, and their aliases, of the classes of a module whose names end so."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith(suffixes):
            continue
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                yield line.target.id
                value = line.value.keywords if isinstance(line.value, ast.Call) else []
                yield from (k.value.value for k in value if k.arg == "alias" and isinstance(k.value, ast.Constant))


def _taken_by_axolotl() -> set[str]:
    """Keys that the translation takes by itself."""
    values = {"base_model": "-", "adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_target_linear": True}
    keys = Keys(file="", values=values, found=Translation())
    axolotl.translate(keys, {})
    return keys.taken


def test_every_field_of_axolotl_is_translated_or_sorted() -> None:
    schemas = _source_of("axolotl") / "utils" / "schemas"
    files = {
        "config": ("AxolotlInputConfig",),
        "model": ("InputConfig", "OutputConfig"),
        "peft": ("LoraConfig", "ReLoRAConfig"),
        "training": ("HyperparametersConfig", "JaggedLRConfig"),
        "deprecated": ("Parameters",),
        "integrations": ("Config",),
        "multimodal": ("MultiModalConfig",),
    }
    names = {name for file, classes in files.items() for name in _fields_of(schemas / f"{file}.py", *classes)}
    known = axolotl_fields.INERT | axolotl_fields.UNMODELLED.keys() | _taken_by_axolotl()
    assert len(names) > 300
    assert sorted(names - known) == []


def test_every_field_of_axolotls_liger_plugin_is_translated_or_sorted() -> None:
    names = set(_fields_of(_source_of("axolotl") / "integrations" / "liger" / "args.py", "LigerArgs"))
    assert names <= axolotl_fields.PLUGINS["liger"].keys() | axolotl_fields.INERT_OF_PLUGINS | _taken_by_axolotl()


def test_every_field_of_llama_factory_is_translated_or_sorted() -> None:
    hparams = _source_of("llamafactory") / "hparams"
    names = {name for path in hparams.glob("*_args.py") for name in _fields_of(path, "Arguments", "Argument")}
    names -= set(_fields_of(hparams / "evaluation_args.py", "EvaluationArguments")) - set(
        _fields_of(hparams / "data_args.py", "DataArguments")
    )
    # set while parsing, never by a file
    names -= {"block_diag_attn", "compute_dtype", "device_map", "model_max_length"}
    keys = Keys(file="", values={"model_name_or_path": "-", "quantization_bit": 4}, found=Translation())
    llamafactory.translate(keys, {})
    known = llamafactory_fields.INERT | llamafactory_fields.UNMODELLED.keys() | llamafactory_fields.TRAINING | keys.taken
    assert len(names) > 200
    assert sorted(names - known) == []


def test_every_field_of_the_installed_trl_script_is_known() -> None:
    trl = pytest.importorskip("trl")
    names = {
        field.name
        for config in (trl.ScriptArguments, trl.ModelConfig, trl.SFTConfig, trl.DatasetMixtureConfig)
        for field in dataclasses.fields(config)
    }
    assert names <= trl_fields.KNOWN


def test_every_field_of_the_installed_accelerate_is_known() -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    names = {field.name for field in dataclasses.fields(config_args.ClusterConfig)}
    known = accelerate._INERT | accelerate._UNMODELLED.keys()
    assert names - known == {
        "distributed_type",
        "num_processes",
        "mixed_precision",
        "use_cpu",
        "deepspeed_config",
        "fsdp_config",
        "megatron_lm_config",
    }


@pytest.mark.parametrize(
    "tables",
    [
        (
            axolotl_fields.INERT,
            axolotl_fields.UNMODELLED.keys(),
            axolotl_fields.INERT_OF_PLUGINS,
            {"base_model", *axolotl_fields.LORA_KERNELS, *axolotl_fields.ATTENTION_FLAGS},
        ),
        (llamafactory_fields.INERT - llamafactory_fields.TRAINING, llamafactory_fields.UNMODELLED.keys()),
        (trl_fields.SCRIPT, trl_fields.MODEL, trl_fields.LAUNCH, fields.TRAINING - {"trust_remote_code"}),
    ],
    ids=["axolotl", "llamafactory", "trl"],
)
def test_a_key_stands_in_one_table(tables: tuple[Any, ...]) -> None:
    for one, other in combinations(tables, 2):
        assert not set(one) & set(other)
