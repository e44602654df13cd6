"""Objectives beside next tokens, as a request states them."""

from typing import Any

import pytest

from app.objective import resolve_objective, sequence_length, with_classes
from app.pasted import canonical
from app.reading import read_estimate
from app.resolution import resolve_recipe
from app.service import find_model
from app.versions import stack_of
from estimator.engine import estimate
from estimator.errors import RequestError
from estimator.phases import Item, Phase
from estimator.recipe import Loss, Objective, ObjectiveKind, Recipe, Reference
from estimator.sources.resolve import resolve as resolve_model

LLAMA = "meta-llama/Llama-3.2-1B"
LORA = {"r": 8, "target_modules": ["q_proj"]}
NOW = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "bitsandbytes": "0.50.2", "trl": "1.16.0"}


def question(objective: dict[str, Any], *, trainer: str = "trl", peft: Any = None, trl: str = "1.16.0", **training: Any) -> Any:
    payload = {"model": LLAMA, "stack": NOW | {"trl": trl}, "trainer": trainer, "peft": peft, "dtype": "bfloat16"}
    return read_estimate({**payload, "training": training, "task": objective}).request


def objective(given: dict[str, Any], **rest: Any) -> Objective:
    request = question(given, **rest)
    return resolve_objective(request, stack_of(request.stack))


def recipe(given: dict[str, Any], **rest: Any) -> Recipe:
    return resolve_recipe(question(given, **rest), resolve_model(LLAMA).inventory, None)


@pytest.mark.parametrize(
    ("given", "peft", "expected"),
    [
        ({}, LORA, Reference.ADAPTER_OFF),
        ({}, None, Reference.MODEL),
        ({"ref_model": True}, LORA, Reference.MODEL),
        ({"precompute_ref_log_probs": True}, LORA, Reference.NONE),
        ({"precompute_ref_log_probs": True}, None, Reference.NONE),
    ],
)
def test_the_reference_of_dpo_is_the_adapter_switched_off_or_a_second_model(given: dict[str, Any], peft: Any, expected: Reference) -> None:
    assert objective({"kind": "dpo", **given}, peft=peft).reference is expected


@pytest.mark.parametrize(("beta", "expected"), [(None, Reference.NONE), (0.0, Reference.NONE), (0.04, Reference.ADAPTER_OFF)])
def test_grpo_needs_a_reference_for_its_kl_term_alone(beta: float | None, expected: Reference) -> None:
    given = {"kind": "grpo", "max_prompt_length": 256, "beta": beta}
    assert objective({k: v for k, v in given.items() if v is not None}, peft=LORA).reference is expected


def test_grpo_keeps_old_log_probabilities_when_a_generation_serves_several_updates() -> None:
    given = {"kind": "grpo", "max_prompt_length": 256}
    assert not objective(given, gradient_accumulation_steps=4).old_log_probs
    assert objective({**given, "num_iterations": 2}, gradient_accumulation_steps=4).old_log_probs
    assert not objective({**given, "steps_per_generation": 2}, gradient_accumulation_steps=4).old_log_probs
    assert objective({**given, "steps_per_generation": 8}, gradient_accumulation_steps=4).old_log_probs


def test_a_sequence_of_grpo_is_prompt_and_completion() -> None:
    assert sequence_length(question({"kind": "grpo", "max_prompt_length": 256})) == 256 + 512
    assert sequence_length(question({"kind": "grpo", "max_prompt_length": 256, "max_completion_length": 64})) == 256 + 64


def test_trl_fuses_the_losses_that_have_a_vocabulary() -> None:
    for given, expected in (({"kind": "dpo"}, Loss.TRL_TILED), ({"kind": "reward"}, Loss.STOCK)):
        training = recipe(given).training
        assert training is not None
        assert training.loss is expected
        assert training.sequence_length == 1024


def test_a_classification_head_has_as_many_rows_as_labels() -> None:
    plain = {"trainer": "transformers", "max_length": 512}
    assert objective({"kind": "classification"}, **plain).num_labels == 2
    assert objective({"kind": "classification", "num_labels": 7}, **plain).num_labels == 7
    assert objective({"kind": "reward"}).num_labels == 1


_SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"config": {"model_type": "seed_oss", "num_key_value_heads": 2, **_SMALL}}, "SeedOssForSequenceClassification"),  # names no class
        ("mosaicml/mpt-7b", "MptForSequenceClassification"),  # names a class of another spelling
        ("openai-community/gpt2", "GPT2ForSequenceClassification"),
    ],
)
def test_the_type_of_the_config_decides_which_class_classifies(model: Any, expected: str) -> None:
    request = read_estimate({"model": model, "training": {"max_length": 64}, "task": {"kind": "classification"}}).request
    found = with_classes(find_model(request), request, stack_of(request.stack))
    assert found.inventory.model_class == expected


def test_a_model_that_transformers_classifies_nothing_with_is_refused() -> None:
    config = {"model_type": "codegen", "n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8, "vocab_size": 512}
    request = read_estimate({"model": {"config": config}, "training": {"max_length": 64}, "task": {"kind": "classification"}}).request
    with pytest.raises(RequestError, match="classifies no sequences with CodeGenForCausalLM"):
        with_classes(find_model(request), request, stack_of(request.stack))


@pytest.mark.parametrize(
    ("given", "rest", "field"),
    [
        ({"kind": "dpo"}, {"trainer": "transformers", "max_length": 512}, "trainer"),
        ({"kind": "classification"}, {}, "trainer"),
        ({"kind": "dpo"}, {"trl": "0.25.0"}, "stack.trl"),
        ({"kind": "reward", "num_labels": 3}, {}, "task.num_labels"),
        ({"kind": "grpo"}, {}, "task.max_prompt_length"),
        ({"kind": "dpo", "max_prompt_length": 512}, {"max_length": 512}, "task.max_prompt_length"),
    ],
)
def test_what_no_trainer_trains_is_refused_by_name(given: dict[str, Any], rest: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        recipe(given, **rest)
    assert caught.value.errors[0].field == field


def test_an_adapter_for_sequence_classification_saves_the_head() -> None:
    pasted = canonical({"model": LLAMA, "peft": {"r": 8, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}})
    assert pasted.payload["peft"]["modules_to_save"] == ["score", "classifier"]


def test_without_a_trace_an_objective_is_answered_by_what_is_stored() -> None:
    inventory = resolve_model(LLAMA).inventory
    one, two = (estimate(inventory, recipe({"kind": "dpo", "precompute_ref_log_probs": alone})) for alone in (True, False))
    assert [p.phase for p in one.phases] == [Phase.LOAD]
    assert [n.code for n in one.notices] == ["not_modelled"]
    weights = [next(i.num_bytes for i in e.phases[0].items if i.item is Item.WEIGHTS) for e in (one, two)]
    assert weights[1] == 2 * weights[0]


def test_next_tokens_are_the_objective_of_a_request_that_names_none() -> None:
    request = read_estimate({"model": LLAMA, "training": {"max_length": 512}}).request
    assert resolve_objective(request, stack_of(request.stack)).kind is ObjectiveKind.SFT
