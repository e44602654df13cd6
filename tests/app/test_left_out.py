"""What an answer says about the parts of a run that it leaves out."""

from typing import Any

import pytest

from app.service import answer
from estimator.errors import RequestError

LLAMA = "meta-llama/Llama-3.2-1B"
GIB = 2**30


def ask(model: str = LLAMA, **changes: Any) -> dict[str, Any]:
    """A checkpointed run in bfloat16 of 2 × 1024 tokens, with fields of `training` and of the request changed."""
    training = {
        "per_device_train_batch_size": 2,
        "max_length": 1024,
        "bf16": True,
        "gradient_checkpointing": True,
        **changes.pop("training", {}),
    }
    return answer({"model": model, "dtype": "bfloat16", "training": training, **changes})


def messages(result: dict[str, Any], code: str) -> list[str]:
    return [warning["message"] for warning in result["warnings"] if warning["code"] == code]


def phase_bytes(result: dict[str, Any]) -> dict[str, int]:
    return {phase["phase"]: phase["allocated_bytes"] for phase in result["phases"]}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("neftune_noise_alpha", 5),
        ("torch_compile", True),
        ("torch_compile_backend", "inductor"),
        ("auto_find_batch_size", True),
        ("torch_empty_cache_steps", 4),
        ("full_determinism", True),
        ("activation_offloading", True),
        ("half_precision_backend", "apex"),
        ("chat_template_path", "Qwen/Qwen3-0.6B"),
        ("use_cpu", True),
    ],
)
def test_a_field_that_changes_memory_without_a_formula_is_named_with_what_it_does(field: str, value: object) -> None:
    result = ask(training={field: value})
    (message,) = messages(result, "field_not_modelled")
    assert message.startswith(f"training.{field} is not modelled: ")
    assert f"training.{field}" not in result["ignored"]


@pytest.mark.parametrize("name", ["offload", "selective"])
def test_variants_of_checkpointing_without_a_formula_are_named(name: str) -> None:
    (message,) = messages(ask(training={"gradient_checkpointing_kwargs": {name: True}}), "field_not_modelled")
    assert message.startswith(f"training.gradient_checkpointing_kwargs.{name} ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_by_length", True),
        ("learning_rate", 1e-4),
        ("half_precision_backend", "auto"),
        ("past_index", -1),
        ("tp_size", 1),
        ("eval_strategy", "no"),
        ("per_device_eval_batch_size", 64),
        ("max_grad_norm", 0.3),
    ],
)
def test_a_field_without_a_bearing_on_memory_is_listed_and_not_warned_of(field: str, value: object) -> None:
    result = ask(training={field: value})
    assert result["ignored"] == [f"training.{field}"]
    assert not messages(result, "field_not_modelled")
    assert not messages(result, "evaluation_not_modelled")


def test_a_cache_matters_only_where_checkpointing_does_not_switch_it_off() -> None:
    assert ask(training={"use_cache": True})["ignored"] == ["training.use_cache"]
    (message,) = messages(ask(training={"use_cache": True, "gradient_checkpointing": False}), "field_not_modelled")
    assert message.startswith("training.use_cache ")


@pytest.mark.parametrize("field", ["assistant_only_loss", "completion_only_loss"])
def test_labels_on_a_part_of_the_tokens_matter_to_fused_losses_alone(field: str) -> None:
    tiled = ask(trainer="trl", training={field: True}, stack={"trl": "1.16.0"})
    assert "tokens with a label" in messages(tiled, "field_not_modelled")[0]
    stock = ask(trainer="trl", training={field: True}, stack={"trl": "0.25.1"})
    assert stock["ignored"] == [f"training.{field}"]
    assert not messages(stock, "field_not_modelled")


def test_initialisation_that_decomposes_weights_is_named() -> None:
    adapter = {"r": 8, "target_modules": ["q_proj"]}
    assert not messages(ask(peft={**adapter, "init_lora_weights": "gaussian"}), "field_not_modelled")
    (message,) = messages(ask(peft={**adapter, "init_lora_weights": "pissa"}), "field_not_modelled")
    assert message.startswith("peft.init_lora_weights ")


def test_evaluation_is_one_warning_with_all_its_fields_and_the_size_of_its_logits() -> None:
    result = ask(training={"eval_strategy": "steps", "eval_steps": 50, "per_device_eval_batch_size": 4, "logging_steps": 1})
    (message,) = messages(result, "evaluation_not_modelled")
    for field in ("eval_strategy", "eval_steps", "per_device_eval_batch_size"):
        assert f"training.{field}" in message
    assert f"{4 * 1024 * 128_256 * 4 / GIB:.2f} GiB" in message  # 4 × 1024 tokens, the vocabulary of Llama 3, float32
    assert result["ignored"] == ["training.logging_steps"]


def test_evaluation_runs_eight_sequences_at_a_time_unless_told_otherwise() -> None:
    # Source: transformers 5.23, training_args.py, per_device_eval_batch_size.
    (message,) = messages(ask(training={"evaluation_strategy": "epoch"}), "evaluation_not_modelled")
    assert "runs 8 sequences" in message


def test_under_tiles_evaluation_makes_logits_for_metrics_alone() -> None:
    (message,) = messages(ask(trainer="trl", training={"eval_on_start": True}, stack={"trl": "1.16.0"}), "evaluation_not_modelled")
    assert "needs no full logits, compute_metrics does" in message


def test_label_smoothing_is_named() -> None:
    (message,) = messages(ask(training={"label_smoothing_factor": 0.1}), "label_smoothing_not_modelled")
    assert f"{2 * 1024 * 128_256 * 4 / GIB:.2f} GiB" in message
    tiled = ask(trainer="trl", training={"label_smoothing_factor": 0.1}, stack={"trl": "1.16.0"})
    assert "a second time" in messages(tiled, "label_smoothing_not_modelled")[0]


def test_a_loss_that_older_trl_took_from_full_logits_is_named() -> None:
    assert messages(ask(trainer="trl", training={"loss_type": "dft"}, stack={"trl": "0.25.1"}), "field_not_modelled")
    assert not messages(ask(trainer="trl", training={"loss_type": "dft"}, stack={"trl": "1.16.0"}), "field_not_modelled")


@pytest.mark.parametrize(
    ("trl", "coefficient", "model", "balances"),
    [
        ("1.16.0", None, "Qwen/Qwen3-30B-A3B", True),  # the config's own coefficient is 0.001
        ("1.16.0", 0.0, "Qwen/Qwen3-30B-A3B", False),
        ("1.16.0", None, "deepseek-ai/DeepSeek-V3", False),  # its config has none
        ("1.9.0", None, "deepseek-ai/DeepSeek-V3", True),  # TRL's own default
        ("0.25.1", None, "Qwen/Qwen3-30B-A3B", False),  # output_router_logits is false in the config
        ("1.16.0", None, LLAMA, False),
    ],
)
def test_the_routers_loss_is_named_where_trl_adds_it(trl: str, coefficient: float | None, model: str, balances: bool) -> None:
    training = {} if coefficient is None else {"router_aux_loss_coef": coefficient}
    adapter = {"r": 8, "target_modules": ["q_proj"]} if "DeepSeek" not in model else {"r": 8, "target_modules": ["o_proj"]}
    result = ask(model, trainer="trl", training=training, stack={"trl": trl}, peft=adapter)
    assert bool(messages(result, "router_loss_not_modelled")) == balances


# -- padding-free batches ---------------------------------------------------------------------------------------------------------------


def test_flash_attention_takes_the_same_tokens_in_one_row_without_a_mask() -> None:
    flash = {"trainer": "trl", "attn_implementation": "flash_attention_2", "stack": {"trl": "1.16.0", "transformers": "5.23"}}
    rows, packed = ask(**flash), ask(training={"packing": True}, **flash)
    assert packed["recipe"]["training"]["padding_free"] is True
    assert not messages(packed, "padding_free_needs_mask")
    for name, num_bytes in phase_bytes(rows).items():
        # cos and sin of 1024 more positions, and no more
        assert 0 <= phase_bytes(packed)[name] - num_bytes <= 1024 * 64 * 4 * 4 + 2 * 1024 * 8


def test_sdpa_tells_samples_in_one_row_apart_by_a_mask_of_all_their_tokens() -> None:
    sdpa = {"trainer": "trl", "attn_implementation": "sdpa", "stack": {"trl": "1.16.0", "transformers": "5.23"}}
    rows, packed = ask(**sdpa), ask(training={"packing": True}, **sdpa)
    assert phase_bytes(packed)["forward"] > phase_bytes(rows)["forward"] + 2048 * 2048
    (message,) = messages(packed, "padding_free_needs_mask")
    assert "2,048²" in message
    assert "flash_attention_2" in message


@pytest.mark.parametrize(
    ("training", "trl", "flattened"),
    [
        ({"packing": True}, "1.16.0", True),
        ({"packing": True, "packing_strategy": "wrapped"}, "1.16.0", False),
        ({"packing": True}, "0.18.2", False),
        ({"packing": True}, "0.19.0", True),
        ({"padding_free": True}, "0.18.2", True),
        ({}, "1.16.0", False),
    ],
)
def test_packing_is_padding_free_unless_rows_are_cut_to_one_length(training: dict[str, Any], trl: str, flattened: bool) -> None:
    result = ask(trainer="trl", training=training, stack={"trl": trl})
    assert result["recipe"]["training"]["padding_free"] is flattened


def test_packed_batches_carry_no_padding() -> None:
    assert ask(trainer="trl", training={"packing": True}, padded=True)["recipe"]["training"]["padded"] is False


@pytest.mark.parametrize(
    ("kind", "field"), [("reward", "padding_free"), ("reward", "packing"), ("grpo", "padding_free"), ("dpo", "packing")]
)
def test_packing_is_for_supervised_fine_tuning(kind: str, field: str) -> None:
    with pytest.raises(RequestError, match=rf"training\.{field}: true is for 'sft', and task\.kind is '{kind}'; accepted: false"):
        ask(trainer="trl", training={field: True}, task={"kind": kind, "max_prompt_length": 100}, stack={"trl": "1.16.0"})


def test_dpo_pads_whatever_padding_free_says() -> None:
    result = ask(trainer="trl", training={"padding_free": True}, task={"kind": "dpo"}, stack={"trl": "1.16.0"})
    assert result["recipe"]["training"]["padding_free"] is False
    assert messages(result, "padding_free_ignored")
    assert not messages(result, "padding_free_refused")


def test_padding_free_without_packing_is_what_newer_trl_refuses_to_cut() -> None:
    assert messages(ask(trainer="trl", training={"padding_free": True}, stack={"trl": "1.16.0"}), "padding_free_refused")
    assert not messages(ask(trainer="trl", training={"padding_free": True}, stack={"trl": "0.27.0"}), "padding_free_refused")


def test_padding_that_flash_attention_takes_out_is_named() -> None:
    assert messages(ask(padded=True, attn_implementation="flash_attention_2"), "flash_padding_not_modelled")
    assert not messages(ask(padded=True, attn_implementation="sdpa"), "flash_padding_not_modelled")
    assert not messages(ask(attn_implementation="flash_attention_2"), "flash_padding_not_modelled")


# -- Liger ------------------------------------------------------------------------------------------------------------------------------


def test_liger_fuses_the_loss_of_models_that_it_patches() -> None:
    result = ask(training={"use_liger_kernel": True})
    assert result["recipe"]["training"]["loss"] == "liger"
    assert "upper bound" in messages(result, "liger_layers_not_modelled")[0]
    assert not messages(result, "liger_does_not_patch")


@pytest.mark.parametrize("model", ["EleutherAI/pythia-70m", "openai-community/gpt2", "tiiuae/falcon-7b", "microsoft/phi-2"])
def test_liger_changes_nothing_where_it_does_not_patch(model: str) -> None:
    with_it, without = (ask(model, training={"use_liger_kernel": asked, "max_length": 512}) for asked in (True, False))
    assert messages(with_it, "liger_does_not_patch")
    assert with_it["recipe"] == without["recipe"]
    assert phase_bytes(with_it) == phase_bytes(without)


def test_liger_has_no_fused_loss_for_granite() -> None:
    # Source: liger-kernel 0.8, transformers/monkey_patch.py, apply_liger_kernel_to_granite.
    result = ask("ibm-granite/granite-3.3-8b-instruct", training={"use_liger_kernel": True})
    assert result["recipe"]["training"]["loss"] == "stock"
    assert "granite" in messages(result, "liger_layers_not_modelled")[0]


def test_a_fused_loss_that_is_switched_off_is_not_counted() -> None:
    training = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False, "rms_norm": True}}
    assert ask(training=training)["recipe"]["training"]["loss"] == "stock"


def test_trl_takes_ligers_layers_beside_its_own_loss_and_refuses_ligers() -> None:
    trl = {"trainer": "trl", "stack": {"trl": "1.16.0"}}
    result = ask(training={"use_liger_kernel": True}, **trl)
    assert result["recipe"]["training"]["loss"] == "trl_tiled"
    assert messages(result, "liger_layers_not_modelled")
    with pytest.raises(RequestError, match="fused_linear_cross_entropy"):
        ask(training={"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}, **trl)
