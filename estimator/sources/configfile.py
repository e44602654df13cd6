"""A config.json, from a file or from bytes, as checked facts."""

import json
from pathlib import Path
from typing import Any

from estimator.errors import ConfigError, ModelNotFoundError
from estimator.sources import bounds


def read(path: Path) -> dict[str, Any]:
    """The checked content of a config.json.

    Args:
        path: the file, or a folder that holds a `config.json`.

    Raises:
        ModelNotFoundError: if there is no such file.
        ConfigError: if it is no JSON object, or out of bounds.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        with file.open("rb") as opened:
            content = opened.read(bounds.MAX_BYTES + 1)
    except OSError as error:
        raise ModelNotFoundError(f"model: {str(path)!r} cannot be read: {error.strerror}; expected a config.json", field="model") from error
    return parse(content)


def parse(content: bytes) -> dict[str, Any]:
    """The checked content of a config.json given as bytes.

    Raises:
        ConfigError: if it is no JSON object, or out of bounds.
    """
    if len(content) > bounds.MAX_BYTES:
        raise ConfigError(f"model.config: more than {bounds.MAX_BYTES} bytes; accepted: at most that many", field="model.config")
    try:
        data = json.loads(content, parse_constant=_constant)
    except RecursionError:
        raise ConfigError(f"model.config: nested too deep; accepted: at most {bounds.MAX_DEPTH} levels", field="model.config") from None
    except ValueError as error:  # malformed JSON, bytes that are no UTF-8, integers of thousands of digits
        raise ConfigError(f"model.config: not JSON: {str(error)[:200]}", field="model.config") from None
    return bounds.check(data)


def _constant(name: str) -> float:
    """Infinity is let through to `bounds`, which knows the one field of published configs that holds it."""
    if name == "Infinity":
        return float("inf")
    raise ValueError(f"{name} is not a number that JSON has")
