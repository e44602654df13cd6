"""Filters: words in the usual grammar, and messages that name what was wrong."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.errors import RequestError
from estimator.gpu_filter import GpuFilter, matching
from estimator.gpus import all_gpus, find_gpu
from estimator.offers import bundled


def ids(text: str) -> set[str]:
    return {gpu.id for gpu in matching(GpuFilter.parse(text))}


def test_an_empty_filter_lets_all_cards_through() -> None:
    assert ids("") == {gpu.id for gpu in all_gpus()}


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("24GB..80GB", "rtx4090 a100-80 v100-32", "t4 h200-sxm rtx3080-12"),
        ("24..80GB", "rtx4090 a100-80", "t4 h200-sxm"),
        ("..24GB", "t4 rtx3090", "a40"),
        ("40GB..", "a100-40 b300", "rtx5090"),
        ("24GB", "l4 a10g", "rtx5090 a40"),
        ("24gb..", "l4", "t4"),
        ("bf16", "rtx3090 mi300x", "t4 v100-16 p100-16 rtx2080ti"),
        ("fp8", "l4 h100-sxm", "a100-80 a40"),
        ("sm80", "a100-80 b200", "t4"),
        ("sm_89", "l40s", "a100-80"),
        ("cc8.6", "a40 l4", "a100-80"),
        ("nvidia", "t4", "mi300x"),
        ("amd", "mi300x", "t4"),
        ("runpod", "rtx4090", "a10g"),
        ("kaggle", "t4 p100-16", "l4"),
        ("gcp", "h100-sxm", "rtx4090"),
        ("aws gcp", "a10g p4", "rtx4090"),
        ("a100", "a100-40 a100-80", "a40"),
        ("a100:80GB", "a100-80", "a100-40"),
        ("a100, rtx4090", "a100-40 rtx4090", "l4"),
        ("..$0.5 1", "rtx3090 l4", "h100-sxm b300"),
        ("24GB..80GB 1..8 bf16 runpod", "rtx4090 a100-80", "t4 mi300x"),
    ],
)
def test_words_choose_cards(text: str, inside: str, outside: str) -> None:
    assert set(inside.split()) <= ids(text)
    assert not set(outside.split()) & ids(text)


@pytest.mark.parametrize(
    ("text", "counts"), [("", (1, 2, 4, 8)), ("1..4", (1, 2, 4)), ("2..", (2, 4, 8)), ("..2", (1, 2)), ("3", (3,)), ("a100:2", (2,))]
)
def test_counts_are_ranges(text: str, counts: tuple[int, ...]) -> None:
    assert GpuFilter.parse(text).counts() == counts


def test_a_price_is_for_all_cards_of_an_offer() -> None:
    wanted = GpuFilter.parse("..$1")
    assert wanted.accepts(find_gpu("rtx4090"), 2)  # 2 × 0.35 at vast
    assert not wanted.accepts(find_gpu("rtx4090"), 8)
    assert not wanted.accepts(find_gpu("gb200"), 1)  # without an offer


def test_a_provider_must_offer_that_number_where_its_prices_are_known() -> None:
    wanted = GpuFilter.parse("lambda")
    assert wanted.accepts(find_gpu("a6000"), 4)
    assert not wanted.accepts(find_gpu("a6000"), 8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abacus", "'abacus' is not known"),
        ("80GB..24GB", "empty"),
        ("24GB 48GB", "again"),
        ("0..4", "out of bounds"),
        ("..", "not known"),
        ("$", "not accepted"),
        ("4..2", "empty"),
    ],
)
def test_what_is_wrong_is_said_with_the_word(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as error:
        GpuFilter.parse(text, field="hardware.filter")
    assert error.value.errors[0].field == "hardware.filter"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"memory": "much"}, "memory"),
        ({"count": "0"}, "count"),
        ({"price": "cheap"}, "price"),
        ({"min_compute_capability": "8"}, "min_compute_capability"),
        ({"provider": "nobody"}, "provider"),
        ({"vendor": "intel"}, "vendor"),
        ({"text": "abacus"}, "filter"),
    ],
)
def test_named_parts_are_refused_by_their_names(values: dict[str, str], field: str) -> None:
    with pytest.raises(RequestError) as error:
        GpuFilter.of(**values)  # type: ignore[arg-type]
    assert error.value.errors[0].field == field


def test_named_parts_mean_the_same_as_words() -> None:
    named = GpuFilter.of(memory="24GB..80GB", count="1..8", bf16=True, provider="runpod", min_compute_capability="8.6")
    assert named == GpuFilter.parse("24GB..80GB 1..8 bf16 runpod sm86")


@pytest.mark.parametrize("gpu", [gpu.id for gpu in all_gpus()])
def test_every_card_is_found_by_its_id(gpu: str) -> None:
    assert ids(gpu) == {gpu}


def test_no_provider_is_named_like_a_card() -> None:
    assert not {gpu.id for gpu in all_gpus()} & set(bundled().providers)


@given(st.text(alphabet="0123456789.,: $GBibsmcf_+-runpoda", max_size=40))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    with suppress(RequestError):
        matching(GpuFilter.parse(text))
    with suppress(RequestError):
        GpuFilter.of(memory=text, count=text, price=text, min_compute_capability=text, provider=text)
