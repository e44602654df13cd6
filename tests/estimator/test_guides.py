"""Claims of two public QLoRA guides: which hold, under which recipe. Expected figures are the guides', the paper's, PEFT's or a trace's."""

from dataclasses import replace

import pytest

from estimator.dtypes import DType
from estimator.engine import estimate
from estimator.estimate import Estimate
from estimator.inventory import Inventory
from estimator.quantization import state_bits_per_parameter
from estimator.recipe import Adapter, Attention, Loss, Quantization, QuantizationKind, Recipe, Trainer, Training
from estimator.sources.resolve import resolve
from estimator.stack import Stack
from estimator.static_memory import static_memory
from estimator.units import GIB

ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NF4 = Quantization(kind=QuantizationKind.NF4, double_quant=True, compute_dtype=DType.BFLOAT16)
LORA = Adapter(r=16, target_modules=ALL_SEVEN)
LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"
SEVENTY_BILLION = 70_000_000_000
GB = 10**9


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


def full(optimizer: str) -> Recipe:
    return recipe(1, 512, optimizer=optimizer, quantization=None, adapter=None)


def lora(batch: int, length: int) -> Recipe:
    return recipe(batch, length, optimizer="adamw_torch_fused", quantization=None)


def answered(name: str, asked: Recipe) -> Estimate:
    return estimate(model(name), asked)


def allocated(name: str, asked: Recipe) -> int:
    return answered(name, asked).peak.allocated_bytes


@pytest.mark.parametrize(("dtype", "gigabytes"), [(DType.FLOAT32, 280), (DType.BFLOAT16, 140), (DType.INT8, 70)])
def test_seventy_billion_parameters_take_what_the_guides_say_at_whole_bytes(dtype: DType, gigabytes: int) -> None:
    assert SEVENTY_BILLION * dtype.itemsize == gigabytes * GB


def test_seventy_billion_parameters_take_35_gb_at_half_a_byte() -> None:
    assert (SEVENTY_BILLION + 1) // 2 == 35 * GB


def test_constants_cost_half_a_bit_and_an_eighth_of_a_bit_with_double_quantization() -> None:
    assert state_bits_per_parameter(double_quant=False) == pytest.approx(0.5)
    assert state_bits_per_parameter(double_quant=True) == pytest.approx(8 / 64 + 32 / (64 * 256))  # QLoRA, section 3
    assert state_bits_per_parameter(double_quant=True) == pytest.approx(0.127, abs=5e-4)


def test_double_quantization_saves_three_gigabytes_at_seventy_billion_parameters() -> None:
    saved = state_bits_per_parameter(double_quant=False) - state_bits_per_parameter(double_quant=True)
    assert saved == pytest.approx(0.373, abs=5e-4)
    assert SEVENTY_BILLION * saved / 8 / GB == pytest.approx(3.3, abs=0.05)


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


def test_six_gigabytes_are_out_of_reach_of_the_script_at_any_length() -> None:
    shortest = recipe(1, 1, prepared=True)
    assert allocated(LLAMA_8B, shortest) > 8 * GB


def test_without_the_upcast_eight_gigabytes_hold_a_thousand_tokens() -> None:
    assert allocated(LLAMA_8B, recipe(1, 1024)) <= 8 * GB < allocated(LLAMA_8B, recipe(1, 1280))


@pytest.mark.parametrize(
    ("name", "asked", "gigabytes"),
    [
        pytest.param(LLAMA_8B, full("adamw_torch_fused"), 60, id="8B full, bf16 AdamW states"),
        pytest.param(LLAMA_8B, lora(1, 512), 18, id="8B LoRA, 512 tokens"),
        pytest.param(LLAMA_8B, recipe(1, 512, loss=Loss.TRL_TILED), 6, id="8B QLoRA, 512 tokens, no upcast, tiled loss"),
        pytest.param(LLAMA_70B, lora(1, 2048), 150, id="70B LoRA, 2048 tokens"),
        pytest.param(LLAMA_70B, recipe(1, 2048), 48, id="70B QLoRA, 2048 tokens, no upcast"),
    ],
)
def test_a_figure_of_the_guides_table_holds_under_this_recipe(name: str, asked: Recipe, gigabytes: int) -> None:
    assert allocated(name, asked) / GB == pytest.approx(gigabytes, rel=0.10)


def test_no_plain_recipe_trains_all_of_seventy_billion_parameters_in_five_hundred_gigabytes() -> None:
    found = {name: allocated(LLAMA_70B, full(name)) / GB for name in ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "adafactor")}
    assert not [name for name, size in found.items() if size == pytest.approx(500, rel=0.10)]
    assert found["adamw_torch_fused"] > 550
    assert found["adamw_8bit"] < 450


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1"])
def test_seven_billion_parameters_fit_eight_gigabytes_at_two_thousand_tokens(name: str) -> None:
    device = answered(name, recipe(1, 2048)).device_bytes
    assert device is not None
    assert device <= 8 * GB


@pytest.mark.parametrize(("batch", "length", "card_gb"), [(1, 2048, 12), (4, 1024, 24)])
def test_thirteen_billion_parameters_fit_twelve_to_twenty_four_gigabytes(batch: int, length: int, card_gb: int) -> None:
    device = answered("meta-llama/Llama-2-13b-hf", recipe(batch, length)).device_bytes
    assert device is not None
    assert device <= card_gb * GB


def test_the_upcast_turns_embedding_head_and_norms_into_thirty_two_bits() -> None:
    asked = recipe(1, 512)
    upcast = replace(asked, prepare_for_kbit_training=True)
    inventory = model(LLAMA_8B)
    difference = static_memory(inventory, upcast).weights_bytes - static_memory(inventory, asked).weights_bytes
    assert difference == 2 * (2 * 128_256 * 4096 + 65 * 4096)  # Llama-3.1-8B: two 128,256 × 4,096 matrices, 65 norms
