"""FLOPs of a step against torch's own counter, on tiny real models in every kind of training."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from estimator.errors import RequestError
from estimator.flops import Pass, step_flops, step_program
from estimator.recipe import Attention, Loss, Objective, ObjectiveKind
from tests.estimator.real_models import inventory_of
from tests.estimator.recipes import inference, model, training
from tests.oracle import recipes
from tests.oracle.models import FAMILIES, MODES, VOCABULARY, AdapterSpec, Mode, build

B, S, LAYERS = 3, 16, 3
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "deepseek_v2", "deepseek_v2_lite")
# Expert after expert: torch counts no grouped products.
EXPERTS = dict.fromkeys(MIXTURES, "eager")
SCHEMES = {"kept": None, "checkpointed": False, "checkpointed_reentrantly": True}
_LORA = Mode(load_dtype=torch.float32, adapter=AdapterSpec(), adapter_dtype=torch.float32)
FULL, ALL, ATTENTION, DOWN = (
    MODES["full_fp32"],
    _LORA,
    _LORA.with_adapter(targets=("q_proj", "v_proj")),
    _LORA.with_adapter(targets=("down_proj",)),
)
METHODS = {"full": FULL, "lora_on_all": ALL, "lora_on_q_and_v": ATTENTION, "lora_on_down": DOWN}
# Its router's groups do not fit this size.
COUNTED = [family for family in FAMILIES if family != "deepseek_v3"]


def counted(family: str, mode: Mode, gc: bool | None, config: Mapping[str, object] | None = None) -> dict[str, int]:
    """Forward and backward FLOPs of the real model, with attention written out, which torch counts on the CPU too."""
    whole = build(family, mode, LAYERS, attention="eager", experts=EXPERTS.get(family), gc=gc, config=config)
    ids = torch.randint(0, VOCABULARY, (B, S))
    counter = FlopCounterMode(display=False)
    with counter:
        loss = whole(input_ids=ids, labels=ids).loss
    forward = counter.get_total_flops()
    with counter:
        loss.backward()
    return {"forward": forward, "backward": counter.get_total_flops()}


def said(family: str, mode: Mode, gc: bool | None, config: Mapping[str, object] | None = None) -> dict[str, int]:
    flops = step_flops(recipes.inventory(family, LAYERS, config), recipes.recipe(family, mode, B, S, gc=gc, attention="eager"))
    return {"forward": flops.forward, "backward": flops.backward}


def is_refused(family: str, mode: Mode) -> bool:
    """Whether the family has no modules of the names that the adapter asks for."""
    try:
        said(family, mode, None)
    except RequestError:
        return True
    return False


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_model_runs_the_flops_that_torch_counts(family: str, method: str, scheme: str) -> None:
    assert said(family, METHODS[method], SCHEMES[scheme]) == counted(family, METHODS[method], SCHEMES[scheme])


@pytest.mark.parametrize(
    "family", ["gemma2", "gpt2", "gpt_neox", "falcon", "starcoder2", "phi3", "mixtral", "gpt_oss", "deepseek_v2", "glm4_moe"]
)
def test_other_families_run_the_flops_that_torch_counts(family: str) -> None:
    assert said(family, ALL, False) == counted(family, ALL, False)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", COUNTED)
def test_every_family_runs_the_flops_that_torch_counts(family: str, method: str, scheme: str) -> None:
    mode = METHODS[method]
    if is_refused(family, mode):
        with pytest.raises(ValueError, match="arget modules"):
            counted(family, mode, SCHEMES[scheme])
        return
    assert said(family, mode, SCHEMES[scheme]) == counted(family, mode, SCHEMES[scheme])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_head_counts_as_a_product_of_its_own(scheme: str) -> None:
    tied = {"tie_word_embeddings": True}
    for mode in (FULL, ALL):
        assert said("llama", mode, SCHEMES[scheme], tied) == counted("llama", mode, SCHEMES[scheme], tied)


@pytest.mark.parametrize(
    "changes", [{"dora": True}, {"modules_to_save": ("lm_head",)}, {"bias": "all"}], ids=["dora", "saved_head", "biases"]
)
def test_what_adapters_bring_along_is_counted(changes: Mapping[str, object]) -> None:
    mode = ALL.with_adapter(**changes)
    assert said("llama", mode, None) == counted("llama", mode, None)


def test_one_kernel_counts_as_torch_counts_it() -> None:
    recipe = training(2, 256, method="full", checkpointing=False, attention=Attention.FLASH_ATTENTION_2)
    (core,) = step_program(model("Qwen/Qwen2.5-1.5B"), recipe).attention
    query, key = (2, 12, 256, 128), (2, 2, 256, 128)  # 12 heads, 2 of keys, of 128; 28 layers
    assert core.forward_flops(2, 256) == sdpa_flop_count(query, key, key)
    assert core.backward_flops(2, 256) == 28 * sdpa_backward_flop_count(query, query, query, query)


def test_checkpointing_runs_the_layers_again_and_nothing_else() -> None:
    kept, again = (step_flops(model("Qwen/Qwen2.5-1.5B"), training(1, 256, checkpointing=on)) for on in (False, True))
    assert kept.by_pass[Pass.RECOMPUTE] == 0
    assert 0.9 < again.by_pass[Pass.RECOMPUTE] / (again.forward - again.head // 2) < 1
    assert again.by_pass[Pass.WEIGHT_GRADIENTS] == kept.by_pass[Pass.WEIGHT_GRADIENTS]


def test_a_mixture_runs_the_experts_of_a_token_and_not_all() -> None:
    inventory = model("Qwen/Qwen3-30B-A3B")
    flops = step_flops(inventory, training(1, 1024, method="full", checkpointing=False))
    active = 3.3e9 - 0.3e9  # model card: 3.3 B activated, of which the embedding's 0.31 B multiply nothing
    assert (flops.forward - flops.attention / 3.5) / (2 * 1024) == pytest.approx(active, rel=0.02)


def test_llama_4_runs_every_expert_for_every_token() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 40, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1}
    config = transformers.Llama4TextConfig(**sizes, **heads, num_local_experts=4, pad_token_id=0, tie_word_embeddings=False)
    whole = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(0, VOCABULARY, (B, S))
    counter = FlopCounterMode(display=False)
    with counter:
        whole(input_ids=ids, labels=ids)
    recipe = recipes.recipe("llama", FULL, B, S, attention="eager")
    assert step_flops(inventory_of(config.to_dict() | {"architectures": None}), recipe).forward == counter.get_total_flops()


def test_an_encoder_with_a_decoder_is_refused() -> None:
    with pytest.raises(RequestError, match="encoder"):
        step_flops(model("google-t5/t5-small"), training(method="full"))


def test_experts_as_modules_run_as_much_as_fused_ones() -> None:
    inventory = model("mistralai/Mixtral-8x7B-v0.1")
    new = training(1, 512, method="full")
    old = replace(new, stack=replace(new.stack, transformers=(4, 57)))
    assert step_flops(inventory, old).forward == step_flops(inventory, new).forward


def test_fused_losses_run_the_head_once_more_over_the_scored_positions() -> None:
    inventory = model("Qwen/Qwen2.5-1.5B")
    stock = step_flops(inventory, training(2, 256))
    tiled = step_flops(inventory, training(2, 256, loss=Loss.TRL_TILED))
    assert tiled.head * 2 * 512 == stock.head * 3 * 510


def test_a_step_grows_with_batch_length_and_rank() -> None:
    inventory = model("Qwen/Qwen2.5-1.5B")
    totals = [step_flops(inventory, training(b, s)).total for b, s in ((1, 256), (1, 512), (2, 512), (4, 512))]
    assert totals == sorted(totals)
    assert totals[3] == 2 * totals[2]
    assert totals[1] > 2 * totals[0]


def test_what_trains_nothing_or_something_else_is_refused() -> None:
    inventory = model("Qwen/Qwen2.5-1.5B")
    with pytest.raises(RequestError, match="training"):
        step_flops(inventory, inference())
    recipe = training()
    assert recipe.training is not None
    other = replace(recipe, training=replace(recipe.training, objective=Objective(kind=ObjectiveKind.DPO)))
    with pytest.raises(RequestError, match="dpo"):
        step_flops(inventory, other)
