"""PYTORCH_CUDA_ALLOC_CONF as torch itself reads it."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from estimator.allocator_settings import AllocatorSettings, parse_settings
from estimator.errors import RequestError, UnknownNameError
from estimator.units import MIB

# `AcceleratorAllocatorConfig::roundup_power2_divisions(size_t)`: the options are parsed in libc10, which CPU builds have too.
_DIVISIONS = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig24roundup_power2_divisionsEm"


@pytest.fixture(scope="module")
def torchs_divisions() -> Iterator[Callable[[str], tuple[int, ...]]]:
    """What torch makes of an option string: divisions of each interval of sizes."""
    function = getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so")), _DIVISIONS)
    function.restype, function.argtypes = ctypes.c_size_t, [ctypes.c_size_t]

    def divisions(text: str) -> tuple[int, ...]:
        torch._C._accelerator_setAllocatorSettings(text)
        return tuple(function(MIB << interval) for interval in range(16))

    yield divisions
    torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20")


@pytest.mark.parametrize(
    "value",
    [
        "4",
        "1",
        "[256:1,512:2,1024:4,>:8]",
        "[1:2,8:4,32:8,>:2]",
        "[>:2]",
        "[]",
        "[>:2,8:4]",
        "[131072:2]",
        "[128:1,256:0,512:4]",
        "[2:4,>:0]",
    ],
)
def test_divisions_are_those_that_torch_reads(value: str, torchs_divisions: Callable[[str], tuple[int, ...]]) -> None:
    text = f"roundup_power2_divisions:{value}"
    assert parse_settings(text).roundup_power2_divisions == torchs_divisions(text)


@pytest.mark.parametrize(
    "text",
    [
        "max_split_size_mb:10",
        "max_split_size_mb:many",
        "max_non_split_rounding_mb:19",
        "large_segment_size_mb:10",
        "large_segment_size_mb:50,max_split_size_mb:40",
        "max_split_size_mb:40,large_segment_size_mb:50",
        "garbage_collection_threshold:1.2",
        "garbage_collection_threshold:0",
        "garbage_collection_threshold:high",
        "roundup_power2_divisions:3",
        "roundup_power2_divisions:0",
        "roundup_power2_divisions:[3:2]",
        "roundup_power2_divisions:[0:2]",
        "roundup_power2_divisions:[4:3]",
        "expandable_segments:true",
        "expandable_segments",
        "expandable_segments:True,max_split_size_mb",
        "roundup_power2_divisions:[4:2",
    ],
)
def test_what_torch_refuses_is_refused(text: str, torchs_divisions: Callable[[str], tuple[int, ...]]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        torchs_divisions(text)
    with pytest.raises(RequestError, match="PYTORCH_CUDA_ALLOC_CONF"):
        parse_settings(text)


def test_an_unknown_option_is_refused_with_those_that_are_known() -> None:
    # torch, test/test_cuda.py, test_allocator_settings refuses the same string
    with pytest.raises(UnknownNameError, match=r"'foo' is not known; accepted: .*expandable_segments.*max_split_size_mb"):
        parse_settings("foo:1,bar:2")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("backend:cudaMallocAsync", "another allocator"),
        ("throw_on_cudamalloc_oom:True", "not modelled"),
        ("throw_on_cudamalloc_oom:yes", "neither True nor False"),
        ("per_process_memory_fraction:1.5", "from 0 to 1"),
        ("max_split_size_mb:40,", "follows the value"),
        ("roundup_power2_divisions:[4]", "not size:divisions"),
    ],
)
def test_what_a_replay_would_get_wrong_is_refused(text: str, part: str) -> None:
    with pytest.raises(RequestError, match=part):
        parse_settings(text)


def test_options_reach_the_settings() -> None:
    text = "large_segment_size_mb:32, max_split_size_mb:64,garbage_collection_threshold:0.6,expandable_segments:True"
    assert parse_settings(text) == AllocatorSettings(
        large_segment_bytes=32 * MIB,
        max_split_bytes=64 * MIB,
        max_non_split_rounding_bytes=32 * MIB,
        garbage_collection_threshold=0.6,
        expandable_segments=True,
    )
    assert parse_settings("per_process_memory_fraction:0.5").per_process_memory_fraction == 0.5
    assert parse_settings("max_non_split_rounding_mb:40").max_non_split_rounding_bytes == 40 * MIB


def test_options_without_bearing_on_the_device_change_nothing() -> None:
    text = "pinned_use_background_threads:True,backend:native,release_lock_on_cudamalloc:True,throw_on_cudamalloc_oom:False"
    assert parse_settings(text) == parse_settings("") == AllocatorSettings()


def _power2_div(size: int, divisions: int) -> int:
    """torch, test/test_cuda.py, TestCuda.power2_div."""
    power = 1
    while power < size:
        power *= 2
    if power == size:
        return power
    step = power / 2 / divisions
    rounded = power / 2
    while rounded < size:
        rounded += step
    return int(rounded)


@pytest.mark.parametrize(
    ("text", "num_floats", "divisions"),
    [
        # torch, test/test_cuda.py, test_allocator_settings, test_roundup_power2_divisions: settings, sizes and what they become
        ("roundup_power2_divisions:4", 21 * MIB, 4),
        ("roundup_power2_divisions:[64:8,128:2,256:2,512:2,1024:1,>:1]", 21 * MIB, 8),
        ("roundup_power2_divisions:[64:8,128:2,256:2,512:2,1024:1,>:1]", 100 * MIB, 2),
        ("roundup_power2_divisions:[128:1,256:0,512:4]", 130 * MIB, 4),
    ],
)
def test_requests_are_rounded_as_torchs_own_tests_expect(text: str, num_floats: int, divisions: int) -> None:
    assert parse_settings(text).rounded(4 * num_floats) == _power2_div(4 * num_floats, divisions)


@pytest.mark.parametrize("text", ["", "roundup_power2_divisions:1", "roundup_power2_divisions:[128:1,256:0,512:4]"])
def test_without_divisions_requests_are_rounded_to_512_bytes(text: str) -> None:
    settings = parse_settings(text)
    for size in (1, 511, 512, 513, 4 * 21 * 125 * 125, 4 * 67 * MIB):
        assert settings.rounded(size) == -(-size // 512) * 512


@given(st.integers(1, 2**37), st.sampled_from([1, 2, 4, 16, 64]))
def test_rounding_up_is_idempotent_and_bounded(size: int, divisions: int) -> None:
    settings: Any = parse_settings(f"roundup_power2_divisions:{divisions}")
    rounded = settings.rounded(size)
    assert rounded % 512 == 0
    assert size <= rounded == settings.rounded(rounded)
    assert rounded - size < max(512, size / divisions if divisions > 1 else 0)
