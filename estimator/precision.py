"""Which tensors stay in float32 although a 16-bit type was asked for."""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from estimator.dtypes import DType
from estimator.inventory import Inventory
from estimator.stack import Stack


def kept_in_float32(inventory: Inventory, dtype: DType, *, is_quantized: bool, stack: Stack) -> Callable[[str], bool]:
    """A test for names of tensors that loading leaves in float32.

    `_keep_in_fp32_modules` counts under float16 only, the strict list under bfloat16 too; an entry counts wherever it occurs in the name.

    Args:
        inventory: holds both lists of the model's class.
        dtype: what the model is loaded as.
        is_quantized: whether bitsandbytes loads it.
        stack: library versions.

    Source: transformers, modeling_utils.py, PreTrainedModel._get_dtype_plan; core_model_loading.py, build_glob_alternation.
    """
    return kept_in_float32_names(
        inventory.keep_in_fp32_modules, inventory.keep_in_fp32_modules_strict, dtype, is_quantized=is_quantized, stack=stack
    )


def kept_in_float32_names(
    modules: Iterable[str], strict_modules: Iterable[str], dtype: DType, *, is_quantized: bool, stack: Stack
) -> Callable[[str], bool]:
    """The same from the two lists of a model's class."""
    kept: tuple[str, ...] = ()
    if dtype is DType.FLOAT16 or (is_quantized and dtype.is_half and stack.quantized_loads_always_keep_float32):
        kept += tuple(modules)
    if dtype.is_half:
        kept += tuple(strict_modules)
    if not kept:
        return lambda name: False
    pattern = _pattern(kept)
    return lambda name: pattern.search(name) is not None


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{name.replace('*', '.*')})" for name in names))
