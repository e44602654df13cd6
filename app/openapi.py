"""The OpenAPI document, completed: what answers look like, and every error as the problem document that it is."""

from collections.abc import Callable, Mapping

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app import examples
from app.answer import Json
from app.catalogue import inspect_model, list_gpus, list_models
from app.check import check
from app.plan import plan
from app.problem import MEDIA_TYPE
from app.schemas import components, ref
from app.service import answer
from app.sweep import answer_sweep, sweep
from app.trainer_files.writing import convert

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
_ANSWERS: Mapping[tuple[str, str], str] = {
    ("post", "/v1/estimate"): "Estimate",
    ("post", "/v1/check"): "Check",
    ("post", "/v1/sweep"): "SweepAnswer",
    ("post", "/v1/plan"): "PlanAnswer",
    ("post", "/v1/trace"): "Trace",
    ("post", "/v1/convert"): "Converted",
    ("get", "/v1/models"): "Models",
    ("get", "/v1/models/{model_id}"): "Inspected",
    ("get", "/v1/gpus"): "Gpus",
    ("get", "/healthz"): "Health",
    ("get", "/readyz"): "Ready",
    ("post", "/v1/calibrations"): "Posted",
    ("get", "/v1/calibrations/current"): "InForce",
    ("get", "/v1/calibrations/history"): "History",
    ("get", "/v1/calibrations/{record_hash}"): "Posted",
}
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
    shown = {
        "answer": {
            "summary": "To the first example, shortened" if path in _FIRST else "An answer, shortened",
            "value": _SHOWN[method, path](),
        }
    }
    for response in responses.values():
        content: Json = {"application/json": {"schema": ref(_ANSWERS[method, path]), "examples": shown}}
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


_FIRST: Mapping[str, Json] = {
    "/v1/estimate": examples.QLORA,
    "/v1/check": examples.QLORA,
    "/v1/convert": examples.CONVERT["axolotl"]["value"],
}
_HASH = "0" * 64


def _estimate(found: Json) -> Json:
    """Shortened to one phase with one item."""
    return {**found, "phases": [{**found["phases"][0], "items": found["phases"][0]["items"][:1]}]}


def _plan() -> Json:
    found = plan(examples.FULL)
    made = found["plan"]
    return {**found, "plan": {**made, "estimate": _estimate(made["estimate"]), "alternatives": made["alternatives"][:1]}}


def _trace() -> Json:
    """The form of an answer: the step itself would take seconds to run."""
    found = answer(examples.QLORA)
    largest = {"item": "logits", "module": "", "operator": "_log_softmax", "dtype": "float32", "shape": "8192 × 128256", "count": 1}
    phase = {
        "phase": "backward",
        "allocated_bytes": 26_288_886_784,
        "items": [{"name": "logits", "bytes": 12_608_077_824}],
        "modules": [{"module": "", "bytes": 12_608_078_848}],
        "largest": [{**largest, "bytes": 4_202_692_608}],
    }
    column = {"phase": "load", "event": 0, "allocated_bytes": 5_591_540_224, "reserved_bytes": 5_593_104_384}
    return {
        **{name: found[name] for name in ("schema_version", "model", "recipe", "stack")},
        "engine": "trace",
        "peak": {"phase": "backward", "allocated_bytes": 26_288_886_784, "event": 94_961},
        "phases": [phase],
        "allocator": {
            "settings": "",
            "max_reserved_bytes": 30_838_620_160,
            "reserved_at_peak_bytes": 30_838_620_160,
            "allocated_at_peak_bytes": 26_293_605_376,
            "inactive_split_at_peak_bytes": 2_372_365_312,
            "num_segments": 299,
        },
        "timeline": {
            "num_allocations": 58_597,
            "num_events": 113_729,
            "columns": [{**column, "items": {"temporary": 5_591_540_224}}],
        },
        "warnings": [],
    }


def _model() -> Json:
    found = inspect_model("gpt2")
    return {**found, "tensors": found["tensors"][:1]}


# Real answers, shortened, where they are made at once; bundled models need no network. A trace takes seconds: its example is of the form.
_SHOWN: Mapping[tuple[str, str], Callable[[], Json]] = {
    ("post", "/v1/estimate"): lambda: _estimate(answer(_FIRST["/v1/estimate"])),
    ("post", "/v1/check"): lambda: check(_FIRST["/v1/check"]),
    ("post", "/v1/sweep"): lambda: answer_sweep(sweep({**examples.FULL, "sweep": {"max_length": [1024, 2048]}, "confirm": False})),
    ("post", "/v1/plan"): _plan,
    ("post", "/v1/trace"): _trace,
    ("post", "/v1/convert"): lambda: convert(_FIRST["/v1/convert"]),
    ("get", "/v1/models"): lambda: {"schema_version": 1, "models": list_models("gpt2")[:1]},
    ("get", "/v1/models/{model_id}"): _model,
    ("get", "/v1/gpus"): lambda: {"schema_version": 1, "gpus": list_gpus()[:1]},
    ("get", "/healthz"): lambda: {"status": "ok"},
    ("get", "/readyz"): lambda: {"status": "ready", "state": "kept", "hub": "asked", "corrections": None},
    ("post", "/v1/calibrations"): lambda: {"schema_version": 1, "hash": _HASH, "status": "accepted", "reasons": []},
    ("get", "/v1/calibrations/current"): lambda: {"schema_version": 1, "version": None, "corrections": None},
    ("get", "/v1/calibrations/history"): lambda: {"schema_version": 1, "events": []},
    ("get", "/v1/calibrations/{record_hash}"): lambda: {"schema_version": 1, "hash": _HASH, "status": "accepted", "reasons": []},
}
