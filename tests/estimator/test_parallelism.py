"""Several cards: what the answer says of each strategy."""

from dataclasses import replace

import pytest

from estimator.dtypes import DType
from estimator.engine import estimate
from estimator.errors import RequestError
from estimator.estimate import Estimate, PhaseEstimate
from estimator.optimizers import weight_decay_groups
from estimator.parallelism.cards import cards
from estimator.parallelism.fsdp import units_of
from estimator.parallelism.options import Ddp, Fsdp, Parallel, Strategy, Zero
from estimator.parallelism.zero import flat_sizes
from estimator.phases import Item, Phase
from estimator.recipe import Quantization, QuantizationKind, Recipe
from estimator.static_memory import static_memory
from estimator.units import GIB
from tests.estimator.recipes import ALL_LINEAR, NF4, inference, model, training

LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"


def _answer(recipe: Recipe, strategy: Strategy, num_gpus: int = 2, name: str = LLAMA_8B, **options: object) -> Estimate:
    return estimate(model(name), replace(recipe, parallel=Parallel(strategy=strategy, num_gpus=num_gpus, **options)))  # type: ignore[arg-type]


def _phase(answer: Estimate, phase: Phase) -> PhaseEstimate:
    return next(p for p in answer.phases if p.phase is phase)


def _bytes(answer: Estimate, phase: Phase, item: Item) -> int:
    return sum(i.num_bytes for i in _phase(answer, phase).items if i.item is item)


@pytest.mark.parametrize("strategy", [strategy for strategy in Strategy if not strategy.runs_alone])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_one_card_of_any_strategy_is_one_card(strategy: Strategy, method: str) -> None:
    recipe = training(method=method)
    assert _answer(recipe, strategy, 1) == estimate(model(LLAMA_8B), recipe)


def test_libraries_that_share_out_run_on_one_card_too() -> None:
    """Masters and states are all there, or on the host; FSDP raises trained weights to float32 and casts them back unit by unit."""
    recipe = training(method="full")
    scalars = static_memory(model(LLAMA_8B), recipe).parameters.trainable
    offloaded = _answer(recipe, Strategy.ZERO3, 1, zero=Zero(offload_optimizer=True))
    assert offloaded.host_bytes > 12 * scalars
    assert _bytes(offloaded, Phase.OPTIMIZER_STEP, Item.OPTIMIZER_STATES) == 0
    fsdp = _answer(recipe, Strategy.FSDP, 1)
    assert _bytes(fsdp, Phase.OPTIMIZER_STEP, Item.WEIGHTS) == pytest.approx(4 * scalars, rel=1e-6)
    assert _bytes(fsdp, Phase.FORWARD, Item.COMMUNICATION) < 2 * scalars
    with pytest.raises(RequestError, match="on one GPU torch makes NO_SHARD of FSDP1"):
        _answer(recipe, Strategy.FSDP, 1, fsdp=Fsdp(version=1))


def test_ddp_holds_gradients_twice_unless_they_are_views_of_the_buckets() -> None:
    recipe = training(method="full")
    alone, ddp = estimate(model(LLAMA_8B), recipe), _answer(recipe, Strategy.DDP)
    views = _answer(recipe, Strategy.DDP, ddp=Ddp(gradient_as_bucket_view=True))
    step = Phase.OPTIMIZER_STEP
    gradients, buckets = _bytes(alone, step, Item.GRADIENTS), _bytes(ddp, step, Item.COMMUNICATION)
    # The same scalars; tensors are rounded up one by one, buckets as a whole.
    assert 0 <= gradients - buckets < 512 * static_memory(model(LLAMA_8B), recipe).parameters.trainable // 4096
    assert _phase(ddp, step).allocated_bytes == _phase(alone, step).allocated_bytes + buckets
    assert _phase(views, step).allocated_bytes == _phase(ddp, step).allocated_bytes - gradients
    assert ddp.device_bytes is not None
    assert ddp.ranks == ()


def test_buckets_hold_trained_parameters_alone() -> None:
    recipe = training(method="qlora")
    options = Ddp(find_unused_parameters=False)
    adapter = static_memory(model(LLAMA_8B), recipe).gradients_bytes
    assert 0 < _bytes(_answer(recipe, Strategy.DDP, ddp=options), Phase.BACKWARD, Item.COMMUNICATION) <= adapter


@pytest.mark.parametrize("num_gpus", [8, 16, 64])
def test_zero_divides_states_then_gradients_then_parameters(num_gpus: int) -> None:
    """Rajbhandari et al. 2020 (ZeRO), figure 1: 2 + 2 + 12/N, 2 + 14/N and 16/N bytes per parameter.

    From eight ranks on the update is largest with all gradients at its beginning; below, with copies of its own part after others went.
    """
    recipe = training(method="full")
    scalars = static_memory(model(LLAMA_8B), recipe).parameters.trainable
    expected = {Strategy.ZERO1: 4 + 12 / num_gpus, Strategy.ZERO2: 2 + 14 / num_gpus, Strategy.ZERO3: 16 / num_gpus}
    items = (Item.WEIGHTS, Item.OPTIMIZER_STATES, Item.GRADIENTS)
    for strategy, per_scalar in expected.items():
        answer = _answer(recipe, strategy, num_gpus)
        held = sum(_bytes(answer, Phase.OPTIMIZER_STEP, item) for item in items)
        # Norms stay whole under ZeRO-3 (below its threshold), and groups are filled up: parts in a thousand.
        assert held / scalars == pytest.approx(per_scalar, rel=1e-3)


@pytest.mark.parametrize("strategy", [Strategy.ZERO2, Strategy.ZERO3, Strategy.FSDP])
def test_a_decayed_copy_of_the_gradients_is_one_of_a_rank_s_own_part(strategy: Strategy) -> None:
    """torch, optim/sgd.py, _multi_tensor_sgd, on what each rank updates: float32 parts, under ZeRO as under FSDP2."""
    recipe = training(method="full")
    assert recipe.training is not None
    sgd = replace(recipe.training, optimizer="sgd")

    def update(weight_decay: float) -> int:
        decayed = replace(recipe, training=replace(sgd, weight_decay=weight_decay))
        return _bytes(_answer(decayed, strategy, 4), Phase.OPTIMIZER_STEP, Item.TEMPORARY)

    static = static_memory(model(LLAMA_8B), recipe)
    scalars = sum(t.num_elements * t.num_copies for t in weight_decay_groups(t for t in static.tensors if t.trainable)[0])
    part = scalars // 4 * 4
    # Under ZeRO-2 it comes after the half-precision copy of the gradients has gone.
    goes = scalars // 4 * 2 if strategy is Strategy.ZERO2 else 0
    assert update(0.1) - update(0.0) == pytest.approx(part - goes, rel=1e-4)


def test_offloaded_states_lie_in_pinned_memory_and_not_on_the_card() -> None:
    recipe = training(method="full")
    offloaded = _answer(recipe, Strategy.ZERO2, zero=Zero(offload_optimizer=True))
    parts = sum(flat_sizes(static_memory(model(LLAMA_8B), recipe).tensors, 2)) // 2
    assert _bytes(offloaded, Phase.OPTIMIZER_STEP, Item.OPTIMIZER_STATES) == 0
    # master, two states, float32 gradients, and the half-precision copy that goes back
    assert offloaded.host_bytes == pytest.approx(parts * (4 + 8 + 4 + 2), abs=2**20)


def test_4bit_weights_are_sharded_only_in_a_floating_point_storage() -> None:
    recipe = training(method="qlora")
    whole = static_memory(model(LLAMA_8B), recipe).weights_bytes
    as_bytes = _answer(recipe, Strategy.FSDP, 4)
    storage = replace(recipe, quantization=replace(NF4, storage_dtype=DType.BFLOAT16))
    as_floats = _answer(storage, Strategy.FSDP, 4)
    assert [n.code for n in as_bytes.notices] == ["fsdp_keeps_4bit_weights_whole"]
    assert as_floats.notices == ()
    assert _bytes(as_bytes, Phase.FORWARD, Item.WEIGHTS) > whole // 2
    assert _bytes(as_floats, Phase.FORWARD, Item.WEIGHTS) == pytest.approx(whole / 4, rel=1e-3)


def test_fsdp_accumulates_whole_gradients() -> None:
    recipe = training(method="full", accumulation=4)
    answer = _answer(recipe, Strategy.FSDP, 8)
    scalars = static_memory(model(LLAMA_8B), recipe).parameters.trainable
    assert "fsdp_accumulates_whole_gradients" in [n.code for n in answer.notices]
    assert _bytes(answer, Phase.FORWARD, Item.GRADIENTS) == pytest.approx(2 * scalars, rel=1e-4)
    assert _bytes(answer, Phase.OPTIMIZER_STEP, Item.GRADIENTS) == pytest.approx(4 * scalars / 8, rel=1e-4)


def test_unresharded_layers_stay_gathered_until_the_way_back() -> None:
    recipe = training(method="lora")
    kept = _answer(recipe, Strategy.FSDP, fsdp=Fsdp(reshard_after_forward=False))
    units = units_of(replace(recipe, parallel=Parallel(strategy=Strategy.FSDP, num_gpus=2)), static_memory(model(LLAMA_8B), recipe).tensors)
    assert _bytes(kept, Phase.LOSS, Item.COMMUNICATION) >= sum(u.gathered_bytes for u in units.all)


def test_int8_weights_are_refused_by_fsdp() -> None:
    recipe = replace(training(), quantization=Quantization(kind=QuantizationKind.INT8))
    with pytest.raises(RequestError, match=r"LLM\.int8"):
        _answer(recipe, Strategy.FSDP)


FSDP1 = Fsdp(version=1)


def test_fsdp1_keeps_embedding_and_head_gathered_all_the_way() -> None:
    recipe = training(method="lora")
    answer = _answer(recipe, Strategy.FSDP, 8, fsdp=FSDP1)
    ends = sum(r.num_elements for r in model(LLAMA_8B).parameters if not r.indices)
    for phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD):
        assert _bytes(answer, phase, Item.COMMUNICATION) >= 2 * ends
    assert _bytes(answer, Phase.LOSS, Item.COMMUNICATION) == pytest.approx(2 * ends, rel=1e-3)


def test_fsdp1_ends_the_backward_pass_with_the_gradients_of_the_root() -> None:
    """Of a small batch nothing is larger: the root, its gradients, and those put together, in bfloat16."""
    recipe = training(1, 8, method="full", optimizer="sgd")
    answer = _answer(recipe, Strategy.FSDP, 8, fsdp=FSDP1)
    static = static_memory(model(LLAMA_8B), recipe)
    ends = sum(r.num_elements for r in model(LLAMA_8B).parameters if not r.indices)
    assert _bytes(answer, Phase.BACKWARD, Item.COMMUNICATION) == pytest.approx(3 * 2 * ends, rel=1e-3)
    assert _bytes(answer, Phase.BACKWARD, Item.GRADIENTS) == pytest.approx(4 * static.parameters.trainable / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (training(method="qlora"), FSDP1, "bnb_4bit_quant_storage: FSDP1 .* refuses integers"),
        (replace(training(), quantization=Quantization(kind=QuantizationKind.INT8)), FSDP1, r"LLM\.int8"),
        (
            replace(training(method="qlora"), quantization=replace(NF4, storage_dtype=DType.FLOAT16)),
            FSDP1,
            r"refuses several types: .* \(bfloat16\) and .* \(float16\)",
        ),
        (
            replace(training(method="lora"), adapter=replace(ALL_LINEAR, bias="all")),
            Fsdp(version=1, use_orig_params=False),
            "use_orig_params: false needs the parameters of a layer to be all trained or all frozen",
        ),
    ],
)
def test_what_torch_does_not_put_into_one_parameter_is_refused(recipe: Recipe, options: Fsdp, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _answer(recipe, Strategy.FSDP, fsdp=options, name="Qwen/Qwen2.5-7B")


def test_4bit_weights_in_a_floating_point_storage_are_flattened_with_the_norms() -> None:
    recipe = replace(training(method="qlora"), quantization=replace(NF4, storage_dtype=DType.BFLOAT16))
    whole = static_memory(model(LLAMA_8B), recipe).weights_bytes
    assert _bytes(_answer(recipe, Strategy.FSDP, 4, fsdp=FSDP1), Phase.FORWARD, Item.WEIGHTS) == pytest.approx(whole / 4, rel=1e-3)


def test_a_layer_of_which_only_biases_are_trained_has_gradients_of_all_of_it() -> None:
    recipe = replace(training(method="lora"), adapter=replace(ALL_LINEAR, bias="all"))
    answer = _answer(recipe, Strategy.FSDP, 8, fsdp=FSDP1, name="Qwen/Qwen2.5-7B")
    assert "fsdp1_trains_frozen_parameters_too" in [n.code for n in answer.notices]
    layers = sum(r.num_elements * r.num_copies for r in model("Qwen/Qwen2.5-7B").parameters if r.indices)
    assert _bytes(answer, Phase.OPTIMIZER_STEP, Item.GRADIENTS) > 4 * layers / 8


@pytest.mark.parametrize("method", ["full", "qlora", "inference"])
@pytest.mark.parametrize("num_gpus", [2, 3])
def test_cards_of_a_device_map_together_hold_the_model_once(method: str, num_gpus: int) -> None:
    recipe = inference() if method == "inference" else training(method=method)
    static = static_memory(model(LLAMA_8B), recipe)
    answer = _answer(recipe, Strategy.DEVICE_MAP, num_gpus)
    assert [r.rank for r in answer.ranks] == list(range(num_gpus))
    assert max(r.device_bytes or 0 for r in answer.ranks) == answer.device_bytes
    assert answer.parameters == static.parameters
    assert answer.ranks[-1].holds.endswith("lm_head")
    parts = cards(model(LLAMA_8B), replace(recipe, parallel=Parallel(strategy=Strategy.DEVICE_MAP, num_gpus=num_gpus)))
    if not any(card.borrows_layer for card in parts):
        assert sum(static_memory(card.inventory, recipe).loaded_bytes for card in parts) == static.loaded_bytes


def test_a_card_without_layers_is_named_and_counted_with_one() -> None:
    """Three cards of equal shares, of which bitsandbytes' tenth is taken: all layers of an 8 B model fit the first two."""
    answer = _answer(training(method="qlora"), Strategy.DEVICE_MAP, 3)
    assert answer.ranks[2].holds.startswith("no layers")
    assert "card_without_layers" in [n.code for n in answer.notices]


def test_70b_in_4_bits_fits_two_cards_of_24_gb_for_inference_and_not_for_training_at_2048() -> None:
    """The guides' question. bitsandbytes leaves a tenth of each card's share free, so that the second card gets more layers."""
    card = 24_118 * 2**20  # RTX 3090: estimator/data/gpus.json
    generating = _answer(replace(inference(1, 512, 256), quantization=NF4), Strategy.DEVICE_MAP, name=LLAMA_70B)
    tuning = _answer(training(1, 2048), Strategy.DEVICE_MAP, name=LLAMA_70B)
    first, second = tuning.ranks
    assert generating.device_bytes is not None
    assert tuning.device_bytes is not None
    assert generating.device_bytes < card < tuning.device_bytes
    assert first.allocated_bytes < second.allocated_bytes
    assert second.allocated_bytes - first.allocated_bytes > 2 * GIB
