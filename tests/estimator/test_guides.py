"""Claims of two public QLoRA guides: which hold, under which recipe. Expected figures are the guides', the paper's, PEFT's or a trace's."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from estimator.dtypes import DType
from estimator.engine import estimate
from estimator.estimate import Estimate
from estimator.gpus import find_gpu
from estimator.inventory import Inventory
from estimator.planner import largest_place
from estimator.quantization import packed_bytes, state_bits_per_parameter
from estimator.recipe import Adapter, Attention, Loss, Quantization, QuantizationKind, Recipe, Trainer, Training
from estimator.sources.resolve import resolve
from estimator.stack import Stack
from estimator.static_memory import static_memory
from estimator.units import GIB

ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NF4 = Quantization(kind=QuantizationKind.NF4, double_quant=True, compute_dtype=DType.BFLOAT16)
LORA = Adapter(r=16, target_modules=ALL_SEVEN)
LLAMA_8B, LLAMA_13B, LLAMA_70B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-2-13b-hf", "meta-llama/Llama-3.1-70B"
SEVENTY_BILLION = 70_000_000_000
GB = 10**9
PAGE = Path(__file__).parents[2] / "docs" / "guides.md"


def model(name: str) -> Inventory:
    return resolve(name, None).inventory


def recipe(
    batch: int,
    length: int,
    *,
    optimizer: str = "paged_adamw_8bit",
    quantization: Quantization | None = NF4,
    adapter: Adapter | None = LORA,
    prepared: bool = False,
    loss: Loss = Loss.STOCK,
) -> Recipe:
    """bf16 everywhere, checkpointing on: what the guides' scripts do."""
    return Recipe(
        dtype=DType.BFLOAT16,
        attention=Attention.SDPA,
        quantization=quantization,
        adapter=adapter,
        prepare_for_kbit_training=prepared,
        trainer=Trainer.TRANSFORMERS if loss is Loss.STOCK else Trainer.TRL,
        training=Training(
            micro_batch_size=batch,
            sequence_length=length,
            optimizer=optimizer,
            autocast_dtype=DType.BFLOAT16,
            gradient_checkpointing=True,
            loss=loss,
        ),
        stack=Stack(),
    )


def full(optimizer: str, batch: int = 1, length: int = 512) -> Recipe:
    return recipe(batch, length, optimizer=optimizer, quantization=None, adapter=None)


def lora(batch: int, length: int) -> Recipe:
    return recipe(batch, length, optimizer="adamw_torch_fused", quantization=None)


def accumulating(asked: Recipe) -> Recipe:
    """Gradients stay alive through the forward pass."""
    assert asked.training is not None
    return replace(asked, training=replace(asked.training, gradient_accumulation_steps=4))


def answered(name: str, asked: Recipe) -> Estimate:
    return estimate(model(name), asked)


def allocated(name: str, asked: Recipe) -> int:
    return answered(name, asked).peak.allocated_bytes


def device(name: str, asked: Recipe) -> int:
    found = answered(name, asked).device_bytes
    assert found is not None
    return found


@pytest.mark.parametrize(("dtype", "gigabytes"), [(DType.FLOAT32, 280), (DType.BFLOAT16, 140)])
def test_seventy_billion_parameters_take_four_bytes_or_two_each(dtype: DType, gigabytes: int) -> None:
    assert SEVENTY_BILLION * dtype.itemsize == gigabytes * GB


@pytest.mark.parametrize(("kind", "gigabytes"), [(QuantizationKind.INT8, 70), (QuantizationKind.NF4, 35)])
def test_seventy_billion_quantized_parameters_take_a_byte_or_half_of_one_each(kind: QuantizationKind, gigabytes: int) -> None:
    assert packed_bytes(replace(NF4, kind=kind), SEVENTY_BILLION) == gigabytes * GB


def test_a_real_70b_model_in_four_bits_is_heavier_than_half_a_byte_per_parameter() -> None:
    static = static_memory(model(LLAMA_70B), recipe(1, 512))
    unquantized = 2 * 128_256 * 8192 + 161 * 8192  # embedding, head and the norms stay in 16 bits
    assert static.weights_bytes == (70_553_706_496 - unquantized) // 2 + 2 * unquantized  # the count is the published one


def test_constants_cost_half_a_bit_and_an_eighth_of_a_bit_with_double_quantization() -> None:
    assert state_bits_per_parameter(double_quant=False) == 0.5
    assert state_bits_per_parameter(double_quant=True) == 8 / 64 + 32 / (64 * 256)  # QLoRA, section 3
    assert state_bits_per_parameter(double_quant=True) == pytest.approx(0.127, abs=5e-4)


def test_what_the_guides_say_of_double_quantization_comes_of_dividing_by_1024() -> None:
    said, divided = 0.16, 8 / 64 + 32 / 1024
    assert divided == pytest.approx(said, abs=5e-3)
    assert state_bits_per_parameter(double_quant=True) < 0.9 * said


def test_double_quantization_saves_three_gigabytes_at_seventy_billion_parameters() -> None:
    saved = state_bits_per_parameter(double_quant=False) - state_bits_per_parameter(double_quant=True)
    assert saved == pytest.approx(0.373, abs=5e-4)
    assert SEVENTY_BILLION * saved / 8 / GB == pytest.approx(3.3, abs=0.05)


def test_double_quantization_saves_on_a_real_70b_model_what_it_saves_per_quantized_parameter() -> None:
    double, single = (static_memory(model(LLAMA_70B), recipe(1, 512, quantization=replace(NF4, double_quant=d))) for d in (True, False))
    saved = single.quantization_state_bytes - double.quantization_state_bytes
    assert saved == pytest.approx(68_451_041_280 * 0.373 / 8, rel=2e-3)  # 80 layers of seven projections


def test_rank_sixteen_on_all_seven_projections_trains_forty_two_million_parameters() -> None:
    assert answered(LLAMA_8B, recipe(1, 512)).parameters.trainable == 41_943_040  # PEFT's printout, quoted by both guides


def test_the_guides_total_is_neither_the_packed_nor_the_logical_count() -> None:
    counts = answered(LLAMA_8B, recipe(1, 512)).parameters
    packed = counts.total - counts.quantized + counts.quantized // 2
    assert counts.total == 8_072_204_288
    assert packed == 4_582_543_360
    assert 4_579_280_896 not in (packed, counts.total)


@pytest.mark.parametrize(("batch", "length", "prepared", "gib"), [(4, 2048, True, 24.6), (1, 512, True, 9.7), (1, 512, False, 6.6)])
def test_the_full_script_takes_what_a_trace_of_it_took(batch: int, length: int, prepared: bool, gib: float) -> None:
    asked = recipe(batch, length, optimizer="adamw_torch_fused", prepared=prepared)  # the trace had 32-bit states
    assert allocated(LLAMA_8B, asked) / GIB == pytest.approx(gib, rel=0.02)


def test_paging_eight_bit_states_changes_little_of_it() -> None:
    plain = allocated(LLAMA_8B, recipe(4, 2048, optimizer="adamw_torch_fused", prepared=True))
    paged = allocated(LLAMA_8B, recipe(4, 2048, prepared=True))
    # 8 bytes per trained parameter on the card become 0.04 (the small, unpaged states and the scales).
    assert plain - paged == pytest.approx(41_943_040 * 8, rel=0.15)


@pytest.mark.parametrize("loss", [Loss.STOCK, Loss.TRL_TILED, Loss.LIGER])
def test_eight_gigabytes_are_out_of_reach_of_the_script_at_any_length(loss: Loss) -> None:
    assert allocated(LLAMA_8B, recipe(1, 1, prepared=True, loss=loss)) > 8 * GB


def test_six_gigabytes_are_out_of_reach_even_without_the_upcast() -> None:
    assert allocated(LLAMA_8B, recipe(1, 1)) > 6 * GB


# Llama-3.1-8B by its shapes: 32 layers of 4,096 and 14,336, 8 of 32 heads for keys and values, 128,256 words.
_LAYERS, _HIDDEN, _INNER, _KEYS, _WORDS = 32, 4096, 14_336, 1024, 128_256
_QUANTIZED = _LAYERS * (2 * _HIDDEN * _HIDDEN + 2 * _HIDDEN * _KEYS + 3 * _HIDDEN * _INNER)
# LoRA pairs of rank 16 below 100,000 elements, whose states bitsandbytes does not page: all A but that of down_proj, B of q, k, v, o.
_UNPAGED = _LAYERS * 16 * (6 * _HIDDEN + 2 * _HIDDEN + 2 * _KEYS)
# Half a byte and 0.127 bit of constants for what is quantized; embedding, head and 65 norms in 16 bits; 32-bit adapters; a byte for each of
# two unpaged 8-bit states and 8/256 for their scales; two cuBLAS workspaces of 8.125 MiB.
_RESTING_BYTES = round(
    _QUANTIZED * (1 / 2 + (8 / 64 + 32 / (64 * 256)) / 8)
    + 2 * (2 * _WORDS * _HIDDEN + 65 * _HIDDEN)
    + 41_943_040 * (4 + 8 / 256)
    + 2 * _UNPAGED
    + 2 * 8.125 * 2**20
)
# At the start of the loss' backward pass: the input of every layer and of the final norm and its output in 16 bits, and three float32
# tensors of the logits' size (copy, log-softmax, gradient).
# Source: transformers 5.23, loss/loss_utils.py, ForCausalLMLoss; torch, aten/src/ATen/native/SoftMax.cpp.
_BYTES_PER_TOKEN = 2 * _HIDDEN * (_LAYERS + 2) + 3 * 4 * _WORDS


def most_tokens(batch: int, loss: Loss, limit: int) -> int:
    """Tokens of the largest micro-batch of so many samples within so many gigabytes."""

    def fits(length: int) -> bool:
        return allocated(LLAMA_8B, recipe(batch, length, loss=loss)) <= limit * GB

    def excess(places: np.ndarray) -> np.ndarray:
        return np.array([allocated(LLAMA_8B, recipe(batch, int(place) + 1, loss=loss)) - limit * GB for place in places])

    place = largest_place(np.zeros(131_072, dtype=np.int64), excess, fan=1)
    assert place is not None
    found = place + 1
    assert fits(found)
    assert not fits(found + 1)
    return batch * found


@pytest.mark.parametrize(("batch", "limit"), [(1, 7), (1, 8), (4, 8)])
def test_without_the_upcast_the_stock_loss_leaves_room_for_as_many_tokens_as_shapes_say(batch: int, limit: int) -> None:
    by_hand = (limit * GB - _RESTING_BYTES) / _BYTES_PER_TOKEN
    assert most_tokens(batch, Loss.STOCK, limit) == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize("limit", [7, 8])
def test_a_tiled_loss_leaves_room_for_more_tokens_but_not_for_more_than_the_checkpoints_allow(limit: int) -> None:
    tiled = most_tokens(1, Loss.TRL_TILED, limit)
    assert most_tokens(1, Loss.STOCK, limit) < tiled < (limit * GB - _QUANTIZED / 2) / (2 * _HIDDEN * _LAYERS)


@pytest.mark.parametrize("limit", [7, 8])
def test_the_page_says_what_the_estimator_answers(limit: int) -> None:
    """No evidence for the figures: it keeps the page's table in step."""
    (row,) = re.findall(rf"^\| {limit} GB \| ([\d,]+) \| ([\d,]+) \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    stock, tiled = (int(cell.replace(",", "")) for cell in row)
    assert most_tokens(1, Loss.STOCK, limit) == pytest.approx(stock, rel=0.02)
    assert most_tokens(1, Loss.TRL_TILED, limit) == pytest.approx(tiled, rel=0.02)


def test_an_eight_gigabyte_card_is_not_eight_gigabytes_of_tensors() -> None:
    estimated = answered(LLAMA_8B, recipe(1, 1024))
    assert estimated.device_bytes is not None
    assert estimated.peak.allocated_bytes <= 8 * GB < estimated.device_bytes


@pytest.mark.parametrize(
    ("name", "asked", "gigabytes"),
    [
        pytest.param(LLAMA_8B, full("adamw_torch_fused"), 60, id="8B full, bf16 AdamW states"),
        pytest.param(LLAMA_8B, lora(1, 512), 18, id="8B LoRA, 512 tokens"),
        pytest.param(LLAMA_8B, lora(1, 1024), 18, id="8B LoRA, 1024 tokens"),
        pytest.param(LLAMA_8B, recipe(1, 512, loss=Loss.TRL_TILED), 6, id="8B QLoRA, 512 tokens, no upcast, tiled loss"),
        pytest.param(LLAMA_8B, recipe(1, 1024, loss=Loss.TRL_TILED), 6, id="8B QLoRA, 1024 tokens, no upcast, tiled loss"),
        pytest.param(LLAMA_70B, accumulating(full("adamw_8bit", 4, 2048)), 500, id="70B full, 8-bit AdamW, accumulating"),
        pytest.param(LLAMA_70B, full("ademamix_8bit"), 500, id="70B full, 8-bit AdEMAMix"),
        pytest.param(LLAMA_70B, lora(1, 2048), 150, id="70B LoRA, 2048 tokens"),
        pytest.param(LLAMA_70B, recipe(1, 2048), 48, id="70B QLoRA, 2048 tokens, no upcast"),
    ],
)
def test_a_figure_of_the_guides_table_holds_under_this_recipe(name: str, asked: Recipe, gigabytes: int) -> None:
    assert allocated(name, asked) / GB == pytest.approx(gigabytes, rel=0.10)


@pytest.mark.parametrize(
    ("name", "asked", "gigabytes"),
    [
        pytest.param(LLAMA_8B, lora(4, 2048), 18, id="8B LoRA"),
        pytest.param(LLAMA_8B, recipe(4, 2048, prepared=True), 6, id="8B QLoRA"),
        pytest.param(LLAMA_70B, lora(4, 2048), 150, id="70B LoRA"),
        pytest.param(LLAMA_70B, recipe(4, 2048, prepared=True), 48, id="70B QLoRA"),
    ],
)
def test_no_figure_for_adapters_holds_at_the_batch_of_the_guides_script(name: str, asked: Recipe, gigabytes: int) -> None:
    assert allocated(name, asked) / GB > 1.10 * gigabytes


@pytest.mark.parametrize("prepared", [False, True])
def test_no_run_with_the_stock_loss_trains_8b_in_six_gigabytes(prepared: bool) -> None:
    assert allocated(LLAMA_8B, recipe(1, 512, prepared=prepared)) / GB > 1.10 * 6


def test_adamw_in_its_parameters_type_trains_seventy_billion_in_no_less_than_eight_bytes_each() -> None:
    for dtype, bytes_each in ((DType.BFLOAT16, 8), (DType.FLOAT32, 16)):  # weights, gradients, two states
        found = allocated(LLAMA_70B, replace(full("adamw_torch_fused"), dtype=dtype))
        assert found == pytest.approx(70_553_706_496 * bytes_each, rel=2e-3)
        assert found / GB > 1.10 * 500


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd", "lion_8bit", "adamw_8bit", "paged_adamw_8bit", "adamw_torch_8bit"])
def test_smaller_states_train_seventy_billion_in_less_than_the_guides_say(optimizer: str) -> None:
    assert allocated(LLAMA_70B, full(optimizer)) / GB < 0.90 * 500


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1"])
def test_seven_billion_parameters_fit_an_eight_gigabyte_card_at_two_thousand_tokens(name: str) -> None:
    assert device(name, recipe(1, 2048)) <= find_gpu("rtx4060").capacity_bytes
    assert device(name, recipe(4, 2048, prepared=True)) > find_gpu("rtx4060").capacity_bytes


def test_thirteen_billion_parameters_fit_a_twelve_gigabyte_card_at_two_thousand_tokens() -> None:
    assert device(LLAMA_13B, recipe(1, 2048)) <= find_gpu("rtx3060-12").capacity_bytes


def test_thirteen_billion_parameters_fit_a_twenty_four_gigabyte_card_with_the_guides_script() -> None:
    assert device(LLAMA_13B, recipe(4, 2048, prepared=True)) <= find_gpu("rtx4090").capacity_bytes


def test_the_upcast_turns_embedding_head_and_norms_into_thirty_two_bits() -> None:
    asked = recipe(1, 512)
    upcast = replace(asked, prepare_for_kbit_training=True)
    inventory = model(LLAMA_8B)
    difference = static_memory(inventory, upcast).weights_bytes - static_memory(inventory, asked).weights_bytes
    assert difference == 2 * (2 * 128_256 * 4096 + 65 * 4096)  # Llama-3.1-8B: two 128,256 × 4,096 matrices, 65 norms
