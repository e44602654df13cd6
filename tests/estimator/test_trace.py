"""The traced step against the same step really run on the CPU, on tiny models; a few layers against all of them."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.integrations.flash_attention import get_target_dtype
from transformers.trainer_pt_utils import LabelSmoother
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from estimator.introspect.trace.attention import half_precision
from estimator.introspect.trace.errors import RefusedError
from estimator.phases import Phase
from estimator.recipe import Loss
from estimator.static_memory import static_memory
from tests.oracle import estimates, recipes, traces
from tests.oracle import run as oracle
from tests.oracle.models import FAMILIES, build

MODES = (
    "full_bf16",
    "full_fp32_autocast",
    "lora_bf16_fp32_autocast",
    "lora_fp32_fp32_autocast",
    "qlora_bf16_autocast",
    "qlora_fp32_autocast",
    "qlora_prepared",
    "qlora_prepared_autocast",
    "int8_fp32_autocast",
)
CHECKPOINTING = (None, False, True)
BATCH, LENGTH, LAYERS = 2, 40, 3
STEP = ("forward", "loss", "backward")

# One cell of every family by default, modes and kinds of checkpointing in turn.
SAMPLE = [(family, MODES[n % len(MODES)], CHECKPOINTING[n % 3]) for n, family in enumerate(FAMILIES)]
ALL = [cell for cell in product(FAMILIES, MODES, CHECKPOINTING) if cell not in SAMPLE]


def assert_equal(family: str, mode: str, gc: bool | None, *, batch: int = BATCH, **options: Any) -> None:
    real = oracle.step(family, mode, batch, LENGTH, LAYERS, gc=gc, **options).first
    traced = traces.live_bytes(traces.timeline(family, mode, batch, LENGTH, LAYERS, gc=gc, **options))
    assert {phase: traced[phase] for phase in STEP} == {phase: real[phase].live_bytes for phase in STEP}


@pytest.mark.parametrize(("family", "mode", "gc"), SAMPLE)
def test_peaks_equal_those_of_a_real_run(family: str, mode: str, gc: bool | None) -> None:
    assert_equal(family, mode, gc)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mode", "gc"), ALL)
def test_peaks_equal_those_of_a_real_run_in_every_mode(family: str, mode: str, gc: bool | None) -> None:
    assert_equal(family, mode, gc)


@pytest.mark.parametrize(("family", "attention"), [("falcon_old", None), ("gpt_neox", "eager"), ("deepseek_v2", "eager")])
def test_peaks_of_one_sequence_equal_those_of_a_real_run(family: str, attention: str | None) -> None:
    assert_equal(family, "qlora_prepared_autocast", None, batch=1, attention=attention)


@pytest.mark.parametrize(
    ("family", "mode", "attention"),
    [
        ("llama", "qlora_prepared_autocast", None),
        ("gemma3_text", "full_bf16", "eager"),
        ("opt", "full_fp32_autocast", None),
    ],
)
def test_peaks_of_samples_in_one_row_equal_those_of_a_real_run(family: str, mode: str, attention: str | None) -> None:
    assert_equal(family, mode, False, batch=3, flattened=True, attention=attention)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "gc", "attention"), [("qlora_prepared_autocast", False, None), ("full_bf16", None, "eager")])
@pytest.mark.parametrize("family", FAMILIES)
def test_peaks_of_samples_in_one_row_equal_those_of_a_real_run_in_every_family(
    family: str, mode: str, gc: bool | None, attention: str | None
) -> None:
    assert_equal(family, mode, gc, batch=3, flattened=True, attention=attention)


def test_closed_forms_of_a_class_that_calls_flash_attention_itself_are_those_of_the_trace() -> None:
    options: dict[str, Any] = {"gc": None, "attention": "flash_attention_2"}
    traced = traces.live_bytes(traces.timeline("falcon", "qlora_bf16_autocast", 8, 512, 3, **options))
    said = estimates.live_bytes("falcon", "qlora_bf16_autocast", 8, 512, 3, **options)
    for phase in STEP:
        assert said[Phase(phase)] == pytest.approx(traced[phase], rel=0.001)


VARIANTS: Mapping[str, tuple[str, str, Mapping[str, Any], Mapping[str, Any]]] = {
    "dora on 4 bit": ("llama", "qlora_prepared_autocast", {"dora": True}, {"gc": False}),
    "dora on 4 bit, a gate of one output": ("qwen2_moe", "qlora_prepared_autocast", {"dora": True, "targets": ("shared_expert_gate",)}, {}),
    "dora under dropout on 4 bit": ("gpt2", "qlora_bf16_autocast", {"dora": True, "dropout": 0.1}, {}),
    "dora on int8": ("llama", "int8_fp32_autocast", {"dora": True, "dropout": 0.1}, {}),
    "dora": ("gpt2", "lora_bf16_fp32_autocast", {"dora": True}, {"gc": False}),
    "trained tokens": ("phi3", "qlora_prepared_autocast", {"trained_tokens": (("embed_tokens", 5),)}, {"gc": False}),
    "trained tokens, tied": (
        "phi3", "lora_bf16_fp32_autocast", {"trained_tokens": (("embed_tokens", 5),)}, {"config": {"tie_word_embeddings": True}},
    ),
    "balanced experts": (
        "qwen3_moe", "lora_bf16_fp32_autocast", {"targets": ("q_proj", "v_proj")}, {"config": {"output_router_logits": True}},
    ),
    "balanced experts, padded": (
        "qwen3_moe", "qlora_prepared_autocast", {"targets": ("q_proj",)},
        {"config": {"output_router_logits": True}, "padded": True, "gc": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_peaks_of_other_adapters_and_losses_equal_those_of_a_real_run(variant: str) -> None:
    family, name, changes, options = VARIANTS[variant]
    mode = oracle.mode_of(name).with_adapter(**changes)
    real = oracle.step(family, mode, BATCH, LENGTH, LAYERS, **options).first
    traced = traces.live_bytes(traces.timeline(family, mode, BATCH, LENGTH, LAYERS, **options))
    assert {phase: traced[phase] for phase in STEP} == {phase: real[phase].live_bytes for phase in STEP}


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_of_a_tied_head_stop_the_trace_where_trl_stops_on_real_tensors(tied: bool) -> None:
    mode = oracle.mode_of("lora_bf16_fp32_autocast").with_adapter(targets=("q_proj",), trained_tokens=(("embed_tokens", 5),))
    config = {"tie_word_embeddings": tied}
    real: Any = build("llama", mode, LAYERS, config=config)
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    options: Mapping[str, Any] = {"config": config, "loss": Loss.TRL_TILED}
    add_fused_lm_head(real.get_base_model())
    if not tied:
        assert real(input_ids=ids, labels=ids, fused_lm_head=True).loss.requires_grad
        assert traces.timeline("llama", mode, BATCH, LENGTH, LAYERS, **options).peaks()
        return
    with pytest.raises(AttributeError, match=r"'TrainableTokensWrapper' object has no attribute 'bias'"):
        real(input_ids=ids, labels=ids, fused_lm_head=True)
    with pytest.raises(RefusedError, match=r"^TRL reads the head's bias"):
        traces.timeline("llama", mode, BATCH, LENGTH, LAYERS, **options)


@pytest.mark.parametrize("name", ["qlora_bf16_autocast", "lora_bf16_fp32_autocast"])
def test_trained_tokens_of_a_tied_head_stop_trl_with_smoothed_labels_too(name: str) -> None:
    """The loss is that of the full logits; TRL's head serves the metrics alone. The Trainer, which the second mode is of, has none."""
    mode = oracle.mode_of(name).with_adapter(targets=("q_proj",), trained_tokens=(("embed_tokens", 5),))
    config = {"tie_word_embeddings": True}
    if not mode.is_cast_by_trl:
        assert traces.timeline("llama", mode, BATCH, LENGTH, LAYERS, config=config).peaks()
        return
    real: Any = build("llama", mode, LAYERS, config=config)
    add_fused_lm_head(real.get_base_model())
    trainer: Any = SFTTrainer.__new__(SFTTrainer)
    trainer.__dict__.update(
        model=real,
        accelerator=SimpleNamespace(parallelism_config=None),
        args=SimpleNamespace(loss_type="nll"),
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=LabelSmoother(epsilon=0.1),
    )
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    with pytest.raises(AttributeError, match=r"'TrainableTokensWrapper' object has no attribute 'bias'"):
        trainer.compute_loss(real, {"input_ids": ids, "labels": ids})
    with pytest.raises(RefusedError, match=r"^TRL reads the head's bias"):
        traces.timeline("llama", mode, BATCH, LENGTH, LAYERS, config=config)


OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "paged_adamw_32bit")
UPDATES = product(OPTIMIZERS, (0.0,), ("full_bf16", "qlora_prepared_autocast"))


@pytest.mark.parametrize(("optimizer", "weight_decay", "mode"), [*UPDATES, ("sgd", 0.1, "full_bf16")])
def test_the_traced_update_leaves_the_states_of_the_real_optimizer(optimizer: str, weight_decay: float, mode: str) -> None:
    """`static_memory` is held to real steps in test_optimizers."""
    options: Mapping[str, Any] = {"gc": False, "optimizer": optimizer, "weight_decay": weight_decay}
    traced = traces.timeline("llama", mode, BATCH, LENGTH, LAYERS, num_steps=2, **options)
    static = static_memory(recipes.inventory("llama", LAYERS), recipes.recipe("llama", mode, BATCH, LENGTH, **options))
    assert traced.items(len(traced.events) - 1).get("optimizer_states", 0) == static.optimizer_states_bytes
    peak = traced.items(traced.peaks()["optimizer_step"].event).get("temporary", 0)
    # clipping takes one scalar for each gradient, which the answers leave out
    norms = 512 * sum(t.num_copies for t in static.tensors if t.trainable)
    assert static.optimizer_temporary_bytes <= peak <= max(static.optimizer_temporary_bytes, norms + 1024)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_flash_attention_gets_float32_in_the_type_that_transformers_gives_it(quantized: bool, autocast: bool) -> None:
    module = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2, dtype=torch.float16)})
    config: Any = SimpleNamespace(dtype=torch.bfloat16, **({"_is_quantized": True} if quantized else {}))
    module.config = config
    query = torch.zeros(1, 1, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert half_precision(module) is get_target_dtype(query, module)


@pytest.mark.parametrize("mode", ["qlora_prepared", "int8_prepared_autocast"])
def test_closed_forms_hand_a_prepared_model_s_float32_to_flash_attention_as_the_trace_does(mode: str) -> None:
    chosen = replace(oracle.mode_of(mode), autocast=False)
    options: dict[str, Any] = {"gc": None, "attention": "flash_attention_2"}
    traced = traces.live_bytes(traces.timeline("llama", chosen, 4, 128, 3, **options))
    said = estimates.live_bytes("llama", chosen, 4, 128, 3, **options)
    for phase in STEP:
        assert said[Phase(phase)] == pytest.approx(traced[phase], rel=0.001)
