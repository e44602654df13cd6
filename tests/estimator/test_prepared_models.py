"""Real models on the meta device, quantized, prepared and adapted by the real libraries: equality, parameter by parameter.

Types of adapters need real storage and are compared in `test_static_memory.py`; here they are created under PEFT's default, float32.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest

from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.introspect.prepared import TORCH_DTYPES, quantize, with_adapter
from estimator.inventory import Inventory, ModuleKind
from estimator.patterns import copies
from estimator.quantization import is_linear
from estimator.recipe import Adapter, Attention, Quantization, QuantizationKind, Recipe, Training
from estimator.sources.catalogue import load
from estimator.stack import Stack
from estimator.static_memory import stored_tensors
from tests.estimator.real_models import (
    catalogue_files,
    causal_model_types,
    inventory_of,
    meta_model,
    our_parameters,
    real_parameters,
)

pytestmark = pytest.mark.filterwarnings("ignore")

NF4 = Quantization(kind=QuantizationKind.NF4, double_quant=True, compute_dtype=DType.BFLOAT16)
FP4 = Quantization(kind=QuantizationKind.FP4, storage_dtype=DType.BFLOAT16)
INT8 = Quantization(kind=QuantizationKind.INT8)

# One of each kind of layout: fused experts, transposed experts, Conv1D, derived Linear, tied heads, biases, a gate of one
# output, low-rank attention, scans.
SAMPLE = (
    "meta-llama-llama-3.1-8b.json",
    "mistralai-mixtral-8x7b-v0.1.json",
    "openai-gpt-oss-20b.json",
    "openai-community-gpt2.json",
    "tiiuae-falcon-7b.json",
    "google-gemma-2-2b.json",
    "qwen-qwen2.5-1.5b.json",
    "deepseek-ai-deepseek-v2-lite.json",
    "qwen-qwen1.5-moe-a2.7b.json",
    "state-spaces-mamba-130m-hf.json",
    "facebook-opt-125m.json",
)


@lru_cache(maxsize=256)
def case_of(source: str) -> tuple[Mapping[str, Any], Inventory]:
    """Config and inventory: a bundled model by its file, or the default config of a model type."""
    if source.endswith(".json"):
        model = load(source)
        return model.config, model.inventory
    config = {"model_type": source}
    return config, inventory_of(config)


def linear_leaves(inventory: Inventory) -> list[str]:
    """Last components of the names of linear modules, in order, the head left out."""
    modules = [r.module_pattern for r in inventory.rows if r.module_kind is ModuleKind.CONV1D or is_linear(r.module_kind, r.module_class)]
    return list(dict.fromkeys(m.rpartition(".")[2] for m in modules if m != inventory.output_embedding))


def recipes(inventory: Inventory) -> dict[str, Recipe]:
    """Settings that between them use every field of an adapter, with names that occur in the model."""
    leaves = linear_leaves(inventory) or ["none"]
    first, last = leaves[0], leaves[-1]
    embedding = (inventory.input_embedding or "embed_tokens").rpartition(".")[2]
    head = inventory.output_embedding or "lm_head"
    plain = Recipe(dtype=DType.BFLOAT16, attention=Attention.EAGER, training=Training(micro_batch_size=1, sequence_length=8), stack=Stack())
    listed = Adapter(r=8, target_modules=(first, last))
    layers = replace(
        listed,
        layers_to_transform=(0, 2, 3),
        exclude_modules=(last,) if first != last else None,
        rank_pattern=((first, 3),),
        bias="lora_only",
    )
    # A head that shares the embedding's weight must be skipped too.
    tied = (name.removesuffix(".weight") for name in inventory.tied_names)
    skip = replace(NF4, skip_modules=(last, rf".*\.1\.{first}" if first != last else "nothing", *tied))
    return {
        "full": plain,
        "all linear on nf4, prepared": replace(
            plain, quantization=NF4, adapter=Adapter(r=16, target_modules="all-linear"), prepare_for_kbit_training=True
        ),
        "defaults": replace(plain, adapter=Adapter(r=8)),
        "dora on int8, prepared": replace(plain, quantization=INT8, adapter=replace(listed, use_dora=True), prepare_for_kbit_training=True),
        "dora on nf4": replace(plain, quantization=NF4, adapter=replace(listed, use_dora=True)),
        "saved modules on fp4": replace(plain, quantization=FP4, adapter=replace(listed, modules_to_save=(embedding, head))),
        "chosen layers, all biases": replace(plain, adapter=replace(layers, bias="all")),
        "chosen layers, skipped modules": replace(plain, quantization=skip, adapter=layers),
        "embedding and a pattern": replace(plain, adapter=Adapter(r=4, target_modules=rf".*\b({embedding}|{first})")),
        "lora bias": replace(plain, dtype=DType.FLOAT16, adapter=replace(listed, lora_bias=True)),
        "trained tokens": replace(plain, adapter=replace(listed, trainable_token_indices=((embedding, 5),))),
    }


def mismatch(source: str, recipe: Recipe) -> str | None:
    """How the real parameters and ours differ; None when they are equal, or both sides refuse."""
    config, inventory = case_of(source)
    refusal: Exception | None = None
    model = meta_model(config, TORCH_DTYPES[recipe.dtype])
    for name in set(model.state_dict()) & {
        name for row in inventory.rows for _, name in copies(row.pattern, row.indices) if _is_kept(row.pattern, inventory, recipe)
    }:
        parameter = model.get_parameter_or_buffer(name)
        parameter.data = parameter.data.float()
    if recipe.quantization is not None:
        quantize(model, recipe.quantization, TORCH_DTYPES[recipe.dtype])
    try:
        if recipe.adapter is not None:
            model = with_adapter(model, recipe.adapter, is_prepared=recipe.prepare_for_kbit_training)
    except (ValueError, NotImplementedError, RuntimeError, TypeError) as error:
        refusal = error
    try:
        ours = our_parameters(stored_tensors(inventory, recipe))
    except RequestError as error:
        # On meta, packed weights still look like matrices of integers that can be adapted or trained.
        return None if refusal is not None or "quantized" in str(error) or "packed" in str(error) else f"we refuse: {error}"
    if refusal is not None:
        return f"PEFT refuses: {refusal}"
    real = real_parameters(model)
    # Packed weights on meta keep the shape they had; a quantized Conv1D is the same number of elements.
    missing, extra = sorted((real - ours).items()), sorted((ours - real).items())
    return f"missing {missing[:3]} extra {extra[:3]}" if missing or extra else None


def _is_kept(pattern: str, inventory: Inventory, recipe: Recipe) -> bool:
    names = inventory.keep_in_fp32_modules_strict + (inventory.keep_in_fp32_modules if recipe.dtype is DType.FLOAT16 else ())
    return any(name.replace("*", "") in pattern for name in names)


def mismatches(source: str) -> dict[str, str]:
    """All settings under which a model differs."""
    _, inventory = case_of(source)
    found = {name: mismatch(source, recipe) for name, recipe in recipes(inventory).items()}
    return {name: text for name, text in found.items() if text is not None}


@pytest.mark.parametrize("source", SAMPLE)
def test_prepared_parameters_equal_those_of_the_libraries(source: str) -> None:
    assert mismatches(source) == {}


@pytest.mark.slow
@pytest.mark.parametrize("source", [file for file in catalogue_files() if file not in SAMPLE])
def test_prepared_parameters_of_every_bundled_model_equal_those_of_the_libraries(source: str) -> None:
    assert mismatches(source) == {}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", causal_model_types())
def test_prepared_parameters_of_every_default_config_equal_those_of_the_libraries(model_type: str) -> None:
    try:
        case_of(model_type)
    except Exception as error:
        pytest.skip(f"transformers cannot build the default config: {error}"[:200])
    assert mismatches(model_type) == {}
