"""Which weights bitsandbytes replaces, and what it stores for each."""

import math
import re
from dataclasses import dataclass
from functools import lru_cache

from estimator.dtypes import DType
from estimator.errors import RequestError
from estimator.inventory import Inventory, ModuleKind, TensorRole
from estimator.recipe import Quantization
from estimator.stack import Stack
from estimator.units import ceil_div

# Weights that share one absmax. BitsAndBytesConfig has no field for it.
# Source: bitsandbytes, nn/modules.py, Params4bit.__new__.
BLOCK_SIZE = 64
# First-level absmax values that share one second-level absmax.
# Source: bitsandbytes, functional.py, quantize_4bit (quantize_blockwise of absmax, blocksize=256).
NESTED_BLOCK_SIZE = 256
# Values a 4-bit code can take, and an 8-bit one: the lengths of the code tables, of which every Linear has its own.
# Source: bitsandbytes, functional.py, get_4bit_type and create_dynamic_map.
CODE_LENGTH = 16
NESTED_CODE_LENGTH = 256
NESTED_CODE = "nested_code"
"""Name of the table of 8-bit codes among the parts of a weight's state."""

# Classes derived from nn.Linear in transformers' and torch's code: PEFT adapts them, bitsandbytes under transformers 5 leaves them.
# Source: transformers, models/{falcon,llama4,phimoe,deepseek_v4}; torch, nn/modules/linear.py.
LINEAR_SUBCLASSES = frozenset(
    {
        *("FalconLinear", "NonDynamicallyQuantizableLinear", "Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear"),
        *("EsmFoldLinear", "IdeficsDecoupledLinear"),
    }
)

_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePart:
    """One tensor that bitsandbytes keeps beside a packed weight."""

    name: str
    dtype: DType
    num_elements: int

    @property
    def raw_bytes(self) -> int:
        """Its storage [bytes]."""
        return self.num_elements * self.dtype.itemsize


def packed_bytes(quantization: Quantization, num_elements: int) -> int:
    """Storage of one quantized weight, without its quantization state.

    Two 4-bit values share a byte, and bytes are gathered into elements of `storage_dtype`; LLM.int8 takes one byte per value.

    Args:
        quantization: kind and storage type.
        num_elements: logical scalars of the weight.

    Returns:
        storage of the packed tensor [bytes].

    Source: bitsandbytes, backends/cuda/ops.py, quantize_4bit; functional.py, int8_vectorwise_quant.
    """
    return ceil_div(num_elements, 2) if quantization.kind.is_4bit else num_elements


def check_packing(quantization: Quantization, name: str, num_elements: int) -> None:
    """Whether the packed bytes of a weight are whole elements of the storage type.

    Where they are not, bitsandbytes raises on the CPU, where it views the bytes as that type; on CUDA it writes them all into a tensor
    that holds fewer.

    Raises:
        RequestError: if they are not.

    Source: bitsandbytes, backends/default/ops.py and backends/cuda/ops.py, quantize_4bit.
    """
    num_bytes = packed_bytes(quantization, num_elements)
    if quantization.kind.is_4bit and num_bytes % quantization.storage_dtype.itemsize:
        raise RequestError(
            f"quantization.bnb_4bit_quant_storage: {quantization.storage_dtype.value!r} cannot hold {name}, which packs into "
            f"{num_bytes} bytes, no whole number of its elements; accepted for every weight: int8, uint8",
            field="quantization.bnb_4bit_quant_storage",
        )


def quantization_state(quantization: Quantization, num_elements: int, out_features: int) -> tuple[StatePart, ...]:
    """Everything bitsandbytes keeps beside one packed weight.

    Blocks run over the flattened weight and cross its rows; a partial block counts whole. With double quantization the
    absmax values become bytes and get an absmax, a code table and an offset of their own.

    Args:
        quantization: kind, and whether absmax is quantized again.
        num_elements: logical scalars of the weight.
        out_features: rows of the weight, each with one scale under LLM.int8.

    Returns:
        one part per tensor.

    Source: bitsandbytes, functional.py, quantize_4bit, get_4bit_type and quantize_blockwise; nn/modules.py, Int8Params._quantize.
    """
    if not quantization.kind.is_4bit:
        return (StatePart(name="SCB", dtype=DType.FLOAT32, num_elements=out_features),)
    num_blocks = ceil_div(num_elements, BLOCK_SIZE)
    code = StatePart(name="code", dtype=DType.FLOAT32, num_elements=CODE_LENGTH)
    if not quantization.double_quant:
        return StatePart(name="absmax", dtype=DType.FLOAT32, num_elements=num_blocks), code
    return (
        StatePart(name="absmax", dtype=DType.UINT8, num_elements=num_blocks),
        code,
        StatePart(name="nested_absmax", dtype=DType.FLOAT32, num_elements=ceil_div(num_blocks, NESTED_BLOCK_SIZE)),
        StatePart(name=NESTED_CODE, dtype=DType.FLOAT32, num_elements=NESTED_CODE_LENGTH),
        StatePart(name="offset", dtype=DType.FLOAT32, num_elements=1),
    )


def state_bits_per_parameter(*, double_quant: bool) -> float:
    """What absmax values cost per weight once code tables and offset are negligible [bits].

    8/64 + 32/(64·256) ≈ 0.127 with double quantization, 32/64 = 0.5 without.

    Source: QLoRA (arXiv 2305.14314), section 3, and the block sizes above.
    """
    if not double_quant:
        return 32 / BLOCK_SIZE
    return 8 / BLOCK_SIZE + 32 / (BLOCK_SIZE * NESTED_BLOCK_SIZE)


def is_linear(kind: ModuleKind, module_class: str) -> bool:
    """Whether the module is an nn.Linear, or of a class derived from it."""
    return kind is ModuleKind.LINEAR or module_class in LINEAR_SUBCLASSES


def is_replaceable(kind: ModuleKind, module_class: str, stack: Stack) -> bool:
    """Whether bitsandbytes replaces modules of this type at all.

    Source: transformers, integrations/bitsandbytes.py, replace_with_bnb_linear.
    """
    exact = kind in (ModuleKind.LINEAR, ModuleKind.CONV1D)
    return exact or (stack.quantizes_linear_subclasses and is_linear(kind, module_class))


def skipped_modules(inventory: Inventory, quantization: Quantization) -> tuple[str, ...]:
    """The keys whose modules stay as they are.

    By default the output embedding, all tied tensors and the module of the last parameter; `llm_int8_skip_modules` replaces these.
    Modules to keep in float32 are always added.

    Source: transformers, quantizers/base.py, get_keys_to_not_convert and get_modules_to_not_convert.
    """
    if quantization.skip_modules is not None:
        keys = set(quantization.skip_modules)
    else:
        keys = {name.removesuffix(".weight") for name in (*inventory.tied_names, _last_parameter(inventory))}
        if inventory.output_embedding is not None:
            keys.add(inventory.output_embedding)
    return tuple(sorted(keys | set(inventory.keep_in_fp32_modules)))


def _last_parameter(inventory: Inventory) -> str:
    """Full name of the last parameter. A bias's name skips nothing, because only `.weight` is taken off it."""
    module = inventory.last_parameter_module
    names = [name for row in inventory.rows if row.role is TensorRole.PARAMETER for name in row.names()]
    return next((name for name in reversed(names) if name.rpartition(".")[0] == module), module)


def is_skipped(module: str, keys: tuple[str, ...], stack: Stack) -> bool:
    """Whether a module is left unquantized because a key names it.

    Args:
        module: full name of the module.
        keys: what `skipped_modules` returned.
        stack: decides how keys are matched.

    Source: transformers 5, quantizers/quantizers_utils.py, should_convert_module; 4.x, integrations/bitsandbytes.py,
    _replace_with_bnb_linear.
    """
    if stack.skips_by_prefix_or_suffix:
        return any(module.endswith(key) for key in keys) or _start_pattern(keys).match(module) is not None
    return module.rpartition(".")[2] in keys or any(module == key or f"{key}." in module for key in keys)


@lru_cache(maxsize=256)
def _start_pattern(keys: tuple[str, ...]) -> re.Pattern[str]:
    """Matches a name that starts with a key and ends, or goes on with a new component."""
    try:
        return re.compile("|".join(f"(?:{key}){_BOUNDARY}" for key in keys) or r"(?!)")
    except re.error as error:
        raise RequestError(
            f"llm_int8_skip_modules: not a regular expression: {error}", field="quantization.llm_int8_skip_modules"
        ) from None


def quantized_bytes(quantization: Quantization, shape: tuple[int, ...], *, is_conv1d: bool = False) -> int:
    """Packed weight and quantization state together, before the allocator rounds each tensor [bytes].

    Args:
        quantization: kind, double quantization, storage type.
        shape: (out, in) of a Linear, (in, out) of a Conv1D.
        is_conv1d: whether the shape is that of a Conv1D, which is transposed before it is quantized.
    """
    n = math.prod(shape)
    state = quantization_state(quantization, n, shape[1] if is_conv1d else shape[0])
    return packed_bytes(quantization, n) + sum(part.raw_bytes for part in state)
