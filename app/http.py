"""The HTTP face: bytes in, one call, JSON or a page out."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import orjson
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from app import examples, sweep
from app.answer import Json
from app.catalogue import inspect_model, list_gpus, list_models
from app.check import check
from app.page import router as page
from app.plan import plan
from app.prices import current
from app.problem import MEDIA_TYPE, problem, problem_of
from app.reading import MAX_BODY_BYTES, read_json
from app.request import PlanRequest, SweepRequest
from app.request import Request as EstimateRequest
from app.service import answer
from app.trace import answer_trace, snapshot_of, svg_of, trace
from app.trainer_files.opening import opened
from app.trainer_files.writing import convert
from estimator.errors import FieldError, VramplanError
from estimator.gpu_filter import GpuFilter

Filter = Annotated[str, Query(max_length=200)]
Result = TypeVar("Result")

# Estimates are arithmetic that holds the interpreter's lock: a few threads keep the loop free, more would only queue there.
MAX_THREADS = 8

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
# FastAPI's documentation page brings scripts of its own from a CDN: it gets a policy that lets them in.
DOCS_POLICY = (
    "default-src 'none'; script-src https://cdn.jsdelivr.net 'unsafe-inline'; style-src https://cdn.jsdelivr.net; "
    "img-src 'self' data: https://fastapi.tiangolo.com; connect-src 'self'"
)


class Reply(Response):
    """JSON written by orjson, which has no NaN."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class Problem(Reply):
    """A problem document."""

    media_type = MEDIA_TYPE


def create_app() -> FastAPI:
    """The application."""
    app = FastAPI(
        title="vramplan",
        version="1",
        description="How much GPU memory a model needs to load, run or fine-tune, phase by phase.",
        redoc_url=None,
        default_response_class=Reply,
    )
    app.state.threads = CapacityLimiter(MAX_THREADS)
    app.add_exception_handler(VramplanError, _on_own_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_unforeseen_error)
    app.middleware("http")(_with_headers)
    app.post("/v1/estimate", summary="How much memory a run takes", openapi_extra=_documented(EstimateRequest, examples.ESTIMATE))(
        _estimate
    )
    app.post("/v1/check", summary="Whether a run fits a card", openapi_extra=_documented(EstimateRequest, examples.CHECK))(_check)
    app.post(
        "/v1/sweep",
        summary="Memory over micro-batches, lengths and ranks",
        description="`format`: `json`; `csv`; `svg`, a picture with the largest batch that fits at each length.",
        openapi_extra=_documented(SweepRequest, examples.SWEEP),
    )(_sweep)
    app.post("/v1/plan", summary="What fits a card, or which cards fit", openapi_extra=_documented(PlanRequest, examples.PLAN))(_plan)
    app.post(
        "/v1/trace",
        summary="Every allocation of a training step",
        description="`format`: `json`; `svg`, memory over time; `snapshot`, a pickle that pytorch.org/memory_viz opens.",
        openapi_extra=_documented(EstimateRequest, examples.TRACE),
    )(_trace)
    app.post(
        "/v1/convert",
        summary="Files of trainers as a request, and a run as such a file",
        description="`files` holds files of axolotl, LLaMA-Factory, TRL, TrainingArguments, PEFT, DeepSpeed or accelerate, as text or as "
        "objects; every other route takes `files` beside its own fields too. `write` names the kind of file to write: trl, axolotl, "
        "llamafactory, accelerate or deepspeed; `as` is its name, which for a script of TRL ends in .py.",
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"examples": dict(examples.CONVERT)}}}},
    )(_convert)
    app.get("/v1/models", summary="Bundled models")(_models)
    app.get("/v1/models/{model_id:path}", summary="One model, tensor by tensor")(_model)
    app.get(
        "/v1/gpus",
        summary="Known GPUs",
        description="Ranges are written `24GB..80GB`, `..24GB`, `40GB..`, `1..8`; `filter` takes it all in one: `24GB..80GB bf16 runpod`.",
    )(_gpus)
    app.get("/healthz", summary="Whether the service answers")(_health)
    app.include_router(page)
    return app


async def _estimate(request: Request) -> Response:
    return await _answered(request, answer)


async def _plan(request: Request) -> Response:
    return await _answered(request, plan)


async def _check(request: Request) -> Response:
    return await _answered(request, check)


async def _convert(request: Request) -> Response:
    payload = read_json(await body_of(request))
    return Reply(await in_thread(request, partial(convert, payload)))


async def _sweep(request: Request, format: Literal["json", "csv", "svg"] = "json") -> Response:
    payload = await _payload(request)
    match format:
        case "json":
            return Reply(await in_thread(request, lambda: sweep.answer_sweep(sweep.sweep(payload))))
        case "csv":
            disposition = {"content-disposition": 'attachment; filename="vramplan-sweep.csv"'}
            text = await in_thread(request, lambda: sweep.csv_of(sweep.sweep(payload)))
            return Response(text, media_type="text/csv; charset=utf-8", headers=disposition)
        case "svg":
            return Response(await in_thread(request, lambda: sweep.svg_of(sweep.sweep(payload))), media_type="image/svg+xml")


async def _trace(request: Request, format: Literal["json", "svg", "snapshot"] = "json", alloc_conf: str = "") -> Response:
    payload = await _payload(request)
    run = partial(trace, payload, settings=alloc_conf)
    match format:
        case "json":
            return Reply(await in_thread(request, lambda: answer_trace(run())))
        case "svg":
            return Response(await in_thread(request, lambda: svg_of(run())), media_type="image/svg+xml")
        case "snapshot":
            content = await in_thread(request, lambda: snapshot_of(run()))
            disposition = {"content-disposition": 'attachment; filename="vramplan-snapshot.pickle"'}
            return Response(content, media_type="application/octet-stream", headers=disposition)


async def _models(request: Request, q: str | None = None) -> Response:
    return Reply({"schema_version": 1, "models": list_models(q)})


async def _model(request: Request, model_id: str, revision: str | None = None) -> Response:
    return Reply(await in_thread(request, partial(inspect_model, model_id, revision)))


async def _gpus(
    filter: Filter = "",
    memory: Filter | None = None,
    count: Filter | None = None,
    price: Filter | None = None,
    bf16: bool = False,
    fp8: bool = False,
    min_compute_capability: Filter | None = None,
    provider: Filter | None = None,
    vendor: Filter | None = None,
    sort: Filter = "catalogue",
) -> Response:
    wanted = GpuFilter.of(
        text=filter,
        memory=memory,
        count=count,
        price=price,
        bf16=bf16,
        fp8=fp8,
        min_compute_capability=min_compute_capability,
        provider=provider,
        vendor=vendor,
        book=current(),
    )
    return Reply({"schema_version": 1, "gpus": list_gpus(wanted, sort)})


async def _health() -> Response:
    return Reply({"status": "ok"})


async def _answered(request: Request, ask: Callable[[Mapping[str, Any]], Json]) -> Response:
    payload = await _payload(request)
    return Reply(await in_thread(request, partial(ask, payload)))


async def _payload(request: Request) -> Json:
    """The request of a body, its files read."""
    payload = read_json(await body_of(request))
    return await in_thread(request, partial(opened, payload)) if "files" in payload else payload


async def body_of(request: Request) -> bytes:
    """The body, refused before it is held when it is too long."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise HTTPException(413, f"the body may have at most {MAX_BODY_BYTES:,} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"the body may have at most {MAX_BODY_BYTES:,} bytes")
    return bytes(body)


async def in_thread(request: Request, call: Callable[[], Result]) -> Result:
    """The result of a blocking call, off the event loop."""
    return await to_thread.run_sync(call, limiter=request.app.state.threads)


def _documented(model: type[EstimateRequest], shown: Mapping[str, Json]) -> Json:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    # Definitions are inlined: the body is read by hand, so FastAPI collects no components for it.
    inlined = orjson.loads(orjson.dumps(schema))
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _inline(inlined, definitions), "examples": dict(shown)}},
        }
    }


def _inline(node: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inline(child, definitions) for child in node]
    if not isinstance(node, dict):
        return node
    name = str(node.get("$ref", "")).rpartition("/")[2]
    if name == "JsonValue":
        return {}
    if name in definitions:
        return _inline({**definitions[name], **{k: v for k, v in node.items() if k != "$ref"}}, definitions)
    return {key: _inline(child, definitions) for key, child in node.items()}


async def _with_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    response = await call_next(request)
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    if request.url.path == "/docs":
        response.headers["content-security-policy"] = DOCS_POLICY
    return response


async def _on_own_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, VramplanError)
    headers = {"retry-after": "30"} if error.status == 503 else None
    return Problem(problem_of(error), status_code=error.status, headers=headers)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    """FastAPI's own check of paths and queries, without the input that its default body echoes."""
    assert isinstance(error, RequestValidationError)
    errors = [FieldError(field=".".join(map(str, e["loc"][1:])), message=str(e["msg"])) for e in error.errors()]
    return Problem(problem(422, "Invalid request", "; ".join(f"{e.field}: {e.message}" for e in errors), errors=errors), status_code=422)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Problem(problem(error.status_code, None, str(error.detail)), status_code=error.status_code, headers=error.headers)


async def _on_unforeseen_error(_: Request, __: Exception) -> Response:
    return Problem(problem(500, None, "an internal error, logged on the server"), status_code=500, headers=SECURITY_HEADERS)
