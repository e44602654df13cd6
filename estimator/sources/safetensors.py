"""Names, types and shapes of the tensors in a repository's safetensors files, read from the headers alone.

A file starts with eight bytes that hold the header's length, little endian, and the header: JSON from names to `dtype`, `shape` and
`data_offsets`. Large models are split; `model.safetensors.index.json` lists the parts.

Source: safetensors, README.md, "Format"; huggingface_hub, hf_api.py, parse_safetensors_file_metadata and get_safetensors_metadata.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

from estimator.dtypes import DType
from estimator.errors import ModelNotFoundError, SourceError
from estimator.inventory import ModuleKind, TensorRole, TensorRow
from estimator.inventory_codec import decode_row, encode_row
from estimator.rows import Tensor, group

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FIRST_BYTES = 131_072
"""Asked for at first: nearly every header is shorter (97 % are below 100 kB, says huggingface_hub)."""
MAX_HEADER_BYTES = 25_000_000
"""Source: huggingface_hub, constants.py, SAFETENSORS_MAX_HEADER_LENGTH."""
MAX_INDEX_BYTES = 2**25
MAX_FILES = 512
MAX_TENSORS = 500_000
_AT_ONCE = 8
_LENGTH_BYTES = 8

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")
_MAX_NAME = 512
_MAX_BYTES = 2**50

# What the format has that torch's checkpoints use; everything else counts as so many bytes.
_DTYPES = MappingProxyType(
    {
        "F64": DType.FLOAT64,
        "F32": DType.FLOAT32,
        "F16": DType.FLOAT16,
        "BF16": DType.BFLOAT16,
        "F8_E4M3": DType.FLOAT8_E4M3FN,
        "F8_E5M2": DType.FLOAT8_E5M2,
        "I64": DType.INT64,
        "I32": DType.INT32,
        "I16": DType.INT16,
        "I8": DType.INT8,
        "U8": DType.UINT8,
        "BOOL": DType.BOOL,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What the safetensors files of a commit hold."""

    rows: tuple[TensorRow, ...]
    num_files: int
    num_tensors: int
    stored_bytes: int
    """As the files have them, without headers and without rounding."""
    first_dtype: DType | None
    """Of the first tensor of floating-point numbers: what `dtype="auto"` means where the config has none."""

    def encoded(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "rows": [encode_row(row) for row in self.rows],
            "num_files": self.num_files,
            "num_tensors": self.num_tensors,
            "stored_bytes": self.stored_bytes,
            "first_dtype": self.first_dtype.value if self.first_dtype is not None else None,
        }

    @classmethod
    def decoded(cls, data: Mapping[str, Any]) -> "Files":
        """The inverse of `encoded`.

        Raises:
            ValueError, KeyError, TypeError: if the data are something else.
        """
        return cls(
            rows=tuple(map(decode_row, data["rows"])),
            num_files=int(data["num_files"]),
            num_tensors=int(data["num_tensors"]),
            stored_bytes=int(data["stored_bytes"]),
            first_dtype=DType(data["first_dtype"]) if data["first_dtype"] is not None else None,
        )


Read = Callable[[str, tuple[int, int] | None, int], bytes]
"""Bytes of a file by name, range (first and last byte; None for all) and the most that is taken.

Raises:
    ModelNotFoundError: if there is no such file.
    SourceError: if it cannot be had.
"""


def read(read_file: Read) -> Files:
    """What the files hold.

    Args:
        read_file: gives bytes of the repository's files, of one commit.

    Raises:
        ModelNotFoundError: if there are no safetensors files.
        SourceError: if a header is malformed or out of bounds, or what `read_file` raises.
    """
    try:
        tensors = list(_header(read_file, SINGLE_FILE))
        num_files = 1
    except ModelNotFoundError:
        names = _parts(read_file(INDEX_FILE, None, MAX_INDEX_BYTES))
        num_files = len(names)
        with ThreadPoolExecutor(min(_AT_ONCE, num_files), thread_name_prefix="vramplan-headers") as pool:
            tensors = [tensor for part in pool.map(lambda name: list(_header(read_file, name)), names) for tensor in part]
    if len(tensors) > MAX_TENSORS:
        raise _malformed(f"{len(tensors)} tensors; accepted: at most {MAX_TENSORS}")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise _malformed("a name that occurs twice")
    return Files(
        rows=rows_of(tensors),
        num_files=num_files,
        num_tensors=len(tensors),
        stored_bytes=sum(tensor.num_bytes for tensor in tensors),
        first_dtype=next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), None),
    )


def rows_of(tensors: Iterable[Stored]) -> tuple[TensorRow, ...]:
    """Rows of an inventory; what kind of module owns a tensor, a file does not say."""
    return group(
        Tensor(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            role=TensorRole.PARAMETER,
            module_kind=ModuleKind.OTHER,
            module_class="",
            tied_to=None,
            dtype_is_fixed=not tensor.dtype.is_floating_point,
        )
        for tensor in tensors
    )


def _parts(index: bytes) -> list[str]:
    data = _json(index, "the index")
    places = data.get("weight_map")
    names = sorted(set(places.values())) if isinstance(places, dict) and all(isinstance(v, str) for v in places.values()) else []
    if not 1 <= len(names) <= MAX_FILES or not all(map(_FILE.fullmatch, names)):
        raise _malformed(f"an index of 1 to {MAX_FILES} files in the same folder is expected")
    return names


def _header(read_file: Read, name: str) -> Iterator[Stored]:
    start = read_file(name, (0, FIRST_BYTES - 1), FIRST_BYTES)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    if len(start) < _LENGTH_BYTES or not 2 <= length <= MAX_HEADER_BYTES:
        raise _malformed(f"a header of {length} bytes; accepted: at most {MAX_HEADER_BYTES}")
    end = _LENGTH_BYTES + length
    if len(start) < end:
        start += read_file(name, (len(start), end - 1), end - len(start))
    if len(start) < end:
        raise _malformed("a file that ends within its header")
    for key, value in _json(start[_LENGTH_BYTES:end], "a header").items():
        if key != "__metadata__":
            yield _stored(key, value)


def _stored(name: str, value: object) -> Stored:
    if not isinstance(value, dict) or not name or len(name) > _MAX_NAME or not name.isprintable():
        raise _malformed("an entry that is no tensor")
    shape, offsets, kind = value.get("shape"), value.get("data_offsets"), value.get("dtype")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1] or not isinstance(kind, str):
        raise _malformed("a tensor without type, shape or place")
    num_bytes = offsets[1] - offsets[0]
    dtype = _DTYPES.get(kind)
    if dtype is None:
        return Stored(name=name, dtype=DType.UINT8, shape=(num_bytes,))
    if math.prod(shape) * dtype.itemsize != num_bytes:
        raise _malformed("a tensor whose shape and place disagree")
    return Stored(name=name, dtype=dtype, shape=tuple(shape))


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MAX_BYTES for n in value)
    )


def _json(content: bytes, what: str) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        raise _malformed(f"{what} that is no JSON") from None
    if not isinstance(data, dict):
        raise _malformed(f"{what} that is no object")
    return data


def _malformed(what: str) -> SourceError:
    return SourceError(f"model: the repository's safetensors files have {what}", field="model")
