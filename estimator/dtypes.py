"""Element types and their widths."""

from enum import StrEnum

from estimator.errors import UnknownNameError


class DType(StrEnum):
    """Element types, spelled as torch spells them."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT8_E4M3FN = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"
    COMPLEX64 = "complex64"

    @property
    def itemsize(self) -> int:
        """Width of one element [bytes]."""
        return _ITEMSIZE[self]

    @property
    def is_floating_point(self) -> bool:
        return self.value.startswith(("float", "bfloat"))

    @property
    def is_half(self) -> bool:
        """Whether it is one of the two 16-bit floating-point types."""
        return self in (DType.FLOAT16, DType.BFLOAT16)


_ITEMSIZE = {
    DType.FLOAT64: 8,
    DType.FLOAT32: 4,
    DType.FLOAT16: 2,
    DType.BFLOAT16: 2,
    DType.FLOAT8_E4M3FN: 1,
    DType.FLOAT8_E5M2: 1,
    DType.INT64: 8,
    DType.INT32: 4,
    DType.INT16: 2,
    DType.INT8: 1,
    DType.UINT8: 1,
    DType.BOOL: 1,
    DType.COMPLEX64: 8,
}

_ALIASES = {
    "fp32": DType.FLOAT32,
    "float": DType.FLOAT32,
    "fp16": DType.FLOAT16,
    "half": DType.FLOAT16,
    "bf16": DType.BFLOAT16,
    "double": DType.FLOAT64,
}


def parse_dtype(name: str, field: str = "dtype") -> DType:
    """The element type of a name as users write it: `bfloat16`, `torch.bfloat16`, `bf16`.

    Raises:
        UnknownNameError: if the name is none of torch's types that occur in checkpoints.
    """
    short = name.strip().removeprefix("torch.").lower()
    if short in _ALIASES:
        return _ALIASES[short]
    try:
        return DType(short)
    except ValueError:
        raise UnknownNameError.of(field, name, [d.value for d in DType]) from None
