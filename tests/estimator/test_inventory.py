"""The inventory against the model that transformers builds."""

import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.base import get_keys_to_not_convert

from estimator.introspect.build import build
from estimator.introspect.errors import BuildError
from estimator.introspect.inventory import inspect
from estimator.inventory import Inventory, ModuleKind, TensorRole
from estimator.sources import catalogue
from estimator.sources.resolve import resolve

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Default configs that transformers 5.23 itself cannot build, and the exception it raises.
NOT_BUILDABLE = {
    "cohere_compass_text": "KeyError",
    "dbrx": "AttributeError",
    "dots1": "TypeError",
    "gemma3n": "ImportError",  # its vision tower is timm's, which needs pillow
    "gemma4_assistant": "StrictDataclassClassValidationError",
    "gemma4_unified_assistant": "ValueError",
    "hunyuan_v1_dense": "TypeError",
    "hunyuan_v1_moe": "TypeError",
    "lfm2_moe": "TypeError",
    "ministral": "TypeError",
    "musicgen": "AttributeError",
    "musicgen_melody": "AttributeError",
    "nemotron": "TypeError",
    "qwen4_exp": "TypeError",
    "qwen4_exp_text": "TypeError",
    "reformer": "AssertionError",
}
BUILDABLE = tuple(name for name in MODEL_TYPES if name not in NOT_BUILDABLE)
needs_recorded_version = pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="recorded with transformers 5.23")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def default_config(model_type: str) -> dict[str, Any]:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return {"model_type": model_type, "architectures": [names] if isinstance(names, str) else list(names)}


def built_by_transformers(model_type: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](), dtype=torch.float32)


def check_counts(model_type: str) -> None:
    inventory, model = inspect(default_config(model_type), model_type), built_by_transformers(model_type)
    assert inventory.num_parameters == sum(p.numel() for p in model.parameters()), model_type
    assert sum(r.num_elements * r.num_copies for r in inventory.buffers) == sum(b.numel() for b in model.buffers()), model_type
    names = [name for row in inventory.rows if row.role is TensorRole.PARAMETER for name in row.names()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters(remove_duplicate=False)), model_type


@needs_recorded_version
@pytest.mark.parametrize("model_type", BUILDABLE[::8])
def test_a_default_config_has_the_parameters_of_the_real_model(model_type: str) -> None:
    check_counts(model_type)


@needs_recorded_version
@pytest.mark.slow
def test_every_buildable_default_config_has_the_parameters_of_the_real_model() -> None:
    assert len(BUILDABLE) == 173
    for model_type in BUILDABLE:
        check_counts(model_type)


@needs_recorded_version
@pytest.mark.parametrize("model_type", NOT_BUILDABLE)
def test_a_default_config_that_transformers_cannot_build_is_refused_with_its_reason(model_type: str) -> None:
    with pytest.raises(BuildError, match=NOT_BUILDABLE[model_type]):
        inspect(default_config(model_type), model_type)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the type is the recorded one
        built_by_transformers(model_type)
    assert type(caught.value).__name__ == NOT_BUILDABLE[model_type]


def row_named(inventory: Inventory, pattern: str) -> Any:
    (row,) = (row for row in inventory.rows if row.pattern == pattern)
    return row


def test_llama_is_a_table_of_twelve_parameters_and_two_buffers() -> None:
    inventory = resolve("meta-llama/Llama-3.1-8B").inventory
    assert [row.pattern for row in inventory.rows] == [
        "model.embed_tokens.weight",
        *(f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "model.layers.{}.input_layernorm.weight",
        "model.layers.{}.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.rotary_emb.inv_freq",
        "model.rotary_emb.original_inv_freq",
    ]
    assert (inventory.input_embedding, inventory.output_embedding, inventory.layers_prefix) == (
        "model.embed_tokens",
        "lm_head",
        "model.layers",
    )
    assert row_named(inventory, "model.layers.{}.mlp.up_proj.weight").module_kind is ModuleKind.LINEAR
    frequencies = row_named(inventory, "model.rotary_emb.inv_freq")
    assert (frequencies.role, frequencies.dtype_is_fixed) == (TensorRole.NONPERSISTENT_BUFFER, True)


def test_a_tied_head_is_named_and_counted_once() -> None:
    inventory = resolve("meta-llama/Llama-3.2-1B").inventory
    assert row_named(inventory, "lm_head.weight").tied_to == "model.embed_tokens.weight"
    assert inventory.tied_names == ("lm_head.weight", "model.embed_tokens.weight")
    assert inventory.num_parameters == 1_235_814_400


def test_gpt2_has_conv1d_modules_and_ends_in_its_last_norm() -> None:
    inventory = resolve("openai-community/gpt2").inventory
    assert row_named(inventory, "transformer.h.{}.attn.c_attn.weight").module_kind is ModuleKind.CONV1D
    assert row_named(inventory, "transformer.h.{}.attn.c_attn.weight").shape == (768, 3 * 768)
    assert inventory.last_parameter_module == "transformer.ln_f"
    assert (inventory.config["hidden_size"], inventory.config["intermediate_size"]) == (768, 3072)


def test_t5_shares_one_embedding_three_times_and_flan_keeps_a_head_of_its_own() -> None:
    small, flan = resolve("google-t5/t5-small").inventory, resolve("google/flan-t5-small").inventory
    tied = {row.pattern for row in small.rows if row.tied_to == "shared.weight"}
    assert tied == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert row_named(flan, "lm_head.weight").tied_to is None
    assert flan.num_parameters == 60_511_616 + 32_128 * 512


@pytest.mark.parametrize(
    ("model", "supported", "default"),
    [
        ("meta-llama/Llama-3.1-8B", {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}, "sdpa"),
        ("google/gemma-2-9b", {"eager", "flash_attention_2", "flash_attention_3", "flex_attention"}, "eager"),
        ("openai/gpt-oss-20b", {"eager", "flash_attention_2", "flash_attention_3", "flex_attention"}, "eager"),
        ("bigscience/bloom-560m", {"eager"}, "eager"),
        ("tiiuae/falcon-7b", {"eager", "sdpa", "flash_attention_2"}, "sdpa"),
    ],
)
def test_attention_is_what_transformers_would_choose(model: str, supported: set[str], default: str) -> None:
    inventory = resolve(model).inventory
    assert (set(inventory.supported_attention), inventory.default_attention) == (supported, default)


def test_a_parameter_whose_module_asks_for_float32_is_marked() -> None:
    inventory = inspect({**default_config("ernie4_5_moe"), "num_hidden_layers": 2}, "ernie")
    assert row_named(inventory, "model.layers.{}.mlp.gate.weight").dtype_is_fixed
    assert not row_named(inventory, "model.embed_tokens.weight").dtype_is_fixed


def test_modules_kept_in_float32_are_those_of_the_class() -> None:
    assert resolve("openai/gpt-oss-20b").inventory.keep_in_fp32_modules == ("input_layernorm", "norm", "post_attention_layernorm")
    assert resolve("deepseek-ai/DeepSeek-V3").inventory.keep_in_fp32_modules_strict == ("e_score_correction_bias",)


@pytest.mark.parametrize(
    "name", ["gpt2", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "google/gemma-2-2b", "google-t5/t5-small", "facebook/opt-125m"]
)
def test_names_of_ties_head_and_last_module_make_up_the_skip_list_of_transformers(name: str) -> None:
    entry = catalogue.find(name)
    assert entry is not None
    model = catalogue.load(entry.file)
    inventory = model.inventory
    names = {*inventory.tied_names, f"{inventory.output_embedding}.weight"}
    last = {f"{inventory.last_parameter_module}.{leaf}" for leaf in ("weight", "bias")}
    expected = set(get_keys_to_not_convert(build(model.config)[1]))
    assert {name.removesuffix(".weight") for name in names} <= expected
    assert expected <= {name.removesuffix(".weight") for name in names | last}


@pytest.mark.parametrize(
    ("name", "auto_class", "is_composite"),
    [
        ("meta-llama/Llama-3.1-8B", "causal_lm", False),
        ("BAAI/bge-large-en", "model", False),
        ("google-bert/bert-base-cased", "masked_lm", False),
        ("google-t5/t5-small", "seq2seq_lm", False),
        ("Qwen/Qwen3-VL-4B-Instruct", "image_text_to_text", True),
    ],
)
def test_the_class_named_in_the_config_decides(name: str, auto_class: str, is_composite: bool) -> None:
    config = resolve(name).inventory.config
    assert (config["auto_class"], config["is_composite"]) == (auto_class, is_composite)


def test_a_vision_language_model_keeps_its_vision_part_in_the_count() -> None:
    inventory = resolve("Qwen/Qwen3-VL-4B-Instruct").inventory
    vision = [row for row in inventory.parameters if row.pattern.startswith("model.visual.")]
    assert sum(row.num_elements * row.num_copies for row in vision) > 400_000_000
    assert inventory.layers_prefix == "model.language_model.layers"
    assert inventory.config["hidden_size"] == 2560


def test_every_layer_list_is_as_long_as_the_config_says() -> None:
    for entry in catalogue.entries():
        inventory = catalogue.load(entry.file).inventory
        expected = inventory.config.get("num_decoder_layers", inventory.config["num_hidden_layers"])
        assert inventory.num_layers == expected, entry.id
        prefix = re.escape(f"{inventory.layers_prefix}.{{}}.")
        assert math.prod(r.num_copies for r in inventory.rows if re.match(prefix, r.pattern)) > 0


def test_the_resolved_configs_hold_what_block_formulas_need() -> None:
    needed = {"hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"}
    for entry in catalogue.entries():
        inventory = catalogue.load(entry.file).inventory
        if "mamba" not in entry.model_type and "moe" not in entry.model_type:
            assert needed <= set(inventory.config), entry.id
