"""What a run makes the allocator hold; the published device memory judges it in `tests/calibration/test_accuracy.py`."""

from collections import deque
from dataclasses import asdict, replace

import pytest

from estimator.allocator import SMALL_SEGMENT_BYTES
from estimator.allocator_settings import parse_settings
from estimator.caching_allocator import CachingAllocator
from estimator.device import context_bytes
from estimator.engine import Device, estimate, largest
from estimator.estimate import Estimate
from estimator.introspect.trace.tasks import Session
from estimator.loading import load
from estimator.optimizers import play, step_lists, step_temporary_bytes
from estimator.patterns import copies
from estimator.phases import Basis, Item
from estimator.recipe import Loss, QuantizationKind, Recipe
from estimator.reservation import _MAX_PAUSED, _paused, _unlimited, reservation
from estimator.schedule import MicroBatch, Schedule, decode_schedule, encode_schedule
from estimator.sources.resolve import resolve
from estimator.static_memory import Preparation, loaded_tensors, static_memory
from estimator.step import regime_of, run_step, schedule_step
from estimator.units import GIB, MIB, allocated
from tests.estimator.recipes import NF4, inference, model, training

LLAMA = "meta-llama/Llama-3.2-1B"
METHODS = ("full", "lora", "qlora")


def answered(recipe: Recipe, name: str = LLAMA, **device: object) -> Estimate:
    return estimate(model(name), recipe, device=Device(**device))  # type: ignore[arg-type]


def schedule_of(recipe: Recipe, name: str = LLAMA) -> Schedule:
    inventory = model(name)
    return schedule_step(inventory, recipe, static_memory(inventory, recipe).tensors, regime_of(recipe, inventory))


def most_alive(part: MicroBatch, batch: int, length: int) -> int:
    """The largest sum of rounded sizes [bytes]."""
    sizes = [allocated(part.sizes[kind].at(batch, length)) for kind in part.kinds]
    alive = worst = 0
    for event in part.events:
        alive += sizes[event] if event >= 0 else -sizes[~event]
        worst = max(worst, alive)
    return worst


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [LLAMA, "google/gemma-2-2b", "Qwen/Qwen3-30B-A3B"])
def test_every_layer_one_by_one_reaches_the_peak_that_copies_of_one_layer_give(name: str, method: str, accumulation: int) -> None:
    inventory, recipe = model(name), training(2, 640, method=method, accumulation=accumulation)
    peaks = run_step(inventory, recipe, static_memory(inventory, recipe).tensors, regime_of(recipe, inventory)).peaks
    told = max(sum(largest(peaks[phase], 2, 640).items().values()) for phase in peaks)
    assert most_alive(schedule_of(recipe, name).later, 2, 640) == told


def test_gradients_stay_until_the_optimizer_has_stepped() -> None:
    recipe = training(1, 64, method="lora", accumulation=2)
    step, static = schedule_of(recipe), static_memory(model(LLAMA), recipe)
    first = step.first
    assert sum(allocated(first.sizes[first.kinds[index]].at(1, 64)) for index in first.kept) == static.gradients_bytes
    assert not step.later.kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss", [Loss.STOCK, Loss.LIGER])
def test_training_is_replayed_and_holds_what_is_allocated(method: str, loss: Loss) -> None:
    found = answered(training(2, 1024, method=method, loss=loss))
    holding = found.holding.get()
    assert holding.basis is Basis.REPLAYED
    assert found.peak.allocated_bytes <= holding.reserved_bytes < holding.device_bytes == holding.without_pressure_bytes
    assert found.least_device_bytes <= holding.device_bytes
    assert holding.reserved_bytes % (2 * MIB) == 0


def test_generation_and_loading_are_modelled() -> None:
    for recipe in (inference(), replace(inference(), inference=None)):
        assert answered(recipe).holding.get().basis is Basis.MODELLED


def test_segments_that_grow_leave_little_idle() -> None:
    recipe = training(2, 1024, method="full", optimizer="adamw_torch")
    plain, growing = answered(recipe), answered(recipe, settings=parse_settings("expandable_segments:True"))
    assert growing.peak.allocated_bytes <= growing.reserved_bytes < plain.reserved_bytes


def test_short_of_memory_the_allocator_gives_its_cache_back() -> None:
    recipe = training(4, 1024, method="full", optimizer="adamw_torch")
    free = answered(recipe).holding.get()
    pressed = answered(recipe, usable_bytes=free.device_bytes - 256 * MIB).holding.get()
    assert pressed.device_bytes <= free.device_bytes - 256 * MIB
    assert pressed.without_pressure_bytes == free.device_bytes


def test_once_the_cache_was_given_back_steps_may_do_without() -> None:
    """The whole run on the allocator, block by block, gives it back in the second step, which finds the optimizer's states."""
    recipe = training(4, 1024, method="full", optimizer="adamw_torch")
    schedule, inputs = schedule_of(recipe), [8 * 4 * 1024] * 3
    subject = model(LLAMA)
    free = reservation(subject, recipe, schedule, inputs)
    assert free is not None
    limit = free.max_bytes - 256 * MIB
    pressed = reservation(subject, recipe, schedule, inputs, capacity_bytes=limit)
    assert pressed is not None
    assert pressed.max_bytes <= limit
    assert pressed.num_alloc_retries == 0
    assert reservation(subject, recipe, schedule, inputs, capacity_bytes=limit // 2) is None


def test_what_does_not_fit_is_told_by_what_it_would_hold() -> None:
    recipe = training(4, 1024, method="full")
    assert answered(recipe, usable_bytes=2 * GIB).holding.get() == answered(recipe).holding.get()


@pytest.mark.parametrize("options", ["", "expandable_segments:True"])
def test_where_paged_states_alone_are_too_much_the_run_is_told_by_what_it_would_hold(options: str) -> None:
    recipe, settings = training(1, 512, method="full", optimizer="paged_adamw_32bit"), parse_settings(options)
    found = answered(recipe, usable_bytes=2 * GIB, settings=settings)
    assert found.paged_bytes > 2 * GIB
    assert found.holding.get() == answered(recipe, settings=settings).holding.get()


@pytest.mark.parametrize("enough", [0, 2 * GIB, 2**40, None])
def test_a_run_that_is_too_large_is_known_to_be_so_before_its_end(enough: int | None) -> None:
    recipe = training(2, 512, accumulation=2)
    whole = answered(recipe).holding.get().without_pressure_bytes
    asked = answered(replace(recipe, num_multiprocessors=80))  # the same run, on which nothing else was asked
    _unlimited.cache_clear()
    found = asked.without_pressure_bytes(enough)
    beside = context_bytes(108) - context_bytes(80)
    assert found <= whole - beside
    assert found == whole - beside or (enough is not None and found > enough)
    assert asked.holding.get().without_pressure_bytes == whole - beside


def test_few_runs_are_held_unfinished_and_one_that_was_let_go_is_played_again() -> None:
    asked = [answered(training(2, 256 + 64 * place, accumulation=2)) for place in range(_MAX_PAUSED + 4)]
    _unlimited.cache_clear()
    _paused.clear()
    for found in asked:
        found.without_pressure_bytes(0)
    assert len(_paused) == _MAX_PAUSED
    whole = answered(training(2, 256, accumulation=2)).holding.get().without_pressure_bytes
    assert asked[0].without_pressure_bytes(2**40) == asked[0].without_pressure_bytes() == whole
    _unlimited.cache_clear()
    assert answered(training(2, 256, accumulation=2)).holding.get().without_pressure_bytes == whole


def test_cards_of_one_kind_share_their_replays() -> None:
    recipe = training(2, 512)
    _unlimited.cache_clear()
    for capability, multiprocessors in (((8, 0), 108), ((8, 6), 82), ((8, 9), 128)):
        answered(replace(recipe, compute_capability=capability, num_multiprocessors=multiprocessors)).holding.get()
    assert _unlimited.cache_info().misses == 1
    answered(replace(recipe, compute_capability=(9, 0))).holding.get()
    assert _unlimited.cache_info().misses == 2


def test_a_million_micro_batches_are_replayed_as_few_and_hold_the_ids_of_all() -> None:
    few, many = (answered(training(2, 512, accumulation=n)) for n in (256, 2**20))
    ids = many.steady_state_bytes - few.steady_state_bytes  # type: ignore[operator]
    assert ids == (2**20 - 256) * 3 * 2 * 512 * 8
    assert 0 <= many.reserved_bytes - few.reserved_bytes - ids <= 4 * MIB
    assert answered(training(2**16, 2**24, accumulation=2**20)).reserved_bytes >= 2**50


def test_more_accumulation_than_two_micro_batches_adds_the_ids_alone() -> None:
    few, many = (answered(training(2, 512, accumulation=n)).reserved_bytes for n in (2, 64))
    assert few <= many <= few + 4 * MIB


def test_a_schedule_survives_its_encoding() -> None:
    recipe = training(2, 512, accumulation=2)
    made = schedule_of(recipe)
    again = decode_schedule(encode_schedule(made))
    for one, other in ((made.first, again.first), (made.later, again.later)):
        assert (one.events, one.kinds, one.kept, one.backward) == (other.events, other.kinds, other.kept, other.backward)
        assert [size.at(3, 7) for size in one.sizes] == [size.at(3, 7) for size in other.sizes]


@pytest.mark.parametrize("kind", [QuantizationKind.NF4, QuantizationKind.INT8])
def test_loading_ends_with_the_weights_and_their_scales(kind: QuantizationKind) -> None:
    recipe = training()
    quantization = NF4 if kind is QuantizationKind.NF4 else replace(NF4, kind=kind, double_quant=False)
    preparation = Preparation.of(replace(recipe, quantization=quantization))
    allocator = CachingAllocator()
    blocks = load(allocator, model(LLAMA), preparation)
    stored = {name: t for t in loaded_tensors(model(LLAMA), preparation) for _, name in copies(t.pattern, t.indices)}
    assert {n for n, t in stored.items() if t.item is not Item.QUANTIZATION_STATE} <= blocks.keys() <= stored.keys()
    assert all(blocks[name].requested_bytes == stored[name].raw_bytes for name in blocks)
    assert allocator.requested_bytes == sum(block.requested_bytes for block in blocks.values())


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "rmsprop", "adagrad", "sgd"])
@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize("name", [LLAMA, "openai-community/gpt2"])
def test_lists_of_an_update_peak_at_its_temporaries(name: str, method: str, optimizer: str, decays: bool) -> None:
    recipe = training(method=method)
    if recipe.adapter is not None:
        saved = ("embed_tokens" if name == LLAMA else "wte",)  # in 16 bits beside float32 adapters
        recipe = replace(recipe, adapter=replace(recipe.adapter, modules_to_save=saved))
    trained = [t for t in static_memory(model(name), recipe).tensors if t.trainable]
    held: deque[int] = deque()
    peak = 0
    for each in step_lists(optimizer, trained, decays=decays):
        for _ in range(each.freed_before):
            held.popleft()
        held.append(sum(map(allocated, each.sizes)))
        peak = max(peak, sum(held))
        for _ in range(each.freed_after):
            held.popleft()
    assert peak == step_temporary_bytes(optimizer, trained, decays=decays)


def test_lists_of_adafactor_peak_at_its_temporaries_but_for_rows_and_columns() -> None:
    trained = [t for t in static_memory(model(LLAMA), training(method="full")).tensors if t.trainable]
    held: list[int] = []
    made: list[int] = []

    def make(num_bytes: int) -> int:
        held.append(allocated(num_bytes))
        made.append(sum(held))
        return held[-1]

    play(step_lists("adafactor", trained), make, held.remove)
    rows_and_columns = allocated(4 * 128_256) + allocated(4 * 2048)  # of the embedding, which is the first and the largest
    assert max(made) + rows_and_columns == step_temporary_bytes("adafactor", trained)
    assert not held


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_reserves_what_the_tape_does(method: str) -> None:
    recipe = training(2, 1024, method=method, accumulation=2)
    subject = resolve(LLAMA, None)
    payload = {"config": subject.config, "recipe": asdict(recipe), "layers_prefix": subject.inventory.layers_prefix}
    traced = Session(payload).program(1, 2**17).program
    found = estimate(subject.inventory, recipe, traced)
    assert found.holding.get().basis is Basis.REPLAYED
    # a tensor of a few bytes more or less can open one more small segment
    assert abs(found.reserved_bytes - answered(recipe).reserved_bytes) <= SMALL_SEGMENT_BYTES


def test_an_optimizer_keeps_its_states_from_the_first_step_on() -> None:
    recipe = training(1, 128, method="full")
    subject = model(LLAMA)
    held = reservation(subject, recipe, schedule_of(recipe), [1024])
    static = static_memory(subject, recipe)
    assert held is not None
    assert held.max_bytes >= static.loaded_bytes + static.optimizer_states_bytes + static.gradients_bytes
    assert held.num_alloc_retries == 0
