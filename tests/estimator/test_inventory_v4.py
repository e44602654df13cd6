"""Un-fused experts against what transformers 4.57.1 built."""

import json
import math
from pathlib import Path

import pytest

from estimator.inventory import Inventory, ModuleKind, TensorRole
from estimator.inventory_codec import decode
from estimator.inventory_v4 import unfuse_experts
from estimator.sources import catalogue
from estimator.sources.process import Inspector
from estimator.sources.resolve import resolve

RECORDED = json.loads((Path(__file__).parent / "data" / "experts_transformers_4_57.json").read_text())["models"]
# transformers 4.57 counts its zero experts' router differently, and had no fused counterpart to compare the sum with.
OTHER_COUNT = {"longcat_flash"}


def inventory_of(name: str, inspector: Inspector) -> Inventory:
    if catalogue.find(name) is not None:
        return resolve(name).inventory
    return decode(inspector.run("inventory", {"config": RECORDED[name]["config"], "content_hash": name}))


def described(inventory: Inventory) -> dict[str, int]:
    """Every parameter as `pattern shape kind` with the number of copies, as recorded."""
    found: dict[str, int] = {}
    for row in inventory.rows:
        if row.role is TensorRole.PARAMETER:
            key = f"{row.pattern} {'x'.join(map(str, row.shape))} {row.module_kind}"
            found[key] = found.get(key, 0) + row.num_copies
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_experts_and_routers_are_those_of_transformers_4(name: str, inspector: Inspector) -> None:
    found = described(unfuse_experts(inventory_of(name, inspector)))
    expected = RECORDED[name]["rows"]
    # Ernie's bias sits beside the router in 4 and inside it in 5: the same scalars under another name.
    missing = {key for key in expected if found.get(key) != expected[key] and "moe_statics" not in key}
    assert not missing
    assert not [key for key in found if "experts.gate_up_proj" in key and key not in expected]


@pytest.mark.parametrize("name", sorted(set(RECORDED) - OTHER_COUNT))
def test_unfusing_changes_no_count(name: str, inspector: Inspector) -> None:
    inventory = inventory_of(name, inspector)
    assert unfuse_experts(inventory).num_parameters == inventory.num_parameters


def test_mixtral_has_ninety_six_percent_of_its_parameters_in_linear_experts() -> None:
    unfused = unfuse_experts(resolve("mistralai/Mixtral-8x7B-v0.1").inventory)
    experts = [row for row in unfused.parameters if ".experts." in row.pattern]
    assert {row.module_kind for row in experts} == {ModuleKind.LINEAR}
    assert sum(row.num_elements * row.num_copies for row in experts) == 32 * 8 * 3 * 4096 * 14336


def test_models_without_fused_experts_are_left_alone() -> None:
    for name in ("meta-llama/Llama-3.1-8B", "openai/gpt-oss-20b"):
        inventory = resolve(name).inventory
        assert unfuse_experts(inventory) is inventory


def test_an_unfused_inventory_is_not_taken_for_the_fused_one() -> None:
    inventory = resolve("mistralai/Mixtral-8x7B-v0.1").inventory
    assert unfuse_experts(inventory) != inventory
    assert math.isclose(len(set(unfuse_experts(inventory).rows)), len(unfuse_experts(inventory).rows))
