"""The oracle itself: it takes CUDA's paths, leaves nothing behind, and says what its own closed forms say."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from estimator.introspect.cuda_paths import autocast_list, cuda_paths
from tests.oracle.live import LiveStorages
from tests.oracle.models import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, RANK
from tests.oracle.run import kept_per_layer, step

h, f, a, ad, kd, r = HIDDEN, INTERMEDIATE, HEADS, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, RANK
LINEAR = 2 * h * ad + 2 * h * kd + 3 * h * f
LORA = r * (2 * (h + ad) + 2 * (h + kd) + 3 * (h + f))

# Bytes per token of h, ad, kd, f and r, and per layer of weights cast; derived by reading modeling_llama.py, lora/layer.py and lora/bnb.py.
FORMS = {
    "full_bf16": (16, 4, 4, 8, 0, 0),
    "full_fp32_autocast": (26, 4, 4, 8, 0, 2 * LINEAR),
    "lora_bf16_bf16": (12, 4, 4, 8, 14, 0),
    "lora_bf16_fp32": (28, 8, 4, 10, 28, 0),
    "lora_bf16_fp32_autocast": (18, 6, 4, 8, 14, 2 * LORA),
    "lora_fp32_fp32_autocast": (18, 6, 4, 8, 14, 2 * (LORA + LINEAR)),
    "qlora_bf16_autocast": (12, 4, 4, 8, 14, 0),
    "qlora_fp32_autocast": (12, 4, 4, 8, 14, 2 * LORA),
    "qlora_fp32_rest_autocast": (18, 4, 4, 14, 14, 0),
    "qlora_prepared": (16, 8, 8, 16, 28, 0),
    "qlora_prepared_autocast": (18, 4, 4, 14, 14, 2 * LORA),
    "int8_fp32_autocast": (12, 4, 4, 8, 14, 2 * LORA),
    "int8_prepared_autocast": (26, 4, 4, 18, 14, 2 * LORA),
}


@pytest.mark.parametrize("mode", FORMS)
def test_a_llama_layer_keeps_what_reading_the_code_says(mode: str) -> None:
    B, S = 2, 33
    ch, ca, ck, cf, cr, weights = FORMS[mode]
    num_bytes, _ = kept_per_layer("llama", mode, B, S)
    assert num_bytes == B * S * (ch * h + ca * ad + ck * kd + cf * f + cr * r + 4 * a + 8) + weights


def test_autocast_runs_norms_and_sums_in_float32_and_linear_layers_in_bfloat16() -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    with cuda_paths(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.LayerNorm(8)(x).dtype is torch.float32
        assert x.softmax(-1).dtype is torch.float32
        assert x.softmax(-1, dtype=torch.bfloat16).dtype is torch.bfloat16
        assert x.pow(2).sum().dtype is torch.float32
        assert x.norm().dtype is torch.float32
        assert x.mean().dtype is torch.bfloat16
        assert nn.Linear(8, 3)(x.float()).dtype is torch.bfloat16
        assert torch.addcmul(x, x.float(), x).dtype is torch.float32


def test_the_lists_are_those_of_the_installed_torch() -> None:
    assert {"layer_norm", "rms_norm", "rsqrt", "pow.Tensor_Scalar", "nll_loss"} <= set(autocast_list("AT_FORALL_FP32"))
    assert {"sum", "softmax.int", "cumsum"} <= set(autocast_list("AT_FORALL_FP32_SET_OPT_DTYPE"))


def test_nothing_is_left_behind() -> None:
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    before = torch.nn.functional.dropout, torch.is_autocast_enabled, torch.get_num_threads()
    with cuda_paths():
        pass
    assert before == (torch.nn.functional.dropout, torch.is_autocast_enabled, torch.get_num_threads())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert x.softmax(-1).dtype is torch.bfloat16


def test_dropout_keeps_a_bool_mask() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    with cuda_paths(), LiveStorages() as live:
        y = nn.functional.dropout(x, 0.5)
        assert sorted(str(s.dtype) for s in live.snapshot()) == ["torch.bool", "torch.float32"]
    del y


def test_a_storage_is_counted_once_and_until_it_is_freed() -> None:
    with LiveStorages(granularity_bytes=512) as live:
        peak = live.begin("test")
        x = torch.zeros(10, 10)
        y = x.t()
        assert live.live_bytes == 512
        z = x + 1
        assert live.live_bytes == 1024
        del z
        assert live.live_bytes == 512
        del x, y
        assert live.live_bytes == 0
    assert peak.num_bytes == 1024


def _out_of_place_sums(product: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, int]:
    """How many gradients the engine sums into a third tensor: by torch's profiler without any mode, and as counted here."""
    x = torch.randn(2, 5, 10, requires_grad=True)
    loss = product(x * 1.5).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward(retain_graph=True)
    x.grad = None
    with LiveStorages(log=True) as live:
        loss.backward()
    assert live.log is not None
    return sum(e.name == "aten::add" for e in profile.events()), sum(e.op == "add.Tensor" for e in live.log)


def test_gradients_are_summed_in_place_where_they_are_without_a_mode() -> None:
    w = torch.randn(10, 10)
    assert _out_of_place_sums(lambda h: (h * 2).exp() * (h * 3).exp()) == (0, 0)
    # the gradient of a matrix product of tokens is a view, which keeps its base alive
    assert _out_of_place_sums(lambda h: (h @ w) * (h @ w)) == (1, 1)
    assert _out_of_place_sums(lambda h: (h @ w) * (h * 2).exp()) == (0, 0)


def test_int8_keeps_its_inputs_through_non_reentrant_checkpointing() -> None:
    B, S = 2, 24
    without, _ = kept_per_layer("llama", "int8_bf16_autocast", B, S, gc=True)
    with_hidden, _ = kept_per_layer("llama", "int8_bf16_autocast", B, S, gc=False)
    assert without == B * S * 2 * h
    # both norms' outputs, the attention's output, the MLP's product: what ctx.tensors holds
    assert with_hidden == without + B * S * 2 * (2 * h + ad + f)


def test_checkpointing_keeps_only_the_layer_inputs_of_4bit_models() -> None:
    num_bytes, _ = kept_per_layer("llama", "qlora_prepared_autocast", 2, 24, gc=False)
    assert num_bytes == 2 * 24 * 4 * h


def test_gradients_of_an_earlier_micro_batch_stay_alive() -> None:
    once = step("llama", "lora_bf16_fp32_autocast", 2, 24, 2, accumulation=1)
    twice = step("llama", "lora_bf16_fp32_autocast", 2, 24, 2, accumulation=2)
    assert twice.first["loss"].live_bytes == once.first["loss"].live_bytes + once.gradient_bytes
    assert twice.gradient_bytes == once.gradient_bytes


def test_the_second_step_carries_optimizer_states() -> None:
    report = step("llama", "full_bf16", 2, 24, 2)
    grown = report.second["forward"].allocated_bytes - report.first["forward"].allocated_bytes
    assert grown == report.optimizer_state_bytes == 2 * report.gradient_bytes + 512 * (2 * 9 + 3)  # a step counter for each tensor
