"""Slices of tensor parallelism, against a real run of two processes on the CPU (gloo) and transformers' own plans."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from estimator.blocks.families import FAMILIES
from estimator.engine import estimate
from estimator.errors import RequestError
from estimator.estimate import Estimate
from estimator.parallelism.nccl import communicator_bytes
from estimator.parallelism.options import Parallel, Strategy
from estimator.parallelism.tensor import gathered_bytes, plans, rank
from estimator.phases import Item, Phase
from estimator.recipe import Recipe
from estimator.stack import Stack
from tests.estimator.ranks import BATCH, NUM_RANKS, PROMPT, SLICED, run
from tests.estimator.real_models import inventory_of
from tests.estimator.recipes import inference, model

LLAMA = "meta-llama/Llama-3.2-1B"


def _in_slices(recipe: Recipe, num_gpus: int) -> Recipe:
    return replace(recipe, parallel=Parallel(strategy=Strategy.TENSOR_PARALLEL, num_gpus=num_gpus))


def _items(found: Estimate, phase: Phase) -> dict[Item, int]:
    (held,) = (p for p in found.phases if p.phase is phase)
    return {item.item: item.num_bytes for item in held.items}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the first rank, whose slices are the largest."""
    first, second = run("tensor", tmp_path_factory.mktemp("tensor"))
    for name in SLICED:
        assert all(a >= b for key, shape in first[name]["shapes"].items() for a, b in zip(shape, second[name]["shapes"][key], strict=True))
    return first


@pytest.mark.parametrize("name", SLICED)
def test_a_rank_has_the_slices_that_transformers_gives_it(real: dict[str, Any], name: str) -> None:
    found = rank(inventory_of(SLICED[name]), NUM_RANKS)
    assert {n: list(row.shape) for row in found.parameters for n in row.names()} == real[name]["shapes"]


@pytest.mark.parametrize("name", SLICED)
def test_the_cache_of_a_rank_is_that_of_its_heads(real: dict[str, Any], name: str) -> None:
    # One new token: the cache holds the prompt alone.
    found = estimate(inventory_of(SLICED[name]), _in_slices(inference(1, PROMPT, 1), NUM_RANKS))
    batch, heads, length, width = real[name]["keys"]
    layers = SLICED[name]["num_hidden_layers"]
    one = -(-batch * heads * length * width * 2 // 512) * 512
    assert _items(found, Phase.PREFILL)[Item.KV_CACHE] == 2 * layers * one


@pytest.mark.parametrize("name", SLICED)
def test_logits_of_all_ranks_come_together_on_each(real: dict[str, Any], name: str) -> None:
    config = SLICED[name]
    assert real[name]["logits"] == [1, 1, config["vocab_size"]]
    own = BATCH * -(-config["vocab_size"] // NUM_RANKS) * 2
    assert real[name]["head"] == own + gathered_bytes(inventory_of(config), NUM_RANKS, BATCH, 2)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_plans_are_those_of_transformers(model_type: str) -> None:
    config = CONFIG_MAPPING[model_type]()
    config.num_hidden_layers = 1
    config.layer_types = None if getattr(config, "layer_types", None) is None else config.layer_types[:1]
    with torch.device("meta"):
        real = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config)
    assert plans().get(model_type, {}) == dict(real.tp_plan)


@pytest.mark.parametrize(
    ("name", "num_gpus"),
    [("meta-llama/Llama-3.1-70B", 2), ("meta-llama/Llama-3.1-70B", 8), ("Qwen/Qwen3-30B-A3B", 4), ("google/gemma-2-9b", 2)],
)
def test_each_rank_holds_less_the_more_there_are(name: str, num_gpus: int) -> None:
    inventory = model(name)
    alone, spread = estimate(inventory, inference()), estimate(inventory, _in_slices(inference(), num_gpus))
    weights = {found: _items(found, Phase.LOAD)[Item.WEIGHTS] for found in (alone, spread)}
    # Norms are whole on each rank, and experts' routers.
    assert weights[alone] / num_gpus <= weights[spread] <= weights[alone] / num_gpus * 1.01
    assert spread.peak.allocated_bytes < alone.peak.allocated_bytes
    assert spread.parameters == alone.parameters
    outside = spread.device_bytes - spread.reserved_bytes - (alone.device_bytes - alone.reserved_bytes)
    assert outside == communicator_bytes(num_gpus)


@pytest.mark.parametrize(
    ("name", "num_gpus", "words"),
    [
        ("Qwen/Qwen3-30B-A3B", 8, "hardware.num_gpus: 8 does not divide num_key_value_heads, 4"),
        ("openai-community/gpt2", 2, "is not known for 'gpt2'"),
        ("allenai/OLMo-2-1124-7B", 2, "puts outputs together inside its layers"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(name: str, num_gpus: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        estimate(model(name), _in_slices(inference(), num_gpus))


def test_plans_of_another_version_are_said_to_be_so() -> None:
    recipe = _in_slices(inference(), 2)
    older = replace(recipe, stack=Stack(transformers=(5, 10, 0)))
    assert "plan_of_other_version" not in [notice.code for notice in estimate(model(LLAMA), recipe).notices]
    assert "plan_of_other_version" in [notice.code for notice in estimate(model(LLAMA), older).notices]
