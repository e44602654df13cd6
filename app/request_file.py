"""A request in a file, or on standard input."""

import sys
from pathlib import Path

from app.answer import Json
from app.reading import MAX_BODY_BYTES, read_json
from estimator.errors import RequestError

STANDARD_INPUT = "-"
_YAML = (".yaml", ".yml")
# Fields of TrainingArguments that may be paths.
_POINTERS = ("deepspeed", "fsdp_config")


def read_request(name: str) -> Json:
    """What a file holds: YAML by its suffix, else JSON; on standard input JSON where it begins with a brace.

    Raises:
        RequestError: if it cannot be read, or is no object.
    """
    content = sys.stdin.buffer.read(MAX_BODY_BYTES + 1) if name == STANDARD_INPUT else _content("request", Path(name))
    is_yaml = not content.lstrip().startswith(b"{") if name == STANDARD_INPUT else Path(name).suffix in _YAML
    folder = None if name == STANDARD_INPUT else Path(name).parent
    if not is_yaml:
        return _with_pointed(read_json(content), folder)
    from app.yaml_text import parse  # PyYAML, where there is YAML

    return _with_pointed(parse("request", content.decode("utf-8", errors="replace")), folder)


def _with_pointed(payload: Json, folder: Path | None) -> Json:
    """The request with what the files hold that its TrainingArguments point to: looked for from here, then beside the request."""
    training = payload.get("training")
    if not isinstance(training, dict):
        return payload
    inline = {}
    for key in _POINTERS:
        pointed = training.get(key)
        if isinstance(pointed, str) and pointed and not pointed.lstrip().startswith("{"):
            places = [Path(pointed)] + ([] if folder is None else [folder / pointed, folder / Path(pointed).name])
            found = next((place for place in places if place.is_file()), None)
            if found is None:
                raise RequestError(
                    f"training.{key}: {pointed[:80]!r} is not found, neither from here nor beside the request; accepted: the path of a "
                    "JSON file, or what it holds",
                    field=f"training.{key}",
                )
            inline[key] = read_json(_content(f"training.{key}", found))
    return payload if not inline else {**payload, "training": {**training, **inline}}


def _content(field: str, path: Path) -> bytes:
    """No more than is read; one byte more shows that there is more."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BODY_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{field}: {str(path)!r} cannot be read: {error.strerror}", field=field) from None
