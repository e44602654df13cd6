"""A request in the forms in which it can be taken along: JSON, a line for curl, a line for the command line."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from app.answer import Json
from app.form import MODEL, Form, fields
from app.options import Option


def as_json(request: Json) -> str:
    """The request, indented, without fields that are null."""
    return orjson.dumps(_without_nulls(request), option=orjson.OPT_INDENT_2).decode()


def as_curl(request: Json, origin: str) -> str:
    """The request sent to `POST /v1/estimate`.

    Args:
        origin: of the service, such as `http://127.0.0.1:8000`.
    """
    body = orjson.dumps(_without_nulls(request)).decode()
    return f"curl -s {shlex.quote(origin + '/v1/estimate')} -H 'content-type: application/json' -d {shlex.quote(body)}"


def as_command(request: Json) -> str:
    """The request as options of `vramplan estimate`; what has no option is handed over as JSON on standard input."""
    form = Form.of(request)
    options = [part for name, text in form.values.items() if name in fields() for part in _option(fields()[name].option, text)]
    model = [form[MODEL]] if form[MODEL] else []
    line = shlex.join(["vramplan", "estimate", *model, *options])
    if not form["extra"]:
        return line
    return f"printf %s {shlex.quote(orjson.dumps(form.further()).decode())} | {line} --request -"


def _option(option: Option, text: str) -> Iterator[str]:
    name = option.declarations[0].partition("/")[0]
    if option.kind == "flag":
        yield name if text == "true" else f"--no-{name[2:]}"
    elif option.kind != "file":
        yield f"{name}={text}" if text.startswith("-") else name
        if not text.startswith("-"):
            yield text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return value
