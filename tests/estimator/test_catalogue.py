"""The bundled models against the counts that others published, and against what the installed transformers builds now."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from estimator.inventory import Inventory, TensorRole
from estimator.inventory_codec import decode, encode
from estimator.sources import bounds, catalogue
from estimator.sources.cache import content_hash
from estimator.sources.catalogue import CatalogueEntry, CatalogueModel
from estimator.sources.checkpoint import method_of
from estimator.sources.process import Inspector
from estimator.sources.resolve import ModelSource, resolve

ENTRIES = catalogue.entries()
# Of each architecture the entry with the fewest parameters, so that the run stays short.
SAMPLE = tuple({e.model_type: e for e in sorted(ENTRIES, key=lambda e: -e.num_parameters)}.values())


def models() -> list[CatalogueModel]:
    return [catalogue.load(entry.file) for entry in ENTRIES]


def num_tied(inventory: Inventory) -> int:
    return sum(r.num_elements * r.num_copies for r in inventory.rows if r.tied_to and r.role is TensorRole.PARAMETER)


def evaluated(text: str) -> int:
    """A product of integers such as `36*2048*2048`."""
    return math.prod(int(factor) for factor in text.split("*"))


def test_the_catalogue_holds_at_least_sixty_models_of_twenty_five_architectures() -> None:
    assert len(ENTRIES) >= 60
    assert len({entry.model_type for entry in ENTRIES}) >= 25


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "gemma2",
        "gemma3",
        "phi",
        "phi3",
        "phimoe",
        "falcon",
        "gpt2",
        "gpt_neox",
        "opt",
        "bloom",
        "starcoder2",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "olmo2",
        "granite",
        "stablelm",
        "cohere",
        "mamba",
        "smollm3",
    ],
)
def test_an_architecture_that_people_fine_tune_is_there(model_type: str) -> None:
    assert any(entry.model_type == model_type for entry in ENTRIES)


def test_a_published_count_said_to_be_exact_is_the_number_of_parameters() -> None:
    exact = [m for m in models() if m.published.agreement == "exact"]
    assert len(exact) > 90
    assert {m.id: m.inventory.num_parameters for m in exact} == {m.id: m.published.num_parameters for m in exact}


def test_a_published_count_with_a_tied_head_counted_twice_is_that_much_larger() -> None:
    twice = [m for m in models() if m.published.agreement == "exact (tied weights counted twice)"]
    assert len(twice) >= 8
    assert all(m.inventory.num_parameters + num_tied(m.inventory) == m.published.num_parameters for m in twice)


def test_a_named_difference_accounts_for_every_scalar_of_a_published_count() -> None:
    different = [m for m in models() if m.published.agreement == "difference"]
    assert len(different) >= 16
    for model in different:
        named = sum(evaluated(count) for count in model.published.differences.values())
        assert model.inventory.num_parameters + named == model.published.num_parameters, model.id


def test_every_other_published_count_is_larger_and_says_why() -> None:
    """Multi-token-prediction layers, scales of FP8 checkpoints: in the file, not in the model."""
    others = [m for m in models() if m.published.agreement and m.published.agreement.startswith("attributed: ")]
    assert all(m.published.num_parameters and m.published.num_parameters > m.inventory.num_parameters for m in others)
    known = {"exact", "exact (tied weights counted twice)", "difference", None}
    assert {m.published.agreement for m in models()} - known == {m.published.agreement for m in others}


def test_every_entry_names_the_source_of_its_values() -> None:
    assert all(m.source for m in models())
    assert all(m.published.source for m in models() if m.published.num_parameters)


def test_the_type_of_a_checkpoint_whose_config_names_none_has_a_source() -> None:
    silent = [m for m in models() if not any(m.config.get(name) for name in ("dtype", "torch_dtype"))]
    stated = {m.id for m in silent if m.weights is not None}
    assert all(m.weights.source and m.inventory.checkpoint_dtype is m.weights.dtype for m in silent if m.weights is not None)
    assert all(m.weights is None for m in models() if m.id not in stated)
    # What no source says stays unknown, and an answer says that float32 is assumed.
    unknown = {m.id for m in silent if m.weights is None and m.inventory.checkpoint_dtype is None}
    assert unknown == {"codellama/CodeLlama-70b-hf", "MiniMaxAI/MiniMax-M2.5"}


def test_the_sizes_of_published_files_are_those_of_the_type() -> None:
    """Files hold a little more than parameters: masks (GPT-2), heads of pre-training (BERT); BLOOM's card counts in GiB."""
    units = {"GB": 10**9, "MB": 10**6}
    sizes = {m.id: re.search(r"([\d.]+) ?(GB|MB)", m.weights.source) for m in models() if m.weights is not None}
    measured = {name: float(size[1]) * units[size[2]] for name, size in sizes.items() if size is not None}
    assert len(measured) == 20
    for model in models():
        if model.id in measured and model.weights is not None:
            per_parameter = measured[model.id] / model.inventory.num_parameters
            assert per_parameter == pytest.approx(model.weights.dtype.itemsize, rel=0.11), model.id


def test_quantized_checkpoints_are_of_the_kind_that_their_publishers_name() -> None:
    """FP8 by DeepSeek, MiniMax, Moonshot and Qwen; MXFP4 by OpenAI (transformers, quantizers/quantizer_mxfp4.py)."""
    kinds = {m.id: method_of(m.config) for m in models()}
    assert {name for name, kind in kinds.items() if kind == "mxfp4"} == {"openai/gpt-oss-20b"}
    assert {name.split("/")[0] for name, kind in kinds.items() if kind == "fp8"} == {"deepseek-ai", "MiniMaxAI", "moonshotai", "Qwen"}
    assert set(kinds.values()) == {None, "fp8", "mxfp4"}
    for kind in ("fp8", "mxfp4"):
        assert kind in pytest.importorskip("transformers.quantizers.auto").AUTO_QUANTIZER_MAPPING


def test_every_index_line_agrees_with_its_file() -> None:
    for entry in ENTRIES:
        model = catalogue.load(entry.file)
        assert (entry.id, entry.num_parameters, entry.model_class) == (
            model.id,
            model.inventory.num_parameters,
            model.inventory.model_class,
        )
    assert {e.file for e in ENTRIES} | {catalogue.INDEX} == {path.name for path in catalogue.DIRECTORY.glob("*.json")}


def test_every_config_is_within_the_bounds_for_strangers_configs() -> None:
    for model in models():
        bounds.check(dict(model.config))


def test_every_inventory_survives_encoding() -> None:
    for model in models():
        encoded = json.loads(json.dumps(encode(model.inventory)))
        assert encode(decode(encoded)) == encoded


def test_an_id_is_found_in_any_case_and_by_its_former_name() -> None:
    assert resolve("META-LLAMA/llama-3.1-8b").id == "meta-llama/Llama-3.1-8B"
    assert resolve("meta-llama/Meta-Llama-3.1-8B").id == "meta-llama/Llama-3.1-8B"
    assert resolve("gpt2").inventory.num_parameters == 124_439_808


def test_a_catalogue_model_needs_neither_framework_nor_network() -> None:
    program = (
        "import sys; from estimator.sources.resolve import resolve; r = resolve('meta-llama/Llama-3.1-8B', 'main'); "
        "print(r.inventory.num_parameters, r.source, sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'transformers', 'huggingface_hub', 'numpy', 'httpx2'}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert run.stdout.split() == ["8030261248", "catalogue", "[]"]


def test_loading_a_catalogue_model_takes_less_than_fifty_milliseconds() -> None:
    catalogue.load.cache_clear()
    durations = []
    for entry in sorted(ENTRIES, key=lambda e: (catalogue.DIRECTORY / e.file).stat().st_size)[-5:]:
        start = time.perf_counter()
        assert resolve(entry.id).source is ModelSource.CATALOGUE
        durations.append(time.perf_counter() - start)
    assert sorted(durations)[2] < 0.05


@pytest.mark.parametrize("entry", SAMPLE, ids=lambda entry: entry.model_type)
def test_an_inventory_is_what_the_installed_transformers_builds(entry: CatalogueEntry, inspector: Inspector) -> None:
    check_against_worker(entry, inspector)


@pytest.mark.slow
def test_every_inventory_is_what_the_installed_transformers_builds(inspector: Inspector) -> None:
    for entry in ENTRIES:
        check_against_worker(entry, inspector)


def check_against_worker(entry: CatalogueEntry, inspector: Inspector) -> None:
    bundled = catalogue.load(entry.file)
    built = decode(inspector.run("inventory", {"config": bundled.config, "content_hash": content_hash(bundled.config)}))
    if bundled.weights is not None:
        assert built.checkpoint_dtype is None
        built = replace(built, checkpoint_dtype=bundled.weights.dtype)
    if built.transformers_version != bundled.inventory.transformers_version:
        pytest.skip(f"compiled with transformers {bundled.inventory.transformers_version}: run `make catalogue`")
    assert built.rows == bundled.inventory.rows
    expected, found = encode(bundled.inventory), encode(built)
    assert {k: v for k, v in found.items() if k != "content_hash"} == {k: v for k, v in expected.items() if k != "content_hash"}
