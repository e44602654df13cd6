"""Types and bytes of a prepared model with real storage: tiny models saved to disk and loaded by the real libraries on the CPU."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.introspect.prepared import TORCH_DTYPES, lora_config
from estimator.patterns import copies, partition, products
from estimator.phases import Item
from estimator.recipe import Adapter, Attention, Quantization, QuantizationKind, Recipe, Trainer, Training
from estimator.sources.catalogue import load
from estimator.stack import Stack
from estimator.static_memory import gradient_bytes, parameter_counts, static_memory, stored_tensors
from tests.estimator.real_models import inventory_of, plain_name

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES, "tie_word_embeddings": False},
    "tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **SIZES},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320, "n_positions": 128},
    "gpt_oss": {"model_type": "gpt_oss", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen3_moe": {"model_type": "qwen3_moe", **SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
NF4 = Quantization(kind=QuantizationKind.NF4, double_quant=True, compute_dtype=DType.BFLOAT16)
INT8 = Quantization(kind=QuantizationKind.INT8)
ALL = Adapter(r=4, target_modules="all-linear")
ATTENTION = Adapter(r=4, target_modules=("q_proj", "v_proj", "c_attn"))
PLAIN = Recipe(dtype=DType.BFLOAT16, attention=Attention.EAGER, training=Training(micro_batch_size=1, sequence_length=8), stack=Stack())
RECIPES: dict[str, Recipe] = {
    "full bf16": PLAIN,
    "full fp16": replace(PLAIN, dtype=DType.FLOAT16),
    "full fp32": replace(PLAIN, dtype=DType.FLOAT32),
    "lora bf16": replace(PLAIN, adapter=ATTENTION),
    "lora fp16 in base type": replace(PLAIN, dtype=DType.FLOAT16, adapter=replace(ATTENTION, autocast_adapter_dtype=False)),
    "all linear": replace(PLAIN, adapter=ALL),
    "dora in base type": replace(PLAIN, adapter=replace(ATTENTION, use_dora=True, autocast_adapter_dtype=False)),
    "nf4": replace(PLAIN, quantization=NF4, adapter=ATTENTION),
    "nf4 in compute type": replace(
        PLAIN,
        quantization=replace(NF4, compute_dtype=DType.FLOAT16, double_quant=False),
        adapter=replace(ATTENTION, use_dora=True, autocast_adapter_dtype=False),
    ),
    "nf4 prepared": replace(PLAIN, quantization=NF4, adapter=ALL, prepare_for_kbit_training=True),
    "nf4 stored as bf16, prepared": replace(
        PLAIN, quantization=replace(NF4, storage_dtype=DType.BFLOAT16), adapter=ATTENTION, prepare_for_kbit_training=True
    ),
    "fp4 loaded as fp32": replace(
        PLAIN, dtype=DType.FLOAT32, quantization=Quantization(kind=QuantizationKind.FP4), adapter=replace(ATTENTION, use_dora=True)
    ),
    "int8": replace(PLAIN, dtype=DType.FLOAT16, quantization=INT8, adapter=replace(ATTENTION, autocast_adapter_dtype=False, bias="all")),
    "int8 dora prepared": replace(PLAIN, quantization=INT8, adapter=replace(ATTENTION, use_dora=True), prepare_for_kbit_training=True),
    "saved head": replace(PLAIN, quantization=NF4, adapter=replace(ATTENTION, modules_to_save=("lm_head",))),
    "embedding": replace(PLAIN, adapter=Adapter(r=3, target_modules=("embed_tokens", "wte"), use_dora=True, autocast_adapter_dtype=False)),
    "trained tokens": replace(PLAIN, adapter=replace(ATTENTION, trainable_token_indices=(("embed_tokens", 3),))),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny random checkpoint of every config."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, fields in CONFIGS.items():
        config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def real_model(path: Path, recipe: Recipe) -> Any:
    """What the user's script has before it hands the model to a trainer."""
    quantization = recipe.quantization
    config = None
    if quantization is not None:
        is_4bit = quantization.kind.is_4bit
        config = BitsAndBytesConfig(
            load_in_4bit=is_4bit,
            load_in_8bit=not is_4bit,
            bnb_4bit_quant_type=quantization.kind.value if is_4bit else "nf4",
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=quantization.compute_dtype.value,
            bnb_4bit_quant_storage=quantization.storage_dtype.value,
            llm_int8_skip_modules=None if quantization.skip_modules is None else list(quantization.skip_modules),
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=TORCH_DTYPES[recipe.dtype], quantization_config=config)
    if recipe.prepare_for_kbit_training:
        model = prepare_model_for_kbit_training(model)
    if recipe.adapter is not None:
        model = get_peft_model(model, lora_config(recipe.adapter), autocast_adapter_dtype=recipe.adapter.autocast_adapter_dtype)
    return model


def real_tensors(model: Any) -> Counter[tuple[str, int, str, bool]]:
    """(name, bytes, type, trainable) of every stored tensor, quantization state and buffers included."""
    result: Counter[tuple[str, int, str, bool]] = Counter()

    def add(name: str, tensor: torch.Tensor, trainable: bool = False) -> None:
        size = tensor.numel() * tensor.element_size()
        result[plain_name(name), size, str(tensor.dtype).removeprefix("torch."), trainable] += 1

    for name, parameter in model.named_parameters():
        add(name, parameter, parameter.requires_grad)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            add(f"{name}.absmax", state.absmax)
            add(f"{name}.code", state.code)
            if state.nested:
                add(f"{name}.nested_absmax", state.state2.absmax)
                add(f"{name}.nested_code", state.state2.code)
                add(f"{name}.offset", state.offset)
        scales = getattr(parameter, "SCB", None)
        if scales is not None:
            add(f"{name}.SCB", scales)
    for name, buffer in model.named_buffers():
        add(name, buffer)
    return result


def our_tensors(recipe: Recipe, config: str) -> Counter[tuple[str, int, str, bool]]:
    return Counter(
        (plain_name(name), t.raw_bytes, t.dtype.value, t.trainable)
        for t in stored_tensors(inventory_of(CONFIGS[config]), recipe)
        for _, name in copies(t.pattern, t.indices)
    )


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_on_the_device_has_the_real_type_and_size(config: str, name: str, saved: Mapping[str, Path]) -> None:
    recipe = RECIPES[name]
    try:
        model = real_model(saved[config], recipe)
    except ValueError:
        with pytest.raises(RequestError):
            our_tensors(recipe, config)
        return
    ours, real = our_tensors(recipe, config), real_tensors(model)
    assert (sorted((real - ours).items()), sorted((ours - real).items())) == ([], [])


@pytest.mark.parametrize("config", ["llama", "qwen2"])
def test_logical_counts_are_those_peft_prints(config: str, saved: Mapping[str, Path]) -> None:
    for name in ("nf4", "nf4 stored as bf16, prepared", "int8", "saved head", "all linear", "trained tokens"):
        counts = parameter_counts(stored_tensors(inventory_of(CONFIGS[config]), RECIPES[name]))
        trainable, total = real_model(saved[config], RECIPES[name]).get_nb_trainable_parameters()
        assert (counts.trainable, counts.total) == (trainable, total)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [replace(ATTENTION, use_dora=True), replace(ATTENTION, modules_to_save=("lm_head",)), None])
@pytest.mark.parametrize("quantization", [None, NF4, INT8])
def test_trl_casts_what_it_trains_of_quantized_models(
    adapter: Adapter | None, quantization: Quantization | None, saved: Mapping[str, Path], tmp_path: Path
) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    if adapter is None and quantization is not None:
        pytest.skip("refused by the trainer")
    words = {f"t{i}": i for i in range(318)} | {"<pad>": 318, "</s>": 319}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="<pad>", eos_token="</s>"
    )
    recipe = replace(PLAIN, quantization=quantization, trainer=Trainer.TRL)
    trainer = SFTTrainer(
        model=real_model(saved["llama"], recipe),
        args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=Dataset.from_dict({"input_ids": [[1, 2, 3]]}),
        processing_class=tokenizer,
        peft_config=lora_config(adapter) if adapter is not None else None,
    )
    assert our_tensors(replace(recipe, adapter=adapter), "llama") == real_tensors(trainer.model)


def test_older_trl_leaves_norms_in_float32_and_brings_embeddings_back() -> None:
    # trl 0.25, models/utils.py, prepare_peft_model and peft_module_casting_to_bf16
    recipe = replace(
        RECIPES["nf4 prepared"],
        trainer=Trainer.TRL,
        stack=Stack(trl=(0, 25, 0)),
        training=Training(micro_batch_size=1, sequence_length=8, autocast_dtype=DType.BFLOAT16),
    )
    types = {t.pattern: t.dtype for t in stored_tensors(inventory_of(CONFIGS["llama"]), recipe)}
    assert types["model.embed_tokens.weight"] is types["lm_head.weight"] is DType.BFLOAT16
    assert types["model.norm.weight"] is types["model.layers.{}.input_layernorm.weight"] is DType.FLOAT32
    assert types["model.layers.{}.self_attn.q_proj.lora_A.weight"] is DType.FLOAT32


def llama_8b(**changes: Any) -> Recipe:
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return replace(PLAIN, quantization=NF4, adapter=Adapter(r=16, target_modules=projections), **changes)


def test_llama_8b_with_rank_16_on_seven_projections_trains_41_943_040_parameters() -> None:
    inventory = load("meta-llama-llama-3.1-8b.json").inventory
    tensors = stored_tensors(inventory, llama_8b())
    counts = parameter_counts(tensors)
    assert counts.trainable == counts.adapter == 41_943_040
    assert counts.total == 8_072_204_288
    assert counts.quantized == 6_979_321_856
    # What sum(p.numel()) shows: two packed weights count as one. The guides' 4,579,280,896 is neither.
    assert counts.total - counts.quantized // 2 == 4_582_543_360


def test_preparing_a_qlora_model_doubles_what_is_not_quantized() -> None:
    inventory = load("meta-llama-llama-3.1-8b.json").inventory
    plain, prepared = (static_memory(inventory, llama_8b(prepare_for_kbit_training=p)) for p in (False, True))
    packed = sum(t.allocated_bytes for t in plain.tensors if t.quantization is not None)
    assert packed == 6_979_321_856 // 2
    assert prepared.weights_bytes - packed == 2 * (plain.weights_bytes - packed)


def test_experts_stay_in_16_bits_under_nf4_and_become_32_when_prepared() -> None:
    inventory = load("mistralai-mixtral-8x7b-v0.1.json").inventory
    recipe = replace(PLAIN, quantization=NF4, adapter=Adapter(r=8, target_modules=("q_proj",)))
    for prepared, dtype in ((False, DType.BFLOAT16), (True, DType.FLOAT32)):
        tensors = stored_tensors(inventory, replace(recipe, prepare_for_kbit_training=prepared))
        assert {t.dtype for t in tensors if ".experts." in t.pattern} == {dtype}


def test_experts_and_routers_are_quantized_and_adapted_one_by_one_under_transformers_4() -> None:
    inventory = load("mistralai-mixtral-8x7b-v0.1.json").inventory
    recipe = replace(PLAIN, quantization=NF4, adapter=Adapter(r=8, target_modules="all-linear"), stack=Stack(transformers=(4, 57, 1)))
    tensors = stored_tensors(inventory, recipe)
    counts = parameter_counts(tensors)
    # Embedding, head and norms stay: 2·V·h + (2·32 + 1)·h; routers are linear layers there, and quantized.
    assert counts.total - counts.adapter - counts.quantized == 2 * 32000 * 4096 + 65 * 4096
    # q, o, k, v, router, and three projections of eight experts in each of 32 layers.
    per_layer = 2 * (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 8) + 8 * 3 * (4096 + 14336)
    assert counts.adapter == 8 * 32 * per_layer


def test_replacing_the_skip_list_quantizes_the_head() -> None:
    inventory = inventory_of(CONFIGS["llama"])
    for skip, is_quantized in ((None, False), (("o_proj",), True), (("o_proj", "lm_head"), False)):
        recipe = replace(PLAIN, quantization=replace(NF4, skip_modules=skip), adapter=ATTENTION)
        head = next(t for t in stored_tensors(inventory, recipe) if t.pattern == "lm_head.weight")
        assert (head.quantization is not None) == is_quantized


@pytest.mark.parametrize("skip", [None, ("lm_head",), ("embed_tokens", "lm_head"), ("embed_tokens",), ("o_proj",)])
@pytest.mark.parametrize("quantization", [NF4, INT8])
@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")])
def test_a_tied_head_must_be_skipped_adapted_or_not(
    saved: Mapping[str, Path], quantization: Quantization, skip: tuple[str, ...] | None, targets: tuple[str, ...]
) -> None:
    asked = replace(PLAIN, quantization=replace(quantization, skip_modules=skip), adapter=Adapter(r=4, target_modules=targets))
    ids = torch.arange(8)[None]
    try:
        model = real_model(saved["tied"], asked)
        model(input_ids=ids, labels=ids).loss.backward()
    except (AssertionError, AttributeError):  # the shared weight has neither `quant_state` nor `CB`
        with pytest.raises(RequestError, match=r"llm_int8_skip_modules: .* leaves lm_head .* accepted: a list that names 'lm_head' too"):
            our_tensors(asked, "tied")
        assert "lm_head" not in (skip or ("lm_head",))
        return
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert our_tensors(asked, "tied") == real_tensors(real_model(saved["tied"], asked))
    assert any("lm_head" in name for name in names) == ("lm_head" in targets)


def test_one_nested_code_table_serves_all_layers_before_bitsandbytes_0_46() -> None:
    def states(version: tuple[int, ...]) -> int:
        recipe = llama_8b(stack=Stack(bitsandbytes=version))
        return static_memory(load("meta-llama-llama-3.1-8b.json").inventory, recipe).quantization_state_bytes

    assert states((0, 46, 0)) - states((0, 45, 5)) == (7 * 32 - 1) * 1024


def test_inference_trains_nothing() -> None:
    inventory = inventory_of(CONFIGS["llama"])
    for adapter in (None, ALL):
        memory = static_memory(inventory, replace(PLAIN, training=None, adapter=adapter))
        assert memory.parameters.trainable == memory.gradients_bytes == memory.optimizer_states_bytes == 0


def test_a_quantized_model_without_adapter_cannot_be_trained() -> None:
    with pytest.raises(RequestError, match="without an adapter"):
        stored_tensors(inventory_of(CONFIGS["llama"]), replace(PLAIN, quantization=NF4))


def test_a_saved_copy_of_a_quantized_module_is_refused() -> None:
    recipe = replace(PLAIN, quantization=NF4, adapter=replace(ATTENTION, modules_to_save=("up_proj",)))
    with pytest.raises(RequestError, match="llm_int8_skip_modules"):
        stored_tensors(inventory_of(CONFIGS["llama"]), recipe)


def test_targets_that_match_nothing_are_told_what_would() -> None:
    recipe = replace(PLAIN, adapter=Adapter(r=8, target_modules=("c_attn",)))
    with pytest.raises(RequestError, match="'q_proj'"):
        stored_tensors(inventory_of(CONFIGS["llama"]), recipe)


def test_gradients_have_the_type_of_their_parameter_and_are_rounded_one_by_one() -> None:
    inventory = inventory_of(CONFIGS["llama"])
    for dtype, width in ((DType.BFLOAT16, 2), (DType.FLOAT32, 4)):
        tensors = stored_tensors(inventory, replace(PLAIN, dtype=dtype))
        expected = sum(-(-t.num_elements * width // 512) * 512 * t.num_copies for t in tensors if t.item is Item.WEIGHTS)
        assert gradient_bytes(tensors) == expected


def test_recipes_that_differ_in_sizes_alone_share_one_result() -> None:
    inventory = inventory_of(CONFIGS["llama"])
    small, large = (replace(PLAIN, training=Training(micro_batch_size=b, sequence_length=b * 100)) for b in (1, 8))
    assert static_memory(inventory, small) is static_memory(inventory, large)


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 64), more=st.integers(1, 64), optimizer=st.sampled_from(["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
)
def test_a_higher_rank_never_takes_less_static_memory(rank: int, more: int, optimizer: str) -> None:
    inventory = inventory_of(CONFIGS["qwen3_moe"])
    training = Training(micro_batch_size=1, sequence_length=8, optimizer=optimizer)

    def total(r: int) -> int:
        memory = static_memory(inventory, replace(PLAIN, training=training, adapter=replace(ALL, r=r)))
        return memory.loaded_bytes + memory.gradients_bytes + memory.optimizer_states_bytes + memory.optimizer_temporary_bytes

    assert total(rank) <= total(rank + more)


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1))
def test_products_hold_each_chosen_copy_once(chosen: set[tuple[int, int]]) -> None:
    found = [numbers for indices in products(sorted(chosen)) for numbers, _ in copies("{}.{}", indices)]
    assert sorted(found) == sorted(chosen)


def test_partition_keeps_the_indices_where_all_copies_agree() -> None:
    indices = ((0, 1, 2), (4, 5))
    assert partition("a.{}.b.{}", indices, lambda name: True) == [(True, indices)]
    assert partition("a.{}.b.{}", indices, lambda name: name.startswith("a.1")) == [(False, ((0, 2), (4, 5))), (True, ((1,), (4, 5)))]
