"""A request in a file, or on standard input."""

import sys
from pathlib import Path

from app.answer import Json
from app.reading import MAX_BODY_BYTES, read_json
from estimator.errors import RequestError

STANDARD_INPUT = "-"
_YAML = (".yaml", ".yml")


def read_request(name: str) -> Json:
    """What a file holds: YAML by its suffix, else JSON; on standard input JSON where it begins with a brace.

    Raises:
        RequestError: if it cannot be read, or is no object.
    """
    try:
        content = sys.stdin.buffer.read(MAX_BODY_BYTES + 1) if name == STANDARD_INPUT else Path(name).read_bytes()
    except OSError as error:
        raise RequestError(f"request: {name!r} cannot be read: {error.strerror}", field="request") from None
    is_yaml = not content.lstrip().startswith(b"{") if name == STANDARD_INPUT else Path(name).suffix in _YAML
    if not is_yaml:
        return read_json(content)
    from app.yaml_text import parse  # PyYAML, where there is YAML

    return parse("request", content.decode("utf-8", errors="replace"))
