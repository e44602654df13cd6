"""The OpenAPI document, completed: what answers look like, and every error as the problem document that it is."""

from collections.abc import Callable, Mapping

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app import examples
from app.answer import Json
from app.check import check
from app.problem import MEDIA_TYPE
from app.schemas import components, ref
from app.service import answer

PROBLEM_SCHEMA: Json = {
    "type": "object",
    "description": "RFC 9457. `errors` names the fields that are wrong; no value of a token, and of the input only what messages quote.",
    "required": ["type", "title", "status", "detail", "errors"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:vramplan:unknown-name", "about:blank"]},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}
_RETRY = {"retry-after": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
_ERRORS: Mapping[str, str] = {
    "401": "A key of this service is needed (`X-API-Key`)",
    "403": "The model is gated, or the token does not open it; or a page of another origin posts",
    "404": "No such model, revision, file or measurement; or private, which is not told apart",
    "408": "The body did not arrive in time",
    "413": "The body is too long",
    "421": "The service does not answer under this name",
    "422": "Not a request that can be answered: `errors` names the fields",
    "429": "This address asks too much",
    "502": "The Hub's answer makes no sense",
    "503": "Busy, or the Hub or the state is out of reach; bundled models and pasted configs are answered all the same",
}
_ALWAYS = ("421", "422", "429", "503")
_WATCHED = ("/healthz", "/readyz")
_OBJECT: Json = {"type": "object", "required": ["schema_version"], "properties": {"schema_version": {"const": 1}}}


def _with(*required: str) -> Json:
    return {**_OBJECT, "required": ["schema_version", *required]}


_ANSWERS: Mapping[tuple[str, str], tuple[Json, Mapping[str, Json]]] = {
    ("post", "/v1/estimate"): (ref("Estimate"), {}),
    ("post", "/v1/check"): (ref("Check"), {}),
    ("post", "/v1/sweep"): (ref("SweepAnswer"), {}),
    ("post", "/v1/plan"): (ref("PlanAnswer"), {}),
    ("post", "/v1/trace"): (_OBJECT, {}),
    ("get", "/v1/models"): (_with("models"), {}),
    ("get", "/v1/models/{model_id}"): (_with("model", "tensors"), {}),
    ("get", "/v1/gpus"): (_with("gpus"), {}),
    ("post", "/v1/calibrations"): (_with("hash", "status", "reasons"), {"kept": {"value": {"schema_version": 1, "hash": "0" * 64,
                                   "status": "accepted", "reasons": []}}}),
    ("get", "/v1/calibrations/current"): (_with("version", "corrections"), {}),
    ("get", "/v1/calibrations/history"): (_with("events"), {}),
    ("get", "/v1/calibrations/{record_hash}"): (_with("hash", "status", "reasons"), {}),
}  # fmt: skip
_OTHER_TYPES: Mapping[str, tuple[str, ...]] = {
    "/v1/sweep": ("text/csv", "image/svg+xml"),
    "/v1/trace": ("image/svg+xml", "application/octet-stream"),
}
_TOKENS: Json = {
    "name": "X-HF-Token",
    "in": "header",
    "required": False,
    "description": "The caller's own token of the Hub, for gated and private models; `Authorization: Bearer hf_…` does as well. It is "
    "sent to the Hub where the Hub demands one, and neither stored nor logged.",
    "schema": {"type": "string", "pattern": "^hf_[A-Za-z0-9_.-]{4,2000}$"},
}
_KEY: Json = {"name": "X-API-Key", "in": "header", "required": True, "description": "A key of this service.", "schema": {"type": "string"}}
_RECORD: Json = {
    "type": "object",
    "description": "One line of the file that `vramplan calibrate run` writes (schema version 1).",
    "required": ["case_hash", "case", "kind", "outcome", "figures", "environment", "provenance"],
}


def complete(app: FastAPI) -> None:
    """Makes the application's document say all of it."""

    def document() -> Json:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            app.openapi_schema = _completed(made)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _completed(made: Json) -> Json:
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas |= components()
    schemas["Problem"] = PROBLEM_SCHEMA
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            _complete(path, method, operation)
    return made


def _complete(path: str, method: str, operation: Json) -> None:
    responses = {code: response for code, response in operation.get("responses", {}).items() if code.startswith("2")}
    if path == "/v1/calibrations":
        responses = {"200": {"description": "Known already"}, "201": {"description": "Kept"}}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _RECORD}}}
        operation.setdefault("parameters", []).append(_KEY)
    schema, shown = _ANSWERS.get((method, path), ({"type": "object"}, {}))
    if path in _SHOWN:
        shown = {"answer": {"summary": "To the first example", "value": _SHOWN[path]()}}
    for response in responses.values():
        content: Json = {"application/json": {"schema": schema, **({"examples": dict(shown)} if shown else {})}}
        response["content"] = content | {kind: {"schema": {"type": "string"}} for kind in _OTHER_TYPES.get(path, ())}
    codes = ["503"] if path in _WATCHED else [*_ALWAYS]
    if method == "post":
        codes += ["403", "408", "413"]
    if _reads_models(path, method):
        codes += ["403", "404", "502"]
        operation.setdefault("parameters", []).append(_TOKENS)
    if path == "/v1/calibrations":
        codes.append("401")
    if path == "/v1/calibrations/{record_hash}":
        codes.append("404")
    for code in sorted(set(codes)):
        responses[code] = {
            "description": _ERRORS[code],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            **({"headers": _RETRY} if code in ("429", "503") else {}),
        }
    operation["responses"] = responses


def _reads_models(path: str, method: str) -> bool:
    return (method == "post" and path != "/v1/calibrations") or path == "/v1/models/{model_id}"


def _estimate() -> Json:
    """A real answer, shortened to one phase with one item; the bundled model needs no network."""
    found = answer(examples.QLORA)
    return {**found, "phases": [{**found["phases"][0], "items": found["phases"][0]["items"][:1]}]}


_SHOWN: Mapping[str, Callable[[], Json]] = {"/v1/estimate": _estimate, "/v1/check": lambda: check(examples.QLORA)}
