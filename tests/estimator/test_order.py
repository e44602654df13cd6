"""What must hold whatever the numbers: more work never takes less memory."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from estimator.blocks.families import FAMILIES
from estimator.engine import estimate, why_not_modelled
from estimator.inventory import Inventory, TensorRow
from estimator.recipe import Adapter, Loss, Recipe
from estimator.sources import catalogue
from tests.estimator.recipes import inference, model, training

MODELS = (
    "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "google/gemma-2-2b",
    "microsoft/Phi-3-mini-4k-instruct",
    "EleutherAI/pythia-1b",
    "openai-community/gpt2",
    "mistralai/Mixtral-8x7B-v0.1",
)
METHODS = st.sampled_from(("full", "lora", "qlora"))
LOSSES = st.sampled_from((Loss.STOCK, Loss.TRL_TILED, Loss.TRL_CHUNKED, Loss.LIGER))
# One bundled model of every family that has closed forms.
OF_EACH_FAMILY = tuple(
    {
        inventory.model_type: entry.id
        for entry in catalogue.entries()
        if (inventory := model(entry.id)).model_type in FAMILIES and why_not_modelled(inventory, training()) is None
    }.values()
)
EIGHT_BIT = ("adamw_bnb_8bit", "paged_adamw_8bit", "lion_8bit")
PAGED = ("paged_adamw_32bit", "paged_adamw_8bit")
BITSANDBYTES_OPTIMIZERS = tuple(dict.fromkeys((*EIGHT_BIT, *PAGED)))
TORCH_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "rmsprop")
WIDE = settings(max_examples=60, deadline=None)


def peak(inventory: Inventory, recipe: Recipe) -> int:
    return estimate(inventory, recipe).peak.allocated_bytes


def resized(inventory: Inventory, *, layers: int | None = None, vocabulary: int | None = None) -> Inventory:
    """The same architecture with another number of layers or tokens: every row that holds it changes with it.

    Layers are taken from the end, and none can be added: some models begin with dense layers, or alternate.
    """
    old_vocabulary = inventory.config["vocab_size"]
    layers = layers or inventory.num_layers

    def row(one: TensorRow) -> TensorRow:
        shape = tuple(vocabulary if vocabulary and size == old_vocabulary else size for size in one.shape)
        in_layers = one.pattern.startswith(f"{inventory.layers_prefix}.{{}}.")
        if not in_layers:
            return replace(one, shape=shape)
        return replace(one, shape=shape, indices=(tuple(n for n in one.indices[0] if n < layers), *one.indices[1:]))

    return replace(
        inventory,
        content_hash=f"{inventory.content_hash} {layers} {vocabulary}",
        rows=tuple(changed for changed in map(row, inventory.rows) if not changed.indices or changed.indices[0]),
        num_layers=layers,
        config={**inventory.config, "vocab_size": vocabulary or old_vocabulary},
    )


@WIDE
@given(
    st.sampled_from(OF_EACH_FAMILY),
    METHODS,
    st.booleans(),
    LOSSES,
    st.integers(1, 16),
    st.integers(1, 4096),
    st.integers(1, 4),
    st.integers(0, 512),
)
def test_the_peak_never_falls_with_batch_or_length(
    name: str, method: str, checkpointing: bool, loss: Loss, batch: int, length: int, more: int, longer: int
) -> None:
    smaller = training(batch, length, method=method, checkpointing=checkpointing, loss=loss)
    larger = training(batch + more, length + longer, method=method, checkpointing=checkpointing, loss=loss)
    assert peak(model(name), smaller) <= peak(model(name), larger)


@WIDE
@given(st.sampled_from(OF_EACH_FAMILY), METHODS, st.booleans(), st.integers(1, 8), st.integers(1, 2048))
def test_the_peak_never_falls_with_layers(name: str, method: str, checkpointing: bool, fewer: int, length: int) -> None:
    asked = training(1, length, method=method, checkpointing=checkpointing)
    given_layers = model(name).num_layers
    smaller = resized(model(name), layers=given_layers - fewer)
    assert peak(smaller, asked) <= peak(resized(model(name), layers=given_layers - fewer + 1), asked)


@WIDE
@given(
    st.sampled_from(OF_EACH_FAMILY), METHODS, st.booleans(), LOSSES, st.integers(1, 200_000), st.integers(1, 50_000), st.integers(1, 2048)
)
def test_the_peak_never_falls_with_the_vocabulary(
    name: str, method: str, checkpointing: bool, loss: Loss, vocabulary: int, more: int, length: int
) -> None:
    asked = training(1, length, method=method, checkpointing=checkpointing, loss=loss)
    vocabulary += 200_000  # no other size of these models is as large, so that rows of the vocabulary are told by it
    smaller = resized(model(name), vocabulary=vocabulary)
    assert peak(smaller, asked) <= peak(resized(model(name), vocabulary=vocabulary + more), asked)


@WIDE
@given(st.sampled_from(MODELS[:-1]), st.sampled_from(TORCH_OPTIMIZERS), st.booleans(), st.integers(1, 256), st.integers(1, 64))
def test_the_peak_never_falls_with_rank_under_torch_optimizers(name: str, optimizer: str, quantized: bool, rank: int, more: int) -> None:
    method = "qlora" if quantized else "lora"
    smaller, larger = (
        training(1, 256, method=method, optimizer=optimizer, adapter=Adapter(r=r, target_modules="all-linear")) for r in (rank, rank + more)
    )
    assert peak(model(name), smaller) <= peak(model(name), larger)


def crosses(name: str, optimizer: str, rank: int, larger: int) -> bool:
    """Whether a matrix of the adapter comes to 4,096 elements (its states turn 8-bit) or to 100,000 (they are paged)."""
    limits = [4096] * (optimizer in EIGHT_BIT) + [100_000] * (optimizer in PAGED)
    widths = {size for row in model(name).rows for size in row.shape}
    return any(rank * width < limit <= larger * width for width in widths for limit in limits)


@WIDE
@given(st.sampled_from(OF_EACH_FAMILY), st.sampled_from(BITSANDBYTES_OPTIMIZERS), st.booleans(), st.integers(1, 256), st.integers(1, 64))
def test_the_peak_never_falls_with_rank_under_bitsandbytes_but_where_states_turn_8bit_or_paged(
    name: str, optimizer: str, quantized: bool, rank: int, more: int
) -> None:
    assume(not crosses(name, optimizer, rank, rank + more))
    method = "qlora" if quantized else "lora"
    smaller, larger = (
        training(1, 256, method=method, optimizer=optimizer, adapter=Adapter(r=r, target_modules="all-linear")) for r in (rank, rank + more)
    )
    assert peak(model(name), smaller) <= peak(model(name), larger)


@pytest.mark.parametrize(("optimizer", "rank"), [("adamw_bnb_8bit", 5), ("paged_adamw_32bit", 130)])
def test_the_states_fall_with_rank_where_they_turn_8bit_or_paged(optimizer: str, rank: int) -> None:
    """Of GPT-2's width of 768: 5 × 768 < 4,096 ≤ 6 × 768, and 130 × 768 < 100,000 ≤ 131 × 768."""
    fewer, more = (
        estimate(
            model("openai-community/gpt2"),
            training(1, 1, method="lora", optimizer=optimizer, adapter=Adapter(r=r, target_modules=("c_attn",))),
        )
        for r in (rank, rank + 1)
    )
    assert more.steady_state_bytes < fewer.steady_state_bytes


@WIDE
@given(
    st.sampled_from(OF_EACH_FAMILY), st.integers(1, 8), st.integers(1, 4096), st.integers(1, 512), st.integers(0, 3), st.integers(0, 512)
)
def test_generation_never_takes_less_with_more(name: str, batch: int, prompt: int, new: int, more: int, longer: int) -> None:
    assert peak(model(name), inference(batch, prompt, new)) <= peak(model(name), inference(batch + more, prompt + longer, new + longer))


@WIDE
@given(st.sampled_from(MODELS), METHODS, st.booleans(), st.integers(1, 8), st.integers(1, 4096))
def test_a_phase_is_the_sum_of_its_items_and_the_peak_the_largest_phase(
    name: str, method: str, checkpointing: bool, batch: int, length: int
) -> None:
    answered = estimate(model(name), training(batch, length, method=method, checkpointing=checkpointing))
    for phase in answered.phases:
        assert phase.allocated_bytes == sum(item.num_bytes for item in phase.items)
        assert all(item.num_bytes > 0 and item.num_bytes % 512 == 0 for item in phase.items)
    assert answered.peak.allocated_bytes == max(phase.allocated_bytes for phase in answered.phases)
