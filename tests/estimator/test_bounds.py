"""Hostile configs end in an error that names the field, before any process works on them."""

import json
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING

from estimator.errors import ConfigError
from estimator.sources import bounds, configfile

LLAMA: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


def nested(depth: int) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for _ in range(depth):
        config = {"a": config}
    return {**LLAMA, "a": config}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"hidden_size": float("nan")}, "hidden_size"),
        ({"hidden_size": float("inf")}, "hidden_size"),
        ({"hidden_size": 2**18}, "hidden_size"),
        ({"hidden_size": [64]}, "hidden_size"),
        ({"hidden_size": []}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"vocab_size": [100]}, "vocab_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"intermediate_size": [64, 64]}, "intermediate_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_key_value_heads": 8}, "num_key_value_heads"),
        ({"text_config": {"hidden_size": [64]}}, "text_config.hidden_size"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1e308}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": [2.0]}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"rope_type": 3, "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 0}}}, "rope_parameters.full_attention.rope_theta"),
        ({"rms_norm_eps": -1e308}, "rms_norm_eps"),
        ({"hidden_size": [64, 2**40]}, "hidden_size"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"num_attention_heads": "__import__('os')"}, "num_attention_heads"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": {"a": 1}}, "vocab_size"),
        ({"num_local_experts": 10**6}, "num_local_experts"),
        ({"n_routed_experts": -5}, "n_routed_experts"),
        ({"intermediate_size": 2**21}, "intermediate_size"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"anything": 2**60}, "anything"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"id2label": {str(n): "x" for n in range(70_000)}}, "id2label"),
        ({"attention_types": [[["global", "local"], 10**9]]}, "attention_types"),
        ({"block_sizes": [10**9]}, "block_sizes"),
        ({"num_self_attends_per_block": 10**9}, "num_self_attends_per_block"),
        ({"expand": 10**9}, "expand"),
        ({"conv_kernel": 10**9}, "conv_kernel"),
        ({"attn_layer_period": 0}, "attn_layer_period"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "text_config.num_hidden_layers"),
        ({"vision_config": {"depth": 5000}}, "vision_config.depth"),
        ({"layer_types": ["full_attention"] * 70_000}, "layer_types"),
        ({"hidden_size": 2**17, "num_hidden_layers": 512, "intermediate_size": 2**20}, "num_parameters"),
        ({"num_experts": 2**15, "num_hidden_layers": 500}, "num_hidden_layers × experts"),
        ({"hidden_size": 8192, "num_experts": 8192, "moe_intermediate_size": 16384, "num_hidden_layers": 100}, "num_parameters"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "../../etc/passwd"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_a_hostile_value_is_refused_by_name_and_at_once(change: dict[str, Any], field: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        bounds.check({**LLAMA, **change})
    assert time.perf_counter() - start < 0.5
    assert caught.value.errors[0].field == f"model.config.{field}"
    assert "accepted: " in caught.value.message
    assert len(caught.value.message) < 500


def test_several_wrong_fields_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        bounds.check({**LLAMA, "hidden_size": -1, "vocab_size": "x"})
    assert {error.field for error in caught.value.errors} == {"model.config.hidden_size", "model.config.vocab_size"}


@pytest.mark.parametrize("config", [None, 3, "llama", [LLAMA], True])
def test_what_is_no_object_is_refused(config: object) -> None:
    with pytest.raises(ConfigError, match="JSON object"):
        bounds.check(config)


def test_depth_is_bounded_and_thirty_levels_are_fine() -> None:
    bounds.check(nested(30))
    with pytest.raises(ConfigError, match="32 levels"):
        bounds.check(nested(40))
    with pytest.raises(ConfigError, match="32 levels"):
        bounds.check(nested(100_000))


def test_flags_and_factors_that_sound_like_sizes_are_let_through() -> None:
    bounds.check(
        {**LLAMA, "use_sliding_window": False, "scale_depth": 1.4, "cross_attn_all_layers": True, "rope_scaling": {"mscale_all_dim": 0.707}}
    )


def test_sizes_per_layer_are_lists_in_the_architectures_that_have_them() -> None:
    bounds.check({"model_type": "gemma3n_text", "intermediate_size": [16384] * 35})
    bounds.check({"model_type": "segformer", "num_attention_heads": [1, 2, 5, 8]})
    bounds.check({"model_type": "lxmert", "num_hidden_layers": {"vision": 5, "cross_encoder": 5, "language": 9}})


def test_every_default_config_of_transformers_passes() -> None:
    num_checked = 0
    for model_type in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[model_type]().to_dict()
            as_stored = json.loads(json.dumps(config))
        except Exception:  # classes without defaults, or whose defaults are no JSON: nobody can paste these
            continue
        bounds.check(as_stored)
        num_checked += 1
    assert num_checked > 700


def test_an_infinite_time_step_limit_as_in_published_mamba_configs_is_left_out() -> None:
    text = json.dumps({**LLAMA, "time_step_limit": [0.0, float("inf")]})
    assert "Infinity" in text
    assert "time_step_limit" not in configfile.parse(text.encode())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe\x00",
        b'{"model_type": "llama", "hidden_size": NaN}',
        b'{"model_type": "llama", "hidden_size": -Infinity}',
        b'{"model_type": "llama", "hidden_size": 1e400}',
        b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"<html>not a config</html>",
        b'{"model_type": "llama", "x": "' + b"y" * 2**20 + b'"}',
    ],
)
def test_a_hostile_file_is_refused_within_two_seconds(content: bytes) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError):
        configfile.parse(content)
    assert time.perf_counter() - start < 2


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
NAMES = st.sampled_from([*LLAMA, "num_experts", "intermediate_size", "text_config", "head_dim", "layer_types"]) | st.text(max_size=10)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=20)


@given(st.dictionaries(NAMES, JSON, max_size=6))
@settings(max_examples=300, deadline=2000)
def test_any_object_is_either_accepted_or_refused_with_an_error_of_ours(config: dict[str, Any]) -> None:
    with suppress(ConfigError):
        json.dumps(bounds.check({"model_type": "llama", **config}), allow_nan=False)
