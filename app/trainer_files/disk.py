"""Files of a command line, with those they point to."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from app.answer import Json
from app.options import FILE_SUFFIXES
from app.trainer_files.formats import Format, format_of
from app.trainer_files.opening import MAX_FILES
from app.yaml_text import MAX_CHARACTERS, parse
from estimator.errors import RequestError

# Keys under which a file may name another.
_POINTERS = ("deepspeed", "fsdp_config", "deepspeed_config_file")


def is_file(argument: str) -> bool:
    """Whether an argument of the command line is a file with settings, and not a model."""
    path = Path(argument)
    if path.suffix.lower() not in FILE_SUFFIXES or not path.is_file():
        return False
    content = parse(argument, _text(path))
    return format_of(argument, content) is not Format.MODEL_CONFIG


def gathered(arguments: Iterable[str]) -> list[Json]:
    """The files as a request takes them, and after them those they point to: looked for from here, then beside the file.

    Raises:
        RequestError: if one cannot be read.
    """
    given = {argument: _text(Path(argument)) for argument in arguments}
    known = {Path(argument).resolve() for argument in given}
    files: dict[str, Json] = {argument: {"name": argument, "content": text} for argument, text in given.items()}
    for argument, text in given.items():
        for name, path in _pointed(Path(argument), parse(argument, text)):
            if path.resolve() not in known:
                files.setdefault(name, {"name": name, "content": _text(path)})
    return list(files.values())[: MAX_FILES + 1]


def _pointed(file: Path, content: Mapping[str, Any]) -> Iterable[tuple[str, Path]]:
    launched = content.get("deepspeed_config")
    for values in (content, launched if isinstance(launched, dict) else {}):
        for key in _POINTERS:
            name = values.get(key)
            if isinstance(name, str):
                found = next((path for path in (Path(name), file.parent / name, file.parent / Path(name).name) if path.is_file()), None)
                if found is not None:
                    yield name, found


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_CHARACTERS + 1).decode("utf-8", errors="replace")
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
