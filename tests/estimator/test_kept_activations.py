"""What each layer keeps for its backward pass: the tape against the real autograd, to the byte."""

from typing import Any

import pytest

from tests.oracle import estimates
from tests.oracle.compare import MODELLED
from tests.oracle.models import MODES
from tests.oracle.run import kept

PROMISED = (
    "llama",
    "mistral",
    "mistral_window",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_neox",
    "gpt2",
    "falcon",
    "falcon_old",
    "starcoder2",
    "mixtral",
    "qwen3_moe",
)
MISSING = tuple(name for name in PROMISED if name not in MODELLED)

SIZES = ((1, 17), (2, 24), (3, 40))

# One of each kind of mode: every cell of the table is run by `make slow`, these always.
SAMPLE = (
    "full_bf16",
    "full_fp32_autocast",
    "lora_bf16_fp32_autocast",
    "qlora_bf16_autocast",
    "qlora_prepared_autocast",
    "int8_fp32_autocast",
)


def assert_layers_keep_the_same(family: str, mode: Any, B: int, S: int, **options: Any) -> None:
    few, many = 3, 4
    real = kept(family, mode, B, S, many, **options).num_bytes - kept(family, mode, B, S, few, **options).num_bytes
    said = estimates.kept_bytes(family, mode, B, S, many, **options) - estimates.kept_bytes(family, mode, B, S, few, **options)
    assert said == real, f"per token: {said / (B * S)} instead of {real / (B * S)}"


def test_every_promised_family_has_blocks() -> None:
    assert not MISSING


@pytest.mark.parametrize("mode", SAMPLE)
@pytest.mark.parametrize("family", MODELLED)
def test_a_layer_keeps_what_autograd_keeps(family: str, mode: str) -> None:
    assert_layers_keep_the_same(family, mode, 2, 24)


@pytest.mark.parametrize("family", MODELLED)
def test_a_layer_keeps_what_autograd_keeps_of_one_sequence(family: str) -> None:
    assert_layers_keep_the_same(family, "lora_bf16_fp32_autocast", *SIZES[0])


@pytest.mark.slow
@pytest.mark.parametrize(("B", "S"), SIZES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", MODELLED)
def test_a_layer_keeps_what_autograd_keeps_in_every_mode_and_size(family: str, mode: str, B: int, S: int) -> None:
    assert_layers_keep_the_same(family, mode, B, S)


@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.adapter])
def test_a_layer_keeps_masks_and_dropped_inputs_under_lora_dropout(mode: str) -> None:
    assert_layers_keep_the_same("llama", MODES[mode].with_adapter(dropout=0.1), 2, 24)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("mode", ["lora_bf16_bf16", "lora_bf16_fp32_autocast", "qlora_prepared_autocast", "int8_fp32_autocast"])
def test_a_layer_keeps_inputs_of_adapted_modules_only(mode: str, targets: tuple[str, ...]) -> None:
    assert_layers_keep_the_same("llama", MODES[mode].with_adapter(targets=targets), 2, 24)


@pytest.mark.parametrize("mode", ["full_bf16", "lora_bf16_fp32_autocast", "qlora_prepared_autocast"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_keeps_a_mask_and_repeated_heads(attention: str, mode: str) -> None:
    assert_layers_keep_the_same("llama", mode, 2, 24, padded=True, attention=attention)


@pytest.mark.parametrize("mode", ["full_bf16", "lora_bf16_fp32_autocast", "qlora_prepared_autocast"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_samples_in_one_row_keep_a_mask_of_all_their_tokens(attention: str, mode: str) -> None:
    assert_layers_keep_the_same("llama", mode, 3, 24, flattened=True, attention=attention)


@pytest.mark.parametrize("mode", ["full_bf16", "full_fp32_autocast", "lora_bf16_fp32_autocast", "qlora_prepared_autocast"])
def test_eager_attention_keeps_scores(mode: str) -> None:
    assert_layers_keep_the_same("llama", mode, 2, 24, attention="eager")


@pytest.mark.parametrize(("B", "S"), SIZES[:2])
@pytest.mark.parametrize("mode", ["full_bf16", "lora_bf16_fp32_autocast", "qlora_prepared"])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_sdpa_without_a_kernel_keeps_scores_and_heads_in_float32(family: str, mode: str, B: int, S: int) -> None:
    assert_layers_keep_the_same(family, mode, B, S, written_out=True)


@pytest.mark.parametrize("gc", [False, True])
@pytest.mark.parametrize("mode", SAMPLE)
def test_a_checkpointed_layer_keeps_its_input_and_what_int8_hides_from_checkpointing(mode: str, gc: bool) -> None:
    assert_layers_keep_the_same("llama", mode, 2, 24, gc=gc)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("mode", ["lora_bf16_fp32", "lora_bf16_fp32_autocast", "qlora_bf16_autocast", "qlora_prepared_autocast"])
def test_a_layer_keeps_the_base_results_that_dora_scales(mode: str, dropout: float) -> None:
    assert_layers_keep_the_same("llama", MODES[mode].with_adapter(dora=True, dropout=dropout), 2, 24)
