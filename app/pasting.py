"""What people paste into the page: a request, a model's config.json, or a trainer's file, made into a form."""

import orjson

from app.answer import Json
from app.form import AGAINST, EXTRA, MODEL, Form
from app.reading import check_depth, read_json
from app.request import PlanRequest
from app.trainer_files.formats import Format, format_of
from app.trainer_files.opening import opened
from app.yaml_text import parse

_NAME = "the pasted text"
# Parsing YAML takes about a second for so much.
_MAX_YAML = 1 << 16


def pasted_form(text: str, form: Form) -> Form:
    """The form that a pasted text stands for; a config.json replaces the model alone.

    Raises:
        RequestError: if it is nothing that is read, as JSON or YAML.
    """
    payload, kind = _read(text)
    if kind is Format.MODEL_CONFIG:
        extra = {**form.further(), MODEL: {"config": payload}}
        return form.edited(**{MODEL: "", EXTRA: orjson.dumps(extra).decode()})
    if MODEL not in payload and form[MODEL]:
        payload = {MODEL: form[MODEL], **payload}
    return Form.of(payload).edited(**{AGAINST: form[AGAINST]})


def _read(text: str) -> tuple[Json, Format]:
    values = read_json(text.encode()) if text.lstrip().startswith("{") else parse(_NAME, text, max_characters=_MAX_YAML)
    check_depth(values)
    if values.keys() <= PlanRequest.model_fields.keys():
        return values, Format.REQUEST
    kind = format_of(_NAME, values)
    if kind in (Format.REQUEST, Format.MODEL_CONFIG):
        return values, kind
    return opened({"files": [{"name": _NAME, "content": text}]}), Format.REQUEST
