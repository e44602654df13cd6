"""The worst instant of every phase of a whole training step: the tape against the real one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from estimator.optimizers import BITSANDBYTES
from estimator.optimizers import MODELLED as OPTIMIZERS
from estimator.phases import Phase
from tests.estimator.test_kept_activations import MODELLED, SAMPLE
from tests.oracle import estimates, run
from tests.oracle.models import MODES, Mode
from tests.oracle.run import StepReport, step

# Of what lies above static memory: scalars, index tensors, the order of casts of tiny adapters.
# Of all that is allocated, 2 % would be allowed.
TOLERANCE = 0.01

PHASES = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)
B, S, LAYERS = 3, 48, 4
SCHEMES = {"kept": None, "checkpointed": False, "checkpointed_reentrantly": True}


def assert_peaks_agree(report: StepReport, said: dict[Phase, int]) -> None:
    real = {phase: report.first[phase.value].live_bytes for phase in PHASES}
    wrong = {
        phase.value: f"{said[phase]} instead of {real[phase]}"
        for phase in PHASES
        if abs(said[phase] - real[phase]) > TOLERANCE * real[phase]
    }
    assert not wrong


def check(family: str, mode: str | Mode, gc: bool | None, *, batch: int = B, **options: Any) -> None:
    report = step(family, mode, batch, S, LAYERS, gc=gc, granularity_bytes=1, **options)
    said = estimates.live_bytes(family, mode, batch, S, LAYERS, gc=gc, **options)
    if options.get("accumulation", 1) > 1:  # gradients of earlier micro-batches are counted beside the step
        said = {phase: num_bytes + report.gradient_bytes for phase, num_bytes in said.items()}
    assert_peaks_agree(report, said)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", SAMPLE)
def test_every_phase_peaks_where_the_real_step_does(mode: str, scheme: str) -> None:
    check("llama", mode, SCHEMES[scheme])


@pytest.mark.parametrize("family", [name for name in MODELLED if name != "llama"])
def test_every_phase_of_every_family_peaks_where_the_real_step_does(family: str) -> None:
    check(family, "qlora_prepared_autocast", False)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", MODELLED)
def test_every_phase_of_every_family_and_mode_peaks_where_the_real_step_does(family: str, mode: str, scheme: str) -> None:
    check(family, mode, SCHEMES[scheme])


GROUPED = ("llama", "gemma", "granite", "mixtral")


@pytest.mark.parametrize("scheme", [None, False], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("mode", ["full_bf16", "full_fp32", "qlora_prepared_autocast"])
@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("family", GROUPED)
def test_grouped_heads_that_no_kernel_takes_are_written_out_in_float32(family: str, batch: int, mode: str, scheme: bool | None) -> None:
    """As on a T4 or V100, and in float32 on every card."""
    check(family, mode, scheme, batch=batch, written_out=True)


# Of those that make or keep other tensors than they do for several sequences, and one that does not.
ONE_SEQUENCE = [*(("eager", family) for family in ("gpt_neox", "gpt_bigcode", "deepseek_v2", "llama")), (None, "falcon_old")]


@pytest.mark.parametrize("scheme", [None, False], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("mode", ["full_bf16", "qlora_prepared_autocast"])
@pytest.mark.parametrize(("attention", "family"), ONE_SEQUENCE)
def test_heads_of_one_sequence_are_not_copied(family: str, attention: str | None, mode: str, scheme: bool | None) -> None:
    check(family, mode, scheme, batch=1, attention=attention)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", SAMPLE)
@pytest.mark.parametrize(
    ("attention", "family"),
    [
        *((None, family) for family in MODELLED),
        *(("eager", family) for family in MODELLED if not family.startswith("falcon")),  # Falcon's is left to the trace
    ],
)
def test_every_phase_of_one_sequence_peaks_where_the_real_step_does(family: str, mode: str, scheme: str, attention: str | None) -> None:
    check(family, mode, SCHEMES[scheme], batch=1, attention=attention)


def in_order(changes: list[int]) -> list[int]:
    """Changes as far as the allocator minds, up to the last request: what is released between two is merged in any order.

    Scalars and ids are left out.
    """
    found: list[int] = []
    released: list[int] = []
    for change in changes:
        if abs(change) < 512:
            continue
        if change < 0:
            released.append(change)
        else:
            found += [*sorted(released), change]
            released = []
    return found


@pytest.mark.parametrize(
    ("family", "mode", "gc"),
    [
        *(
            ("llama", mode, gc)
            for mode in ("full_bf16_autocast", "lora_bf16_fp32_autocast", "qlora_prepared_autocast")
            for gc in (None, False)
        ),
        *((family, "full_bf16_autocast", False) for family in ("qwen2", "qwen3", "gemma", "gemma3_text", "granite", "starcoder2")),
    ],
)
def test_a_backward_pass_makes_and_releases_what_the_real_one_does_in_the_same_order(family: str, mode: str, gc: bool | None) -> None:
    """What the allocator makes of a step hangs on it: a weight's gradient before the input's or after it decides what fits where."""
    real, said = (module.backward_changes(family, mode, B, S, 3, gc=gc) for module in (run, estimates))
    assert in_order(said) == in_order(real)


@pytest.mark.parametrize("mode", ["qlora_prepared_autocast", "lora_bf16_fp32_autocast", "int8_fp32_autocast"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_peaks_agree_under_lora_dropout(mode: str, scheme: str) -> None:
    check("llama", MODES[mode].with_adapter(dropout=0.1), SCHEMES[scheme])


@pytest.mark.parametrize("mode", SAMPLE)
def test_loaded_bytes_equal_the_real_models(mode: str) -> None:
    report = step("llama", mode, 1, 8, 2)
    assert estimates.loaded_bytes("llama", mode, 2) == report.static_bytes


@pytest.mark.parametrize("mode", ["qlora_bf16_autocast", "qlora_prepared_autocast", "int8_prepared_autocast"])
@pytest.mark.parametrize("family", ["gpt2", "starcoder2", "qwen2"])
def test_biases_of_quantized_layers_keep_the_type_of_the_first_forward_pass(family: str, mode: str) -> None:
    assert estimates.resting_bytes(family, mode, 2) == step(family, mode, 1, 8, 2).static_bytes


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("mode", ["lora_bf16_fp32_autocast", "qlora_prepared_autocast"])
def test_peaks_agree_under_dora(mode: str, scheme: str) -> None:
    check("llama", MODES[mode].with_adapter(dora=True), SCHEMES[scheme])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mixtral"])
def test_peaks_agree_where_samples_lie_in_one_row(family: str) -> None:
    report = step(family, "qlora_bf16_autocast", B, S, LAYERS, gc=False, granularity_bytes=1, flattened=True)
    assert_peaks_agree(report, estimates.live_bytes(family, "qlora_bf16_autocast", B, S, LAYERS, gc=False, flattened=True))


# Modules whose bias `lora_only` trains, beside others that have one too.
ADAPTED = {"qwen2": ("q_proj", "v_proj"), "phi": ("q_proj", "fc1"), "gpt2": ("c_attn",)}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("mode", ["lora_bf16_fp32_autocast", "qlora_bf16_autocast", "qlora_prepared_autocast", "int8_fp32_autocast"])
@pytest.mark.parametrize("family", ADAPTED)
def test_trained_biases_of_quantized_layers_count_as_in_the_real_step(family: str, mode: str, bias: str) -> None:
    asked = MODES[mode].with_adapter(bias=bias, targets="all-linear" if bias == "all" else ADAPTED[family])
    report = step(family, asked, B, S, LAYERS, granularity_bytes=1)
    assert_peaks_agree(report, estimates.live_bytes(family, asked, B, S, LAYERS))
    if mode == "int8_fp32_autocast" and family != "qwen2":
        return  # LLM.int8 casts biases to the type of the input, float32 after a LayerNorm under autocast; they are counted as loaded
    assert estimates.settled_bytes(family, asked, LAYERS) == (report.static_bytes, report.gradient_bytes)


_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BOTH_EMBEDDINGS = {"modules_to_save": ("embed_tokens", "lm_head")}
_TOKENS = {"trained_tokens": (("embed_tokens", 5),)}
_TIED: Mapping[str, object] = {"config": {"tie_word_embeddings": True}}

# Fields of the adapter, and what else differs.
VARIANTS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "adapted_embedding": ({"targets": (*_LINEAR, "embed_tokens")}, {}),
    "adapted_embedding_tied": ({"targets": (*_LINEAR, "embed_tokens")}, _TIED),
    "adapted_head": ({"targets": (*_LINEAR, "lm_head")}, {}),
    "saved_embeddings": (_BOTH_EMBEDDINGS, {}),
    "saved_embeddings_tied": (_BOTH_EMBEDDINGS, _TIED),
    "saved_embeddings_accumulated": (_BOTH_EMBEDDINGS, {"accumulation": 2}),
    "saved_embedding_tied": ({"modules_to_save": ("embed_tokens",)}, _TIED),
    "saved_head": ({"modules_to_save": ("lm_head",)}, {}),
    "saved_norms": ({"modules_to_save": ("input_layernorm", "norm")}, {}),
    "trained_tokens": (_TOKENS, {}),
    "trained_tokens_tied": (_TOKENS, _TIED),
    "lora_bias": ({"lora_bias": True}, {}),
    "rslora": ({"rslora": True}, {}),
    "queries_and_values": ({"targets": ("q_proj", "v_proj")}, {}),
    "mlp_alone": ({"targets": ("gate_proj", "up_proj", "down_proj")}, {}),
    "dora": ({"dora": True}, {}),
    "dora_under_dropout": ({"dora": True, "dropout": 0.05}, {}),
    "accumulated": ({}, {"accumulation": 2}),
    "every_second_layer": ({}, {"every_n_layers": 2}),
    "tied": ({}, _TIED),
}
ALWAYS = (
    ("adapted_embedding", "lora_bf16_fp32_autocast", None),
    ("saved_embeddings", "qlora_prepared_autocast", False),
    ("saved_embeddings_tied", "lora_bf16_fp32_autocast", False),
    ("saved_embeddings_accumulated", "lora_bf16_fp32_autocast", False),
    ("trained_tokens_tied", "lora_bf16_fp32_autocast", False),
    ("queries_and_values", "qlora_prepared_autocast", False),
    ("dora", "int8_fp32_autocast", False),
    ("every_second_layer", "qlora_prepared_autocast", False),
)


def check_variant(variant: str, family: str, mode: str, gc: bool | None) -> None:
    changes, options = VARIANTS[variant]
    check(family, MODES[mode].with_adapter(**changes) if changes else MODES[mode], gc, **options)


@pytest.mark.parametrize(("variant", "mode", "gc"), ALWAYS)
def test_peaks_agree_for_other_adapters_and_recipes(variant: str, mode: str, gc: bool | None) -> None:
    check_variant(variant, "llama", mode, gc)


@pytest.mark.slow
@pytest.mark.parametrize("gc", SCHEMES.values())
@pytest.mark.parametrize("mode", [*SAMPLE, "lora_bf16_bf16", "lora_fp32_fp32_autocast"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_peaks_agree_for_every_adapter_and_recipe(variant: str, family: str, mode: str, gc: bool | None) -> None:
    if VARIANTS[variant][0] and MODES[mode].adapter is None:
        pytest.skip("nothing to adapt")
    check_variant(variant, family, mode, gc)


@pytest.mark.parametrize("gc", [None, False])
@pytest.mark.parametrize("mode", ["full_bf16", "full_fp32_autocast"])
def test_a_tied_embedding_sums_the_gradients_of_both_its_uses(mode: str, gc: bool | None) -> None:
    check("llama", mode, gc, **_TIED)


@pytest.mark.parametrize("gc", [None, False])
@pytest.mark.parametrize("family", ["gpt_bigcode", "gpt_neox", "gemma"])
def test_padding_is_masked_in_each_layout_of_queries_and_heads(family: str, gc: bool | None) -> None:
    config = {"num_key_value_heads": 1} if family == "gemma" else None
    check(family, "lora_bf16_fp32_autocast", gc, padded=True, config=config)


@pytest.mark.parametrize(("mode", "gc"), [("full_bf16", None), ("full_fp32_autocast", False), ("qlora_prepared_autocast", None)])
def test_the_only_key_head_of_falcons_new_layers_is_seen_by_all_queries_without_a_copy(mode: str, gc: bool | None) -> None:
    check("falcon", mode, gc, config={"num_kv_heads": 1})


_HALF = torch.float16
FLOAT16 = {
    "lora": replace(MODES["lora_bf16_fp32_autocast"], load_dtype=_HALF, autocast_dtype=_HALF),
    "full": replace(MODES["full_fp32_autocast"], autocast_dtype=_HALF),
    "qlora": replace(MODES["qlora_prepared_autocast"], load_dtype=_HALF, compute_dtype=_HALF, autocast_dtype=_HALF),
    "qlora_in_bfloat16": replace(MODES["qlora_fp32_autocast"], load_dtype=_HALF, autocast_dtype=_HALF),
    "int8": replace(MODES["int8_fp32_autocast"], load_dtype=_HALF, autocast_dtype=_HALF),
}


@pytest.mark.parametrize("mode", FLOAT16)
def test_peaks_agree_under_float16_autocast(mode: str) -> None:
    check("llama", FLOAT16[mode], False)


def test_autocast_lowers_the_product_of_a_4bit_layer_that_computes_in_float32() -> None:
    check("llama", replace(MODES["qlora_fp32_autocast"], compute_dtype=torch.float32), False)


# Paged AdEMAMix asks for managed memory on the CPU too; torchao's step is compiled.
RUN_HERE = tuple(name for name in OPTIMIZERS if "paged_ademamix" not in name and name not in ("adamw_torch_4bit", "adamw_torch_8bit"))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "paged_adamw_8bit", "lion_32bit"])
def test_the_optimizers_step_peaks_where_the_real_one_does(optimizer: str) -> None:
    check_update("lora_bf16_fp32_autocast", optimizer)


@pytest.mark.parametrize(("mode", "optimizer"), [("full_bf16", "sgd"), ("lora_bf16_fp32_autocast", "rmsprop")])
def test_the_optimizers_step_peaks_where_the_real_one_does_under_weight_decay(mode: str, optimizer: str) -> None:
    check_update(mode, optimizer, weight_decay=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", RUN_HERE)
@pytest.mark.parametrize("mode", ["full_bf16", "full_fp32_autocast", "lora_bf16_fp32_autocast", "qlora_bf16_autocast"])
def test_every_optimizers_step_peaks_where_the_real_one_does(mode: str, optimizer: str, weight_decay: float) -> None:
    check_update(mode, optimizer, weight_decay=weight_decay)


def check_update(mode: str, optimizer: str, *, weight_decay: float = 0.0) -> None:
    options: Mapping[str, Any] = {"optimizer": optimizer, "weight_decay": weight_decay}
    peak = step("llama", mode, 2, 24, 2, **options).second[Phase.OPTIMIZER_STEP.value]
    real = peak.live_bytes - sum(s.num_bytes for s in peak.storages if s.shape == ())
    said = estimates.update_bytes("llama", mode, 2, 24, 2, **options)
    # On the CPU bitsandbytes' two tables of 1 KiB lie where the states do from the start.
    assert said == real or (optimizer in BITSANDBYTES and 0 < real - said <= 2048)
