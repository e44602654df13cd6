"""What ranks hold, against real runs of two processes on the CPU (gloo)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from estimator.dtypes import DType
from estimator.inventory import Inventory
from estimator.optimizers import weight_decay_groups
from estimator.parallelism import fsdp1
from estimator.parallelism.ddp import bucket_bytes
from estimator.parallelism.fsdp import Unit, as_trained, units_of
from estimator.parallelism.options import BackwardPrefetch, Ddp, Fsdp, Parallel, Strategy
from estimator.parallelism.shares import share_of
from estimator.parallelism.zero import flat_sizes, partition_elements
from estimator.phases import Item
from estimator.recipe import Adapter, Recipe
from estimator.static_memory import StaticMemory, static_memory
from tests.estimator.ranks import BUCKET_CAP_MB, CONFIG, FLAT, NUM_RANKS, RANK, run
from tests.estimator.real_models import inventory_of, plain_name
from tests.estimator.recipes import training

ADAPTER = Adapter(r=RANK, target_modules="all-linear")


@cache
def _inventory(tied: bool = False) -> Inventory:
    return inventory_of({**CONFIG, "tie_word_embeddings": tied})


def _recipe(strategy: Strategy, *, adapter: bool) -> Recipe:
    recipe = training(1, 8, method="lora" if adapter else "full", adapter=replace(ADAPTER, autocast_adapter_dtype=True))
    return replace(recipe, parallel=Parallel(strategy=strategy, num_gpus=NUM_RANKS))


def _static(recipe: Recipe, *, tied: bool = False) -> StaticMemory:
    return static_memory(_inventory(tied), recipe)


# -- DDP --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("ddp", tmp_path_factory.mktemp("ddp"))[0]


@pytest.mark.parametrize(("name", "adapter"), [("full, unused looked for", False), ("adapter, unused looked for", True)])
def test_buckets_are_those_of_the_real_reducer(ddp: dict[str, Any], name: str, adapter: bool) -> None:
    static = _static(_recipe(Strategy.DDP, adapter=adapter))
    assert Counter(bucket_bytes(static.tensors, Ddp(), finds_unused=True)) == Counter(ddp[name])


@pytest.mark.parametrize(("name", "cap"), [("full", None), ("full, small buckets", BUCKET_CAP_MB)])
def test_rebuilt_buckets_are_as_many_and_together_as_large_as_the_real_ones(ddp: dict[str, Any], name: str, cap: int | None) -> None:
    """Which norm's gradient comes before which matrix's is not known; a bucket may close one small tensor earlier or later."""
    static = _static(_recipe(Strategy.DDP, adapter=False))
    ours = bucket_bytes(static.tensors, Ddp(bucket_cap_mb=cap), finds_unused=False)
    assert (len(ours), sum(ours)) == (len(ddp[name]), sum(ddp[name]))


# -- FSDP2 ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Runs of both versions, in the same processes."""
    return run("fsdp", tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def fsdp(both: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["version 2"] for record in both]


CASES = pytest.mark.parametrize("kind", ["untied, full", "untied, adapter", "tied, full", "tied, adapter"])


def _of(kind: str) -> tuple[Recipe, StaticMemory]:
    recipe = _recipe(Strategy.FSDP, adapter=kind.endswith("adapter"))
    return recipe, _static(recipe, tied=kind.startswith("tied"))


@CASES
@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_shards_are_those_of_fully_shard_with_padding(fsdp: list[dict[str, Any]], kind: str, rank: int) -> None:
    recipe, static = _of(kind)
    ours = {
        m.tensor.pattern.format(*(i for (i,) in m.tensor.indices)): (
            m.shard_elements * m.dtype.itemsize,
            m.local_rows(rank) * m.row_elements,
        )
        for unit in units_of(recipe, static.tensors).all
        for m in unit.members
    }
    real = {plain_name(name): tuple(sizes) for name, sizes in fsdp[rank][kind]["shards"].items()}
    assert ours == real


@CASES
def test_gradients_of_a_unit_share_one_tensor(fsdp: list[dict[str, Any]], kind: str) -> None:
    recipe, static = _of(kind)
    ours = {
        m.tensor.pattern.format(*(i for (i,) in m.tensor.indices)): (
            m.local_rows(0) * m.row_elements * m.dtype.itemsize,
            sum(n.gradient_elements * n.dtype.itemsize for n in unit.members),
        )
        for unit in units_of(recipe, static.tensors).all
        for m in unit.members
        if m.tensor.trainable
    }
    assert ours == {plain_name(name): tuple(sizes) for name, sizes in fsdp[0][kind]["gradients"].items()}


@CASES
def test_states_are_those_of_the_local_shards(fsdp: list[dict[str, Any]], kind: str) -> None:
    recipe, static = _of(kind)
    trained = [as_trained(m) for unit in units_of(recipe, static.tensors).all for m in unit.members if m.tensor.trainable]
    assert fsdp[0][kind]["states"] == sum(2 * t.num_elements * t.dtype.itemsize for t in trained)


@CASES
def test_every_unit_is_gathered_and_reduced_through_a_flat_tensor_of_its_own(fsdp: list[dict[str, Any]], kind: str) -> None:
    recipe, static = _of(kind)
    units = units_of(recipe, static.tensors)
    real: Mapping[str, list[int]] = fsdp[0][kind]["buffers"]
    assert set(real["DefaultAllGather"]) == {_gathered(unit) for unit in units.all if unit.members}
    # The input of a reduction, and this rank's part of its output.
    inputs = {_reduced(unit) for unit in units.all} - {0}
    assert set(real["DefaultReduceScatter"]) == inputs | {size // NUM_RANKS for size in inputs}


def _gathered(unit: Unit) -> int:
    return sum(m.gathered_bytes(unit.compute) for m in unit.members)


def _reduced(unit: Unit) -> int:
    return sum(m.num_ranks * m.gradient_elements * m.gathered_dtype(unit.compute).itemsize for m in unit.members)


def test_offloaded_parameters_leave_nothing_of_them_on_the_card() -> None:
    recipe = _recipe(Strategy.FSDP, adapter=False)
    static = _static(recipe)
    on_card = share_of(recipe, static)
    offloaded = share_of(replace(recipe, parallel=replace(recipe.parallel, fsdp=Fsdp(offload_params=True))), static)
    assert sum(offloaded.stored.values()) == static.buffers_bytes
    assert offloaded.host_bytes == sum(on_card.stored.values()) - static.buffers_bytes + on_card.gradients_bytes


# -- FSDP1 ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flat(both: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["version 1"] for record in both]


FLAT_CASES = pytest.mark.parametrize("kind", list(FLAT))


def _flat(kind: str) -> tuple[Recipe, StaticMemory]:
    options = dict(FLAT[kind])
    reshards = options.pop("sharding_strategy", "FULL_SHARD") == "FULL_SHARD"
    options["backward_prefetch"] = BackwardPrefetch(options.get("backward_prefetch", "NO_PREFETCH"))
    recipe = _recipe(Strategy.FSDP, adapter="adapter" in kind)
    recipe = replace(recipe, parallel=replace(recipe.parallel, fsdp=Fsdp(version=1, reshard_after_forward=reshards, **options)))
    if "reentrant" in kind:  # of transformers 4.51
        assert recipe.training is not None
        old = replace(recipe.stack, transformers=(4, 51))
        recipe = replace(recipe, training=replace(recipe.training, use_reentrant=True), stack=old)
    return recipe, _static(recipe, tied=kind.startswith("tied"))


@FLAT_CASES
def test_flat_shards_and_their_gradients_are_those_of_torch(flat: list[dict[str, Any]], kind: str) -> None:
    recipe, static = _flat(kind)
    units = fsdp1.units_of(recipe, static.tensors).all
    sizes = sorted(u.shard_elements * u.dtype.itemsize for u in units)
    trained = sorted(u.shard_elements * u.dtype.itemsize for u in units if u.trains)
    for rank in range(NUM_RANKS):
        assert (flat[rank][kind]["shards"], flat[rank][kind]["gradients"]) == (sizes, trained)


@FLAT_CASES
@pytest.mark.parametrize("rank", range(NUM_RANKS))
def test_optimizers_see_the_parts_of_parameters_that_lie_in_a_ranks_shard(flat: list[dict[str, Any]], kind: str, rank: int) -> None:
    recipe, static = _flat(kind)
    parts = [part for unit in fsdp1.units_of(recipe, static.tensors).all for part in unit.as_trained(rank)]
    assert sorted(part.num_elements for part in parts) == flat[rank][kind]["trained"]
    assert sum(2 * part.raw_bytes for part in parts) == flat[rank][kind]["states"]


@FLAT_CASES
def test_whole_gradients_of_a_unit_leave_as_one_tensor_in_the_gathered_type(flat: list[dict[str, Any]], kind: str) -> None:
    recipe, static = _flat(kind)
    trained = [u for u in fsdp1.units_of(recipe, static.tensors).all if u.trains]
    ours = sorted([u.num_elements * u.gathered_dtype.itemsize, u.gathered_dtype.itemsize] for u in trained)
    assert ours == flat[0][kind]["reduced"]


@FLAT_CASES
def test_gathered_units_are_as_many_at_once_as_torch_holds(flat: list[dict[str, Any]], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without the allocator's rounding, as storages on the CPU are."""
    monkeypatch.setattr(fsdp1, "allocated", lambda num_bytes: num_bytes)
    recipe, static = _flat(kind)
    units, options = fsdp1.units_of(recipe, static.tensors), recipe.parallel.fsdp
    backward = fsdp1.backward_bytes(units, options, recomputes="reentrant" in kind)
    assert [fsdp1.forward_bytes(units, options), backward] == flat[0][kind]["peaks"]
    assert flat[0][kind]["left"] == 0


@pytest.mark.parametrize(("kind", "keeps"), [("untied, full, ahead, reentrant", False), ("untied, adapter, ahead, reentrant", True)])
def test_inputs_of_frozen_units_run_again_stay_with_their_gradients(flat: list[dict[str, Any]], kind: str, keeps: bool) -> None:
    """When a layer is run again, those above it have been; after the step before nothing was left of them."""
    recipe, static = _flat(kind)
    assert fsdp1.share(recipe, static).keeps_layer_inputs is keeps
    above = range(CONFIG["num_hidden_layers"])
    assert flat[0][kind]["again"] == [[number if keeps else 0] * 2 for number in above]
    # in 4.52 Llama's layers have the checkpoint within them, and Mixtral's not yet
    for version, model_type, is_around in (((4, 52), "llama", False), ((4, 52), "mixtral", keeps), ((4, 53), "mixtral", False)):
        newer = replace(recipe, stack=replace(recipe.stack, transformers=version))
        assert fsdp1.share(newer, replace(static, model_type=model_type)).keeps_layer_inputs is is_around


# -- ZeRO -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is no dependency")
def test_partitions_are_those_of_deepspeed(tmp_path: Path) -> None:
    """Run with deepspeed 0.19.8 on the path."""
    real = run("zero", tmp_path)[0]
    for kind, seen in real.items():
        stage, adapter = kind.startswith("3"), kind.endswith("adapter")
        recipe = _recipe(Strategy.ZERO3 if stage else Strategy.ZERO2, adapter=adapter)
        tensors = [
            replace(t, dtype=DType.BFLOAT16, raw_bytes=2 * t.num_elements) for t in _static(recipe).tensors if t.item is not Item.BUFFERS
        ]
        trained = [t for t in tensors if t.trainable]
        frozen = sum(t.num_copies * (2 * partition_elements(t, NUM_RANKS) if stage else t.raw_bytes) for t in tensors if not t.trainable)
        if stage:
            groups = [sum(t.num_copies * partition_elements(t, NUM_RANKS) for t in group) for group in weight_decay_groups(trained)]
            parts = [size for size in groups if size]
        else:
            parts = [size // NUM_RANKS for size in flat_sizes(trained, NUM_RANKS)]
        assert seen == {
            "gradients": 2 * sum(parts),
            "flat": sorted(2 * size * (1 if stage else NUM_RANKS) for size in parts),
            "master": sorted(4 * size for size in parts),
            "states": 8 * sum(parts),
            "frozen": frozen,
        }, kind
