"""Behaviour of the engine that users rely on."""

from dataclasses import replace

import pytest

from estimator.engine import estimate
from estimator.estimate import Estimate
from estimator.explain import explain
from estimator.loading import unsplit_bytes
from estimator.phases import Basis, Item, Phase
from estimator.recipe import Adapter, Attention, Loss, Objective, ObjectiveKind, Recipe, Reference
from estimator.sources.catalogue import entries
from estimator.stack import Stack
from estimator.static_memory import static_memory
from estimator.step import regime_of, run_step
from tests.estimator.recipes import inference, model, training

LLAMA = "meta-llama/Llama-3.2-1B"


def held(answered: Estimate, phase: Phase) -> dict[Item, int]:
    (found,) = [p for p in answered.phases if p.phase is phase]
    return {item.item: item.num_bytes for item in found.items}


def basis(answered: Estimate, phase: Phase) -> dict[Item, Basis]:
    (found,) = [p for p in answered.phases if p.phase is phase]
    return {item.item: item.basis for item in found.items}


def test_training_has_five_phases_and_generation_three() -> None:
    assert [p.phase.value for p in estimate(model(LLAMA), training()).phases] == ["load", "forward", "loss", "backward", "optimizer_step"]
    assert [p.phase.value for p in estimate(model(LLAMA), inference()).phases] == ["load", "prefill", "decode"]


@pytest.mark.parametrize("name", [LLAMA, "Qwen/Qwen3-30B-A3B", "google/gemma-2-9b"])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_a_step_run_with_names_is_the_step_without_them(name: str, method: str) -> None:
    inventory, recipe = model(name), training(method=method)
    stored, regime = static_memory(inventory, recipe).tensors, regime_of(recipe, inventory)
    plain, named = (run_step(inventory, recipe, stored, regime, names=names).peaks for names in (False, True))
    assert plain.keys() == named.keys()
    for phase, kept in plain.items():
        without = [snapshot.unnamed() for snapshot in named[phase]]
        assert [(s.totals, dict(s.held)) for s in kept] == [(s.totals, dict(s.held)) for s in without]
        assert len(named[phase][0].held) > len(without[0].held)


def test_accumulation_keeps_gradients_alive_from_the_first_phase_on() -> None:
    once, twice = (estimate(model(LLAMA), training(method="full", accumulation=n)) for n in (1, 2))
    all_gradients = held(twice, Phase.OPTIMIZER_STEP)[Item.GRADIENTS]
    assert Item.GRADIENTS not in held(once, Phase.FORWARD)
    assert held(twice, Phase.FORWARD)[Item.GRADIENTS] == held(twice, Phase.BACKWARD)[Item.GRADIENTS] == all_gradients
    assert 0 < held(once, Phase.BACKWARD)[Item.GRADIENTS] <= all_gradients


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_is_stored_is_exact_in_every_phase(method: str) -> None:
    stored = {Item.WEIGHTS, Item.QUANTIZATION_STATE, Item.BUFFERS, Item.ADAPTER_WEIGHTS, Item.OPTIMIZER_STATES, Item.CHECKPOINTS}
    for phase in estimate(model(LLAMA), training(method=method)).phases:
        assert all(item.basis is Basis.EXACT for item in phase.items if item.item in stored)


def test_gradients_are_exact_where_all_of_them_are_there() -> None:
    once, twice = (estimate(model(LLAMA), training(method="full", accumulation=n)) for n in (1, 2))
    assert basis(once, Phase.BACKWARD)[Item.GRADIENTS] is Basis.MODELLED
    assert basis(once, Phase.OPTIMIZER_STEP)[Item.GRADIENTS] is Basis.EXACT
    for phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD, Phase.OPTIMIZER_STEP):
        assert basis(twice, phase)[Item.GRADIENTS] is Basis.EXACT


def test_what_is_alive_at_the_worst_instant_is_modelled() -> None:
    answered = estimate(model(LLAMA), training())
    for phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD):
        found = basis(answered, phase)
        assert {found.get(item, Basis.MODELLED) for item in (Item.ACTIVATIONS, Item.LOGITS, Item.TEMPORARY, Item.WORKSPACE)} == {
            Basis.MODELLED
        }


def test_between_steps_nothing_but_the_workspace_is_modelled() -> None:
    answered = estimate(model(LLAMA), training(2, 1024, accumulation=4))
    update = {item.item: item for phase in answered.phases if phase.phase is Phase.OPTIMIZER_STEP for item in phase.items}
    assert update[Item.ACTIVATIONS].num_bytes == 4 * 3 * 8 * 2 * 1024  # ids, labels and mask of four micro-batches, int64
    steady = [item for name, item in update.items() if name not in (Item.GRADIENTS, Item.TEMPORARY)]
    assert sum(item.num_bytes for item in steady) == answered.steady_state_bytes
    assert {item.item for item in steady if item.basis is not Basis.EXACT} == {Item.WORKSPACE}


def test_a_cache_is_exact_and_so_are_the_last_position_s_logits() -> None:
    answered = estimate(model(LLAMA), inference())
    assert basis(answered, Phase.PREFILL)[Item.KV_CACHE] is Basis.EXACT
    assert basis(answered, Phase.DECODE)[Item.KV_CACHE] is basis(answered, Phase.DECODE)[Item.LOGITS] is Basis.EXACT


def test_more_accumulation_steps_add_nothing_but_the_ids_of_their_batches() -> None:
    two, three = (estimate(model(LLAMA), training(2, 1024, accumulation=n)) for n in (2, 3))
    assert three.peak.allocated_bytes - two.peak.allocated_bytes == 3 * 8 * 2 * 1024


def test_paged_states_lie_outside_what_is_allocated() -> None:
    plain, paged = (estimate(model(LLAMA), training(optimizer=name)) for name in ("adamw_8bit", "paged_adamw_8bit"))
    assert plain.paged_bytes == 0 < paged.paged_bytes
    difference = held(plain, Phase.FORWARD)[Item.OPTIMIZER_STATES] - held(paged, Phase.FORWARD)[Item.OPTIMIZER_STATES]
    assert difference == paged.paged_bytes


def test_every_second_layer_checkpointed_keeps_half_the_layers_whole() -> None:
    every, second = (estimate(model(LLAMA), training(4, 1024, every_n_layers=n)) for n in (1, 2))
    assert held(second, Phase.LOSS)[Item.CHECKPOINTS] < held(every, Phase.LOSS)[Item.CHECKPOINTS]
    assert held(second, Phase.LOSS)[Item.ACTIVATIONS] > 8 * held(every, Phase.LOSS)[Item.ACTIVATIONS]


def test_grouped_heads_without_flash_attention_write_out_the_scores() -> None:
    ampere, turing = (estimate(model(LLAMA), training(1, 4096, compute_capability=cc)) for cc in ((8, 0), (7, 5)))
    scores = 32 * 4096 * 4096 * 4  # 32 heads, float32
    assert held(turing, Phase.FORWARD)[Item.TEMPORARY] > held(ampere, Phase.FORWARD)[Item.TEMPORARY] + scores


def test_before_grouped_kernels_keys_and_values_were_copied_for_all_heads() -> None:
    stacks = Stack(transformers=(4, 53)), Stack(transformers=(4, 54))
    older, newer = (estimate(model(LLAMA), training(2, 1024, checkpointing=False, stack=stack)) for stack in stacks)
    per_layer = 2 * (2048 - 512) * 2 * 2 * 1024  # k and v, 32 heads instead of 8, bfloat16, 2 × 1024 tokens
    grown = held(older, Phase.LOSS)[Item.ACTIVATIONS] - held(newer, Phase.LOSS)[Item.ACTIVATIONS]
    assert grown == 16 * per_layer


@pytest.mark.parametrize("loss", [Loss.TRL_TILED, Loss.LIGER])
def test_fused_losses_hold_far_less_than_all_logits(loss: Loss) -> None:
    stock, fused = (estimate(model(LLAMA), training(4, 2048, loss=one)) for one in (Loss.STOCK, loss))
    assert held(stock, Phase.LOSS)[Item.LOGITS] == 4 * 2048 * 128_256 * (2 + 4 + 4)
    assert held(fused, Phase.LOSS).get(Item.LOGITS, 0) < held(stock, Phase.LOSS)[Item.LOGITS] / 10


def test_a_family_without_blocks_is_answered_with_its_exact_load() -> None:
    answered = estimate(model("state-spaces/mamba-130m-hf"), training(method="full"))
    assert [p.phase for p in answered.phases] == [Phase.LOAD]
    assert {item.basis for item in answered.phases[0].items} == {Basis.EXACT}
    assert [notice.code for notice in answered.notices] == ["not_modelled"]
    assert answered.steady_state_bytes is None


def test_experts_of_transformers_4_are_named_as_the_reason() -> None:
    answered = estimate(model("mistralai/Mixtral-8x7B-v0.1"), training(stack=Stack(transformers=(4, 57))))
    assert "one by one" in answered.notices[0].message


def test_every_item_of_every_phase_is_explained() -> None:
    for asked in (training(2, 1024), training(method="full", accumulation=2), inference()):
        texts = explain(model(LLAMA), asked)
        for phase in estimate(model(LLAMA), asked).phases:
            for item in phase.items:
                assert texts[phase.phase, item.item].formula, (phase.phase, item.item)
                assert texts[phase.phase, item.item].source


@pytest.mark.parametrize("asked", [training(), inference()], ids=["training", "generation"])
def test_a_block_that_meets_what_it_has_no_rule_for_is_answered_and_explained_up_to_the_load(asked: Recipe) -> None:
    asked = replace(asked, attention=Attention.EAGER)
    answered = estimate(model("tiiuae/falcon-7b"), asked)
    assert [notice.code for notice in answered.notices] == ["not_modelled"]
    assert "eager attention of Falcon" in answered.notices[0].message
    texts = explain(model("tiiuae/falcon-7b"), asked)
    assert {phase for phase, _ in texts} == {p.phase for p in answered.phases} == {Phase.LOAD}
    assert all(texts[Phase.LOAD, item.item].formula for item in answered.phases[0].items)


def test_the_load_is_never_above_the_peak() -> None:
    for method in ("full", "lora", "qlora"):
        answered = estimate(model(LLAMA), training(method=method))
        assert answered.phases[0].allocated_bytes <= answered.peak.allocated_bytes


@pytest.mark.parametrize("name", [entry.id for entry in entries()])
def test_every_bundled_model_is_answered_for(name: str) -> None:
    for asked in (training(method="full"), inference()):
        answered = estimate(model(name), asked)
        assert answered.phases[0].phase is Phase.LOAD
        assert (len(answered.phases) == 1) == any(n.code == "not_modelled" for n in answered.notices)


def test_an_explanation_of_the_load_takes_off_what_is_made_later_where_it_is() -> None:
    def later(asked: Recipe) -> str:
        return explain(model(LLAMA), asked)[Phase.LOAD, Item.TEMPORARY].formula

    adapted = training()
    assert adapted.training is not None
    second = Objective(kind=ObjectiveKind.DPO, reference=Reference.MODEL)
    assert "less the adapters" in later(adapted)
    assert "less" not in later(training(method="full"))
    assert "less" not in later(inference())
    assert "less all that is made later" in later(replace(adapted, training=replace(adapted.training, objective=second)))


def test_an_explanation_names_what_loading_left_unsplit_and_what_biases_gained() -> None:
    asked = training(method="qlora", stack=Stack(transformers=(4, 48, 1), bitsandbytes=(0, 43, 3)))
    asked = replace(asked, adapter=Adapter(r=8, target_modules=("c_attn",)))
    inventory = model("openai-community/gpt2-xl")
    texts = explain(inventory, asked)
    assert "casts the biases of quantized layers for good" in texts[Phase.FORWARD, Item.WEIGHTS].formula
    assert "casts the biases" not in texts[Phase.LOAD, Item.WEIGHTS].formula
    unsplit = unsplit_bytes(inventory, asked)
    assert unsplit > 0
    assert f"+ {unsplit:,} B: blocks larger than the weights" in texts[Phase.OPTIMIZER_STEP, Item.WORKSPACE].formula
