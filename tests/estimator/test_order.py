"""What must hold whatever the numbers: more work never takes less memory."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.engine import estimate
from estimator.inventory import Inventory, TensorRow
from estimator.recipe import Adapter, Loss, Recipe
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
TORCH_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor", "rmsprop")
WIDE = settings(max_examples=120, deadline=None)


def peak(inventory: Inventory, recipe: Recipe) -> int:
    return estimate(inventory, recipe).peak.allocated_bytes


def resized(inventory: Inventory, *, layers: int | None = None, vocabulary: int | None = None) -> Inventory:
    """The same architecture with another number of layers or tokens: every row that holds it changes with it."""
    old_vocabulary = inventory.config["vocab_size"]
    layers = layers or inventory.num_layers

    def row(one: TensorRow) -> TensorRow:
        shape = tuple(vocabulary if vocabulary and size == old_vocabulary else size for size in one.shape)
        in_layers = one.pattern.startswith(f"{inventory.layers_prefix}.{{}}.")
        indices = (tuple(range(layers)), *one.indices[1:]) if in_layers else one.indices
        return replace(one, shape=shape, indices=indices)

    return replace(
        inventory,
        content_hash=f"{inventory.content_hash} {layers} {vocabulary}",
        rows=tuple(map(row, inventory.rows)),
        num_layers=layers,
        config={**inventory.config, "vocab_size": vocabulary or old_vocabulary},
    )


@WIDE
@given(
    st.sampled_from(MODELS),
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
@given(METHODS, st.booleans(), st.integers(2, 24), st.integers(1, 8), st.integers(1, 2048))
def test_the_peak_never_falls_with_layers(method: str, checkpointing: bool, layers: int, more: int, length: int) -> None:
    asked = training(1, length, method=method, checkpointing=checkpointing)
    llama = model("meta-llama/Llama-3.2-1B")
    assert peak(resized(llama, layers=layers), asked) <= peak(resized(llama, layers=layers + more), asked)


@WIDE
@given(METHODS, st.booleans(), LOSSES, st.integers(1_000, 200_000), st.integers(1, 50_000), st.integers(1, 2048))
def test_the_peak_never_falls_with_the_vocabulary(
    method: str, checkpointing: bool, loss: Loss, vocabulary: int, more: int, length: int
) -> None:
    asked = training(1, length, method=method, checkpointing=checkpointing, loss=loss)
    llama = model("meta-llama/Llama-3.2-1B")
    assert peak(resized(llama, vocabulary=vocabulary), asked) <= peak(resized(llama, vocabulary=vocabulary + more), asked)


@WIDE
@given(st.sampled_from(MODELS[:-1]), st.sampled_from(TORCH_OPTIMIZERS), st.booleans(), st.integers(1, 256), st.integers(1, 64))
def test_the_peak_never_falls_with_rank_under_torch_optimizers(name: str, optimizer: str, quantized: bool, rank: int, more: int) -> None:
    method = "qlora" if quantized else "lora"
    smaller, larger = (
        training(1, 256, method=method, optimizer=optimizer, adapter=Adapter(r=r, target_modules="all-linear")) for r in (rank, rank + more)
    )
    assert peak(model(name), smaller) <= peak(model(name), larger)


@WIDE
@given(st.sampled_from(MODELS), st.integers(1, 8), st.integers(1, 4096), st.integers(1, 512), st.integers(0, 3), st.integers(0, 512))
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
