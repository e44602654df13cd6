"""An inventory as compact JSON values and back: for the catalogue, the cache and the pipe to the inspecting process."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from estimator.dtypes import DType
from estimator.inventory import Inventory, ModuleKind, TensorRole, TensorRow

FORMAT = 1
"""Raised whenever the meaning of the encoded values changes; part of every content hash."""

# A row is a list; trailing entries equal to these are left out.
_ROW_DEFAULTS: tuple[object, ...] = (
    None,
    "",
    [],
    "",
    ModuleKind.OTHER.value,
    TensorRole.PARAMETER.value,
    DType.FLOAT32.value,
    None,
    False,
    False,
)


def encode_indices(indices: Sequence[Sequence[int]]) -> str:
    """`((0, 1, 2, 5), (0, 1))` as `0-2,5;0-1`."""
    return ";".join(",".join(_runs(choices)) for choices in indices)


def _runs(numbers: Sequence[int]) -> list[str]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in runs]


def decode_indices(text: str) -> tuple[tuple[int, ...], ...]:
    """The inverse of `encode_indices`.

    Raises:
        ValueError: if the text is not of that form.
    """
    if not text:
        return ()
    return tuple(tuple(n for run in choices.split(",") for n in _numbers(run)) for choices in text.split(";"))


def _numbers(run: str) -> range:
    first, _, last = run.partition("-")
    return range(int(first), int(last or first) + 1)


def encode_row(row: TensorRow) -> list[object]:
    """A row as a list: pattern, indices, shape, class, kind, role, dtype, tied_to, dtype_is_fixed, is_frozen; no trailing defaults."""
    values: list[object] = [
        row.pattern,
        encode_indices(row.indices),
        list(row.shape),
        row.module_class,
        row.module_kind.value,
        row.role.value,
        row.dtype.value,
        row.tied_to,
        row.dtype_is_fixed,
        row.is_frozen,
    ]
    while values[-1] == _ROW_DEFAULTS[len(values) - 1]:
        values.pop()
    return values


def decode_row(values: Sequence[object]) -> TensorRow:
    """The inverse of `encode_row`.

    Raises:
        ValueError: if a value is not what the position asks for.
    """
    if not 1 <= len(values) <= len(_ROW_DEFAULTS):
        raise ValueError(f"a row has {len(values)} entries")
    pattern, indices, shape, owner, kind, role, dtype, tied_to, fixed, frozen = [*values, *_ROW_DEFAULTS[len(values) :]]
    if not isinstance(shape, list) or not all(isinstance(n, int) for n in shape):
        raise ValueError(f"{pattern}: {shape!r} is not a shape")
    if tied_to is not None and not isinstance(tied_to, str):
        raise ValueError(f"{pattern}: {tied_to!r} is not a name")
    return TensorRow(
        pattern=_text(pattern),
        indices=decode_indices(_text(indices)),
        shape=tuple(shape),
        dtype=DType(_text(dtype)),
        role=TensorRole(_text(role)),
        module_kind=ModuleKind(_text(kind)),
        module_class=_text(owner),
        tied_to=tied_to,
        dtype_is_fixed=bool(fixed),
        is_frozen=bool(frozen),
    )


def encode(inventory: Inventory) -> dict[str, object]:
    """An inventory as JSON values."""
    return {
        "content_hash": inventory.content_hash,
        "model_type": inventory.model_type,
        "model_class": inventory.model_class,
        "transformers_version": inventory.transformers_version,
        "input_embedding": inventory.input_embedding,
        "output_embedding": inventory.output_embedding,
        "last_parameter_module": inventory.last_parameter_module,
        "layers_prefix": inventory.layers_prefix,
        "num_layers": inventory.num_layers,
        "keep_in_fp32_modules": list(inventory.keep_in_fp32_modules),
        "keep_in_fp32_modules_strict": list(inventory.keep_in_fp32_modules_strict),
        "tied_names": list(inventory.tied_names),
        "supported_attention": list(inventory.supported_attention),
        "default_attention": inventory.default_attention,
        "checkpoint_dtype": inventory.checkpoint_dtype.value if inventory.checkpoint_dtype else None,
        "config": dict(inventory.config),
        "rows": [encode_row(row) for row in inventory.rows],
    }


def decode(data: Mapping[str, object]) -> Inventory:
    """The inverse of `encode`.

    Raises:
        ValueError: if the data are not an encoded inventory, for instance because a file was cut short.
    """
    try:
        rows, config, num_layers, dtype = data["rows"], data["config"], data["num_layers"], data["checkpoint_dtype"]
        if not isinstance(rows, list) or not isinstance(config, dict) or not isinstance(num_layers, int):
            raise ValueError("rows, config or num_layers are of another type")
        return Inventory(
            content_hash=_text(data["content_hash"]),
            model_type=_text(data["model_type"]),
            model_class=_text(data["model_class"]),
            transformers_version=_text(data["transformers_version"]),
            rows=tuple(decode_row(row) for row in rows),
            input_embedding=_optional_text(data["input_embedding"]),
            output_embedding=_optional_text(data["output_embedding"]),
            last_parameter_module=_text(data["last_parameter_module"]),
            layers_prefix=_optional_text(data["layers_prefix"]),
            num_layers=num_layers,
            keep_in_fp32_modules=_texts(data["keep_in_fp32_modules"]),
            keep_in_fp32_modules_strict=_texts(data["keep_in_fp32_modules_strict"]),
            tied_names=_texts(data["tied_names"]),
            supported_attention=_texts(data["supported_attention"]),
            default_attention=_text(data["default_attention"]),
            config=MappingProxyType(config),
            checkpoint_dtype=DType(_text(dtype)) if dtype is not None else None,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an encoded inventory: {error!r}") from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a string")
    return value


def _optional_text(value: object) -> str | None:
    return None if value is None else _text(value)


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return tuple(_text(item) for item in value)
