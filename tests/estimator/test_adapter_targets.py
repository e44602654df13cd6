"""Tables carried over from PEFT and transformers against the installed ones, and the rules of matching."""

import re
from pathlib import Path

import pytest
import transformers
from peft.utils import constants
from peft.utils import transformers_weight_conversion as conversion
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from estimator import adapter_targets
from estimator.adapter_targets import DEFAULT_TARGETS, MIXTRAL_LIKE, QWEN2_MOE_LIKE, Matcher, ModuleNames, resolve
from estimator.adapters import TRANSPOSED_EXPERTS
from estimator.errors import RequestError
from estimator.quantization import LINEAR_SUBCLASSES
from estimator.recipe import Adapter

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = Path(transformers.__file__).parent / "models"
PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
LLAMA = ModuleNames(
    model_type="llama",
    modules=("model", "model.layers", *(f"model.layers.{i}.{part}" for i in range(12) for part in PARTS), "lm_head"),
    linear=frozenset(f"model.layers.{i}.{part}" for i in range(12) for part in PARTS) | {"lm_head"},
    output_embedding="lm_head",
    parameters=(),
)


def matched(adapter: Adapter, names: ModuleNames = LLAMA) -> list[str]:
    matcher = Matcher(adapter, resolve(adapter, names, rewrites_experts=True))
    return [name for name in names.modules if matcher.matches(name)]


def test_default_targets_are_those_of_the_installed_peft() -> None:
    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {k: sorted(v) if isinstance(v, tuple) else v for k, v in DEFAULT_TARGETS.items()} == {
        k: sorted(v) if isinstance(v, list) else v for k, v in theirs.items()
    }


def test_families_with_rewritten_experts_are_those_of_the_installed_peft() -> None:
    families: dict[str, set[str]] = {"mixtral": set(), "qwen2_moe": set()}
    for model_type, family in conversion._MODEL_TO_CONVERSION_PATTERN.items():
        if family in conversion._MOE_TARGET_MODULE_MAPPING and get_checkpoint_conversion_mapping(model_type) is not None:
            families[family].add(model_type)
    assert families == {"mixtral": set(MIXTRAL_LIKE), "qwen2_moe": set(QWEN2_MOE_LIKE)}
    assert conversion._MOE_TARGET_MODULE_MAPPING == {
        "mixtral": adapter_targets._MIXTRAL_NAMES,
        "qwen2_moe": adapter_targets._QWEN2_MOE_NAMES,
    }
    assert {name for fused in conversion._MOE_FUSED_TARGETS.values() for name in fused} == {adapter_targets._FUSED_PARAMETER}


def modeling_code() -> str:
    return "\n".join(path.read_text() for path in sorted(MODELS.glob("*/modeling_*.py")))


def test_classes_derived_from_linear_are_all_known() -> None:
    derived = set(re.findall(r"^class (\w+)\((?:torch\.)?nn\.Linear\b", modeling_code(), re.MULTILINE))
    assert derived | {"NonDynamicallyQuantizableLinear"} == LINEAR_SUBCLASSES


def test_classes_of_transposed_experts_are_all_known() -> None:
    pattern = r"@use_experts_implementation\([^)]*is_transposed=True[^)]*\)\s*class (\w+)"
    assert set(re.findall(pattern, modeling_code())) == TRANSPOSED_EXPERTS


def test_all_linear_leaves_out_the_head() -> None:
    assert len(matched(Adapter(r=8, target_modules="all-linear"))) == 36
    assert matched(Adapter(r=8, target_modules="ALL-Linear")) == matched(Adapter(r=8, target_modules="all-linear"))


def test_a_list_holds_suffixes_and_a_string_is_a_pattern_for_the_whole_name() -> None:
    assert len(matched(Adapter(r=8, target_modules=("q_proj",)))) == 12
    assert matched(Adapter(r=8, target_modules=("_proj",))) == []
    assert matched(Adapter(r=8, target_modules="q_proj")) == []
    assert matched(Adapter(r=8, target_modules=r".*\.1\.self_attn\.q_proj")) == ["model.layers.1.self_attn.q_proj"]


def test_chosen_layers_do_not_apply_to_names_given_in_full() -> None:
    adapter = Adapter(r=8, target_modules=("q_proj", "model.layers.7.mlp.up_proj"), layers_to_transform=(1, 10))
    assert matched(adapter) == ["model.layers.1.self_attn.q_proj", "model.layers.7.mlp.up_proj", "model.layers.10.self_attn.q_proj"]


def test_rank_pattern_takes_the_first_key_that_matches_the_end() -> None:
    adapter = Adapter(r=8, target_modules=("q_proj",), rank_pattern=(("layers.1.self_attn.q_proj", 2), ("q_proj", 4)))
    matcher = Matcher(adapter, resolve(adapter, LLAMA, rewrites_experts=True))
    assert [matcher.rank(f"model.layers.{i}.self_attn.q_proj") for i in (1, 2, 11)] == [2, 4, 4]
    assert matcher.rank("lm_head") == 8


def test_half_of_a_fused_pair_is_refused_by_name() -> None:
    names = ModuleNames(model_type="mixtral", modules=(), linear=frozenset(), output_embedding=None, parameters=())
    with pytest.raises(RequestError, match="w1 is fused with w3"):
        resolve(Adapter(r=8, target_modules=("w1",)), names, rewrites_experts=True)
    assert resolve(Adapter(r=8, target_modules=("w1",)), names, rewrites_experts=False).modules == frozenset({"w1"})


def test_a_model_type_without_default_is_told_what_would_match() -> None:
    names = ModuleNames(model_type="new", modules=LLAMA.modules, linear=LLAMA.linear, output_embedding="lm_head", parameters=())
    with pytest.raises(RequestError, match="'q_proj', 'v_proj', 'up_proj'"):
        resolve(Adapter(r=8), names, rewrites_experts=True)


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(RequestError, match="not a regular expression"):
        matched(Adapter(r=8, target_modules="(q_proj"))
