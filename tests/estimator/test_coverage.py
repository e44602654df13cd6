"""The trace beyond plain decoders: scans, hybrids, routed experts, models that refuse; `make coverage` does this for all of them."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BitsAndBytesConfig

from estimator.introspect.trace.errors import NeedsValuesError, RefusedError
from estimator.introspect.trace.layers import sample
from estimator.introspect.trace.tasks import Session
from estimator.recipe import Attention, Recipe
from estimator.sources.tracing import Subject, Tracer
from estimator.splice import spliced
from estimator.step import Program
from estimator.traced_step import NotOneProgramError
from tests.coverage import architectures
from tests.coverage.architectures import Architecture, architecture
from tests.coverage.cells import Cell, above_stored, splice_difference
from tests.coverage.stops import STOPS, Stop
from tests.estimator.real_models import inventory_of, meta_model
from tests.estimator.recipes import training

_MLLAMA = {
    "model_type": "mllama_text_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "vocab_size": 512,
    "pad_token_id": 0,
}
CHECKPOINTED = Cell(method="full", attention=Attention.SDPA, checkpointing=True)


def payload(config: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    return {"config": dict(config), "recipe": asdict(recipe), "layers_prefix": inventory_of(config).layers_prefix}


def small(name: str, **changes: Any) -> Architecture:
    """An architecture with some values of its config changed."""
    config = architectures.default_config(name) | changes
    return Architecture(name=name, config=config, inventory=inventory_of(config))


def largest(program: Program, batch: int, length: int) -> dict[str, int]:
    return {phase.value: max(s.at(batch, length) for s in snapshots) for phase, snapshots in program.peaks.items()}


# Attention and recurrence in turn; windows in turn; several streams between layers; keys shared by layers; two norms around each block.
@pytest.mark.parametrize("name", ["bamba", "gemma3_text", "granitemoehybrid", "lfm2", "gemma4_text"])
def test_a_few_layers_stand_for_all(name: str) -> None:
    assert splice_difference(architecture(name), CHECKPOINTED) == pytest.approx(0.0, abs=1e-3)


def test_layers_that_are_passed_over_by_number_keep_their_place() -> None:
    """Mllama skips its layers of cross-attention where there is no image, and knows them by their positions."""
    model = small("mllama", text_config={**_MLLAMA, "num_hidden_layers": 10, "cross_attention_layers": [3, 8]})
    assert splice_difference(model, CHECKPOINTED) == pytest.approx(0.0, abs=1e-6)


def test_a_cache_that_layers_keep_while_training_is_found_by_those_that_are_left() -> None:
    """Gemma 3's decoder is not told to keep none, and its cache has a place for every layer of the config."""
    text = {"num_hidden_layers": 10, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512, "head_dim": 16}
    plain = Cell(method="full", attention=Attention.SDPA, checkpointing=False)
    assert splice_difference(small("gemma3", text_config=text), plain) == 0.0


@pytest.mark.parametrize("name", ["beam", "diffllama", "llama"])
def test_what_only_numbers_or_scales_a_layer_makes_no_kind_of_its_own(name: str) -> None:
    config = architectures.default_config(name)
    layers = meta_model(config, torch.bfloat16).get_submodule(inventory_of(config).layers_prefix)
    assert len(sample(list(layers)).kept) < len(layers) / 3


def test_layers_that_share_parameters_do_not_stand_for_each_other() -> None:
    config = architectures.default_config("zamba2")
    layers = list(meta_model(config, torch.bfloat16).get_submodule("model.layers"))
    sharing = [n for n, layer in enumerate(layers) if type(layer).__name__ == "Zamba2HybridLayer"]
    assert set(sharing) <= set(sample(layers).kept)


def test_a_model_that_uses_a_weight_outside_its_layer_learns_that_it_is_quantized() -> None:
    """Jamba calls its time projection where it would multiply by the packed weight otherwise."""
    model = small("jamba", num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, hidden_size=64, mamba_dt_rank=4)
    session = Session(payload(model.config, training(1, 32, method="qlora")))
    assert any(a.module.endswith("dt_proj.base_layer") for a in session.run((1, 32)).allocations)


@pytest.mark.parametrize(("routing", "rows"), [("balanced", 2 * 64 * 2 // 8), ("worst", 2 * 64)])
def test_experts_that_run_one_by_one_get_the_tokens_that_are_stated(routing: str, rows: int) -> None:
    model = small("longcat_flash", num_layers=2, n_routed_experts=8, zero_expert_num=0, moe_topk=2)
    session = Session(payload(model.config, training(2, 64, method="full")) | {"routing": routing})
    traced = session.run((2, 64))
    products = [a.shape[0] for a in traced.allocations if a.module.endswith("mlp.experts") and a.operator == "mm" and a.phase == "forward"]
    assert session.values.routing_matters
    assert set(products) == {rows}


@pytest.mark.parametrize(("routing", "rows"), [("balanced", 2 * 64 * 2 // 8), ("worst", 2 * 64)])
def test_experts_that_are_counted_from_a_table_of_choices_get_the_tokens_that_are_stated(routing: str, rows: int) -> None:
    """JetMoE sums a table of tokens by experts, in floating point, to lists that it splits by."""
    model = small("jetmoe", num_hidden_layers=2, hidden_size=64, intermediate_size=32, kv_channels=16, vocab_size=512)
    plain = training(2, 64, method="full", checkpointing=False)
    traced = Session(payload(model.config, plain) | {"routing": routing}).run((2, 64))
    products = [
        a.shape[0] for a in traced.allocations if a.module.endswith("mlp.input_linear") and a.operator == "mm" and a.phase == "forward"
    ]
    assert set(products) == {rows}


def test_layers_that_are_handed_what_the_ones_before_made_all_run() -> None:
    """Inkling 2 stacks the states at the border of each block of layers, and every layer looks at all of them."""
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "n_routed_experts": 4,
    }
    sliding = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "moe_intermediate_size": 32}
    kinds = ["hybrid_sliding", "hybrid"] * 6
    config = {**sizes, **sliding, "num_hidden_layers": 12, "layer_types": kinds, "n_layers_per_attn_res_block": 2, "num_experts_per_tok": 2}
    model = small("inkling2_text", **config)
    session = Session(payload(model.config, training(2, 64, method="full", attention=Attention.EAGER, checkpointing=False)))
    assert not session.runs_all_layers
    session.run((2, 64))
    assert session.runs_all_layers


@pytest.mark.slow
def test_a_scan_over_chunks_has_a_program_for_every_single_length_only() -> None:
    session = Session(payload(architecture("bamba").config, training(3, 777, method="full")))
    with pytest.raises(NotOneProgramError):
        session.program(1, 2**20)
    exact = session.exact_program()
    whole = above_stored(spliced(session.run((3, 777)), session.sample.stands_for))
    rounded = {phase.value: max(sum(s.items(3, 777).values()) for s in snapshots) for phase, snapshots in exact.program.peaks.items()}
    assert rounded == whole


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_the_outline_of_a_loop_over_tokens_meets_runs_that_it_was_not_fitted_to(batch: int) -> None:
    model = small("mamba", num_hidden_layers=2, n_layer=2, vocab_size=4096)
    recipe = training(batch, 1024, method="full", attention=Attention.EAGER, checkpointing=False)
    session = Session(payload(model.config, recipe))
    found = session.at_size()
    assert found.is_outline
    real = above_stored(spliced(session.run((batch, 112)), session.sample.stands_for))
    ours = largest(found.program, batch, 112)
    assert ours == pytest.approx(real, rel=1e-3)


def test_what_a_library_refuses_is_told_apart_from_what_needs_values() -> None:
    for name, refusal in (("cpmant", RefusedError), ("blt", NeedsValuesError)):
        cell = replace(CHECKPOINTED, attention=Attention.EAGER)
        model = architecture(name)
        with pytest.raises(refusal):
            Session(payload(model.config, cell.recipe(512))).run((2, 512))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")  # peft's own defaults for LongCat
@pytest.mark.parametrize(
    ("name", "method", "stop"),
    [(name, method, stop) for stop in STOPS for name in stop.names for method in stop.methods if name != "llama4"],
)
def test_where_a_trace_is_said_to_stop_with_reality_reality_stops(name: str, method: str, stop: Stop, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**stop.config), dtype=torch.bfloat16)
    if method == "qlora":
        model.save_pretrained(tmp_path)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, quantization_config=quantization)
    if method != "full":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        if stop.checkpointing is not False:
            model.enable_input_require_grads()
    model.config.use_cache = False
    ids = torch.randint(3, 300, (2, 32))
    with pytest.raises((AttributeError, RuntimeError, ValueError), match=stop.real), torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(input_ids=ids, labels=ids)


@pytest.mark.slow
def test_the_program_of_a_scan_over_chunks_is_asked_for_again_at_its_own_length(tmp_path: Path) -> None:
    # no infinity goes to the worker
    model = small("bamba", num_hidden_layers=4, time_step_limit=[0.0, 1e9])
    tracer = Tracer(directory=tmp_path)
    subject = Subject(config=model.config, inventory=model.inventory)
    found = {length: tracer.step(subject, training(3, length, method="full")).program for length in (300, 777)}
    for length, program in found.items():
        timeline = tracer.timeline(subject, training(3, length, method="full")).timeline
        rounded = {phase.value: max(sum(s.items(3, length).values()) for s in snapshots) for phase, snapshots in program.peaks.items()}
        assert rounded == above_stored(timeline)
