"""What must hold whatever the numbers: more work never takes less memory."""

from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from estimator.engine import estimate
from estimator.inventory import Inventory, TensorRow
from estimator.phases import Item
from estimator.recipe import Adapter, Loss, Recipe
from estimator.static_memory import static_memory
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
BITSANDBYTES_OPTIMIZERS = ("adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
WIDE = settings(max_examples=120, deadline=None)


def peak(inventory: Inventory, recipe: Recipe) -> int:
    return estimate(inventory, recipe).peak.allocated_bytes


def resized(inventory: Inventory, *, layers: int | None = None, vocabulary: int | None = None) -> Inventory:
    """The same architecture with another number of layers or tokens: every row that holds it changes with it."""
    old_vocabulary, old_layers = inventory.config["vocab_size"], inventory.num_layers
    layers = layers or old_layers

    def by_layer(value: object) -> object:
        """What the config lists layer by layer goes on as it began."""
        is_list = isinstance(value, list) and len(value) == old_layers
        return [value[number % old_layers] for number in range(layers)] if is_list else value

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
        config={key: by_layer(value) for key, value in inventory.config.items()} | {"vocab_size": vocabulary or old_vocabulary},
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
@given(st.sampled_from(MODELS), METHODS, st.booleans(), st.integers(2, 24), st.integers(1, 8), st.integers(1, 2048))
def test_the_peak_never_falls_with_layers(name: str, method: str, checkpointing: bool, layers: int, more: int, length: int) -> None:
    asked = training(1, length, method=method, checkpointing=checkpointing)
    assert peak(resized(model(name), layers=layers), asked) <= peak(resized(model(name), layers=layers + more), asked)


@WIDE
@given(st.sampled_from(MODELS), METHODS, st.booleans(), LOSSES, st.integers(20_000, 200_000), st.integers(1, 50_000), st.integers(1, 2048))
def test_the_peak_never_falls_with_the_vocabulary(
    name: str, method: str, checkpointing: bool, loss: Loss, vocabulary: int, more: int, length: int
) -> None:
    """From 20,000 tokens on: no other size of these models is taken for the vocabulary."""
    asked = training(1, length, method=method, checkpointing=checkpointing, loss=loss)
    smaller, larger = (resized(model(name), vocabulary=size) for size in (vocabulary, vocabulary + more))
    assert peak(smaller, asked) <= peak(larger, asked)


@WIDE
@given(st.sampled_from(MODELS[:-1]), st.sampled_from(TORCH_OPTIMIZERS), st.booleans(), st.integers(1, 256), st.integers(1, 64))
def test_the_peak_never_falls_with_rank_under_torch_optimizers(name: str, optimizer: str, quantized: bool, rank: int, more: int) -> None:
    method = "qlora" if quantized else "lora"
    smaller, larger = (
        training(1, 256, method=method, optimizer=optimizer, adapter=Adapter(r=r, target_modules="all-linear")) for r in (rank, rank + more)
    )
    assert peak(model(name), smaller) <= peak(model(name), larger)


def adapted(optimizer: str, rank: int, method: str = "qlora") -> Recipe:
    return training(1, 256, method=method, optimizer=optimizer, adapter=Adapter(r=rank, target_modules="all-linear"))


def adapter_sizes(name: str, recipe: Recipe) -> list[int]:
    """Elements of every adapter matrix."""
    tensors = static_memory(model(name), recipe).tensors
    return [tensor.num_elements for tensor in tensors if tensor.item is Item.ADAPTER_WEIGHTS]


# Below this many elements bitsandbytes keeps states in 32 bits; from 100,000 on paged optimizers have them outside the allocator.
# Source: bitsandbytes, optim/optimizer.py, Optimizer8bit.init_state (min_8bit_size) and get_state_buffer.
EIGHT_BITS, PAGED = 4_096, 100_000


@WIDE
@given(
    st.sampled_from(MODELS[:-1]),
    st.sampled_from(("adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit")),
    st.integers(1, 256),
    st.integers(1, 64),
)
def test_the_peak_never_falls_with_rank_under_bitsandbytes_but_at_its_borders(name: str, optimizer: str, rank: int, more: int) -> None:
    smaller, larger = adapted(optimizer, rank), adapted(optimizer, rank + more)
    borders = ((EIGHT_BITS,) if "8bit" in optimizer else ()) + ((PAGED,) if "paged" in optimizer else ())
    pairs = zip(adapter_sizes(name, smaller), adapter_sizes(name, larger), strict=True)
    assume(not any(before < border <= after for before, after in pairs for border in borders))
    assert peak(model(name), smaller) <= peak(model(name), larger)


def test_states_shrink_where_they_become_8_bits_wide() -> None:
    """Rank 2 of 2,048 inputs are 4,096 elements: two bytes each, and scales, where rank 1 took eight."""
    narrow = [replace(adapted("adamw_bnb_8bit", rank), adapter=Adapter(r=rank, target_modules=("q_proj",))) for rank in (1, 2)]
    assert {size for recipe in narrow for size in adapter_sizes(MODELS[0], recipe)} == {EIGHT_BITS // 2, EIGHT_BITS}
    before, after = (static_memory(model(MODELS[0]), recipe).optimizer_states_bytes for recipe in narrow)
    assert after < before


def test_states_leave_the_card_where_they_become_paged() -> None:
    """Rank 49 of 2,048 inputs are 100,352 elements, rank 48 are 98,304."""
    assert steady("paged_adamw_32bit", 49) < steady("paged_adamw_32bit", 48)
    assert steady("adamw_bnb_8bit", 49) > steady("adamw_bnb_8bit", 48)


def steady(optimizer: str, rank: int) -> int:
    """Allocated between steps [bytes]."""
    found = estimate(model(MODELS[0]), adapted(optimizer, rank)).steady_state_bytes
    assert found is not None
    return found


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
