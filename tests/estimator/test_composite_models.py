"""Text decoders inside another model: the Trainer switches the cache off in the config of the whole, and most decoders read their own."""

import json
from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from estimator.introspect.build import build
from estimator.introspect.inventory import inspect
from estimator.phases import Phase
from estimator.stack import Stack
from tests.estimator.test_trace import STEP
from tests.oracle import estimates, traces
from tests.oracle.models import COMPOSITES
from tests.oracle.run import step

CHECKPOINTING = {"kept": None, "checkpointed": False}
SIZE = (3, 48, 4)
CONFIGS: Mapping[str, dict[str, object]] = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 2}}
"""Gemma 3 has layers of both kinds."""

# Scalars and one vector of positions; what the cache holds is a tenth of what layers keep with eager attention.
TOLERANCE = 0.001

# Composite types of transformers whose text decoder has closed forms at their defaults, and which build without other packages.
SAMPLE = ("gemma3", "got_ocr2", "idefics3", "llava", "mistral3")
OTHERS = (
    *("audioflamingo3", "cohere2_vision", "deepseek_vl", "deepseek_vl_hybrid", "fun_asr_nano", "glmasr", "granite_speech"),
    *("granite_speech_plus", "idefics2", "internvl", "janus", "kimi_k25", "lighton_ocr", "llava_next", "llava_next_video"),
    *("llava_onevision", "moss_transcribe_diarize", "musicflamingo", "ovis2", "pp_chart2table", "qianfan_ocr", "qwen2_audio"),
    *("qwen3_asr", "shieldgemma2", "smolvlm", "vibevoice", "vibevoice_asr", "video_llama_3", "video_llava", "vipllava", "voxtral"),
)


Cell = tuple[str, str, str, str]
CELLS: tuple[Cell, ...] = tuple(
    (family, attention, mode, scheme)
    for (family, attention), mode, scheme in product(
        (("gemma3", "eager"), ("gemma3", "sdpa"), ("got_ocr2", "eager")),
        ("full_bf16", "lora_bf16_fp32_autocast", "qlora_prepared_autocast"),
        CHECKPOINTING,
    )
)
FEW = (
    ("gemma3", "eager", "lora_bf16_fp32_autocast", "kept"),
    ("gemma3", "sdpa", "full_bf16", "kept"),
    ("got_ocr2", "eager", "qlora_prepared_autocast", "kept"),
    ("got_ocr2", "eager", "full_bf16", "checkpointed"),
)


def assert_equal(family: str, attention: str, mode: str, scheme: str) -> None:
    options: dict[str, Any] = {"gc": CHECKPOINTING[scheme], "attention": attention, "config": CONFIGS.get(family)}
    real = step(family, mode, *SIZE, **options).first
    traced = traces.live_bytes(traces.timeline(family, mode, *SIZE, **options))
    assert {phase: traced[phase] for phase in STEP} == {phase: real[phase].live_bytes for phase in STEP}
    exact = step(family, mode, *SIZE, granularity_bytes=1, **options).first
    said = estimates.live_bytes(family, mode, *SIZE, **options)
    for phase in (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD):
        assert said[phase] == pytest.approx(exact[phase.value].live_bytes, rel=TOLERANCE)


@pytest.mark.parametrize("cell", FEW)
def test_closed_form_and_trace_peak_where_the_real_step_does(cell: Cell) -> None:
    assert_equal(*cell)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell not in FEW])
def test_closed_form_and_trace_peak_where_the_real_step_does_in_every_mode(cell: Cell) -> None:
    assert_equal(*cell)


class _Reached(Exception):
    pass


def _is_told_to_keep_none(name: str) -> bool:
    """Whether a model whose config says `use_cache = False` hands that on to its text decoder."""
    data = json.loads(json.dumps(CONFIG_MAPPING[name]().to_dict(), default=str)) | {"model_type": name}
    _, model = build(data, torch.bfloat16)
    model.config.use_cache = False
    prefix = inspect(data, name).layers_prefix
    assert prefix is not None
    decoder = model.get_submodule(prefix.rpartition(".")[0])
    told: list[object] = []

    def stop(_: object, __: object, named: dict[str, object]) -> None:
        told.append(named.get("use_cache"))
        raise _Reached

    decoder.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(_Reached):
        model.train()(input_ids=torch.full((1, 8), 5, device="meta"))
    assert decoder.config.use_cache
    return told == [False]


def _assert_the_table_is_right(name: str) -> None:
    assert Stack().keeps_cache_in_training("", name, is_composite=True, by_trl=False) is not _is_told_to_keep_none(name)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_decoder_keeps_a_cache_unless_it_is_told_not_to(name: str) -> None:
    _assert_the_table_is_right(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_decoder_keeps_a_cache_unless_it_is_told_not_to(name: str) -> None:
    _assert_the_table_is_right(name)


def test_trl_and_models_of_one_part_keep_no_cache() -> None:
    assert COMPOSITES.keys() == {"gemma3", "got_ocr2"}
    assert not Stack().keeps_cache_in_training("gemma3_text", "gemma3", is_composite=True, by_trl=True)
    assert not Stack().keeps_cache_in_training("gemma3_text", "gemma3_text", is_composite=False, by_trl=False)
