"""What people paste into the page: a request, a model's config.json, or a file with the fields of one, made into a form."""

import orjson
import yaml

from app.answer import Json
from app.form import AGAINST, EXTRA, MODEL, Form
from app.reading import check_depth, read_json
from estimator.errors import RequestError

# Parsing YAML takes about a second for so much.
_MAX_YAML = 1 << 16


class _NoAliases(yaml.SafeLoader):
    """YAML as data, without the anchors that make a short text a huge tree."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise RequestError("request: YAML aliases are not accepted", field="request")
        return super().compose_node(parent, index)


def pasted_form(text: str, form: Form) -> Form:
    """The form that a pasted text stands for: a request, or a model's config.json, which replaces the model alone.

    Raises:
        RequestError: if it is neither, as JSON or YAML.
    """
    payload = _parsed(text)
    check_depth(payload)
    if "model" not in payload and ("model_type" in payload or "architectures" in payload):
        extra = {**form.further(), MODEL: {"config": payload}}
        return form.edited(**{MODEL: "", EXTRA: orjson.dumps(extra).decode()})
    if "model" not in payload and form[MODEL]:
        payload = {MODEL: form[MODEL], **payload}
    return Form.of(payload).edited(**{AGAINST: form[AGAINST]})


def _parsed(text: str) -> Json:
    try:
        return read_json(text.encode())
    except RequestError:
        if text.lstrip().startswith("{"):
            raise
    if len(text) > _MAX_YAML:
        raise RequestError("request: so long a YAML text is not accepted", field="request")
    try:
        # once through JSON: what YAML has beyond it, such as dates and numbers as keys, is no field of a request
        payload = orjson.loads(orjson.dumps(yaml.load(text, Loader=_NoAliases)))
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise RequestError(f"request: neither JSON nor YAML: {str(error).splitlines()[0]}", field="request") from None
    if not isinstance(payload, dict):
        raise RequestError("request: expected the fields of a request, or a config.json", field="request")
    return payload
