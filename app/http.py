"""The HTTP face: bytes in, one call, JSON or a page out."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import orjson
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app import corrections, examples, sweep
from app.answer import Json
from app.answers import Answers
from app.calibrations import router as calibrations
from app.catalogue import inspect_model, list_gpus, list_models
from app.check import check
from app.configuration import Configuration
from app.flood import RateLimiter, Refusal
from app.front import SECURITY_HEADERS, Front
from app.in_force import InForce
from app.metrics import CONTENT_TYPE, Metrics
from app.openapi import complete
from app.page import router as page
from app.plan import plan
from app.prices import current
from app.problem import MEDIA_TYPE, problem, problem_of
from app.reading import read_json
from app.schemas import ref
from app.service import answer
from app.spans import spans_of_environment
from app.trace import answer_trace, snapshot_of, svg_of, trace
from app.trainer_files.opening import opened
from app.trainer_files.writing import convert
from app.transfer import body_of
from app.work import Need, Workers, in_thread, need_of
from estimator.errors import FieldError, SourceUnavailableError, VramplanError
from estimator.gpu_filter import GpuFilter
from estimator.sources.access import Access
from estimator.sources.lookup import Lookup, PublicStore
from estimator.sources.process import default_inspector

if TYPE_CHECKING:
    from app.state.opening import State
    from estimator.sources.cache import InventoryCache

# An orchestrator's own patience is often a second.
_READY_SECONDS = 5.0
Filter = Annotated[str, Query(max_length=200)]
Result = TypeVar("Result")


class Reply(Response):
    """JSON written by orjson, which has no NaN."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class Problem(Reply):
    """A problem document."""

    media_type = MEDIA_TYPE


def create_app(configuration: Configuration | None = None) -> FastAPI:
    """The application.

    Args:
        configuration: of the environment if None.

    Raises:
        RequestError: if a setting, or a file that one names, cannot be read.
    """
    configuration = configuration if configuration is not None else Configuration.of_environment()
    corrections.current()  # a file of the setting that cannot be read is told of before anyone asks
    metrics = Metrics()
    app = FastAPI(
        title="vramplan",
        version="1",
        description="How much GPU memory a model needs to load, run or fine-tune, phase by phase.",
        openapi_url=None,  # both addresses below
        docs_url=None,
        redoc_url=None,
        default_response_class=Reply,
        lifespan=_lifespan,
        # FastAPI's own spans hold paths and queries, and so names of models and whatever was typed into the form.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.configuration = configuration
    app.state.metrics = metrics
    app.state.answers = Answers()
    app.state.workers = Workers(
        threads=configuration.threads,
        long_threads=configuration.long_threads,
        max_long=min(configuration.max_plans, configuration.max_waiting),
        max_waiting=configuration.max_waiting,
        timeout_seconds=configuration.request_timeout_seconds,
    )
    app.state.spans = spans_of_environment() if configuration.traces else None
    app.state.state = _state_of(configuration)
    app.state.in_force = InForce(app.state.state, every_seconds=configuration.corrections_seconds)
    store, inventories = _caches(app.state.state, configuration)
    app.state.lookup = Lookup(
        store=store,
        endpoint=configuration.hub_endpoint or None,
        deadline_seconds=configuration.hub_timeout_seconds,
        fresh_seconds=configuration.hub_fresh_seconds,
        stale_seconds=configuration.hub_stale_seconds,
        file_hosts=configuration.hub_file_hosts,
        observe=metrics.hub_outcome,
    )
    default_inspector().limit_waiting(configuration.max_waiting_inspections)
    app.add_exception_handler(VramplanError, _on_own_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_unforeseen_error)
    app.add_middleware(
        Front,
        allowed_hosts=configuration.allowed_hosts,
        limiter=RateLimiter(configuration.rate_limit, configuration.rate_limit_storage),
        max_concurrent=configuration.max_concurrent,
        access=partial(
            Access,
            uses_environment=configuration.hub_use_own_token,
            token_from="the header X-HF-Token",
            lookup=app.state.lookup,
            inventories=inventories,
        ),
        in_force=lambda: app.state.in_force.now,
        metrics=metrics,
        respond=_respond,
        tracer=None if app.state.spans is None else app.state.spans.tracer,
    )
    app.post("/v1/estimate", summary="How much memory a run takes", openapi_extra=_documented("EstimateRequest", examples.ESTIMATE))(
        _estimate
    )
    app.post("/v1/check", summary="Whether a run fits a card", openapi_extra=_documented("EstimateRequest", examples.CHECK))(_check)
    app.post(
        "/v1/sweep",
        summary="Memory over micro-batches, lengths and ranks",
        description="`format`: `json`; `csv`; `svg`, a picture with the largest batch that fits at each length.",
        openapi_extra=_documented("SweepRequest", examples.SWEEP),
    )(_sweep)
    app.post("/v1/plan", summary="What fits a card, or which cards fit", openapi_extra=_documented("PlanRequest", examples.PLAN))(_plan)
    app.post(
        "/v1/trace",
        summary="Every allocation of a training step",
        description="`format`: `json`; `svg`, memory over time; `snapshot`, a pickle that pytorch.org/memory_viz opens.",
        openapi_extra=_documented("EstimateRequest", examples.TRACE),
    )(_trace)
    app.post(
        "/v1/convert",
        summary="Files of trainers as a request, and a run as such a file",
        description="`files` holds files of axolotl, LLaMA-Factory, TRL, TrainingArguments, PEFT, DeepSpeed or accelerate, as text or as "
        "objects; every other route takes `files` beside its own fields too. `write` names the kind of file to write: trl, axolotl, "
        "llamafactory, accelerate or deepspeed; `as` is its name, which for a script of TRL ends in .py.",
        openapi_extra=_documented("ConvertRequest", examples.CONVERT),
    )(_convert)
    app.get("/v1/models", summary="Bundled models")(_models)
    app.get("/v1/models/{model_id:path}", summary="One model, tensor by tensor")(_model)
    app.get(
        "/v1/gpus",
        summary="Known GPUs",
        description="Ranges are written `24GB..80GB`, `..24GB`, `40GB..`, `1..8`; `filter` takes it all in one: `24GB..80GB bf16 runpod`.",
    )(_gpus)
    app.get("/healthz", summary="Whether the service answers")(_health)
    app.get("/readyz", summary="Whether the service can do its work")(_ready)
    app.get("/openapi.json", include_in_schema=False)(_document)
    app.get("/docs", include_in_schema=False)(_docs)
    if configuration.metrics:
        app.get("/metrics", include_in_schema=False)(_metrics)
    app.include_router(calibrations)
    app.include_router(page)
    complete(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: State | None = app.state.state
    if state is not None:
        with suppress(SourceUnavailableError):  # answers need no state; `/readyz` tells of it
            await asyncio.to_thread(state.ready)
    in_force: InForce = app.state.in_force
    await asyncio.to_thread(in_force.look)  # the first answer rests on them too
    following = asyncio.create_task(in_force.follow())
    yield
    following.cancel()
    close(app)


def close(app: FastAPI) -> None:
    """Ends the threads, connections and counts of an application that serves no more, or never did."""
    app.state.workers.close()
    if app.state.state is not None:
        app.state.state.close()
    app.state.metrics.close()
    if app.state.spans is not None:
        app.state.spans.close()  # last: where nobody takes them it waits for half a minute


def _state_of(configuration: Configuration) -> "State | None":
    url = configuration.database
    if url is None:
        return None
    from app.state.opening import State  # SQLAlchemy takes a third of a second

    return State(url, connections=configuration.connections)


def _caches(state: "State | None", configuration: Configuration) -> "tuple[PublicStore | None, InventoryCache | None]":
    """Where public facts of the Hub are kept."""
    if state is None:
        return None, None
    from app.state.public import SqlInventories, SqlStore

    return SqlStore(state.database, fresh_seconds=configuration.hub_fresh_seconds), SqlInventories(state.database)


async def _estimate(request: Request) -> Response:
    payload = await _payload(request)
    if (need := need_of(payload)) is not Need.NOTHING:
        return Reply(await in_thread(request, need, partial(answer, payload)))
    answers: Answers = request.app.state.answers
    in_use = corrections.current()
    key = answers.key({"asked": payload, "corrections": None if in_use is None else in_use.version})
    if (known := answers.find(key)) is None:
        known = orjson.dumps(await in_thread(request, need, partial(answer, payload)))
        answers.keep(key, known)
    return Response(known, media_type="application/json")


async def _plan(request: Request) -> Response:
    return await _answered(request, plan)


async def _check(request: Request) -> Response:
    return await _answered(request, check)


async def _convert(request: Request) -> Response:
    payload = read_json(await body_of(request))
    need = need_of(payload) if "write" in payload else Need.TEXT  # a run that is written is answered for
    return Reply(await in_thread(request, need, partial(convert, payload)))


async def _sweep(request: Request, format: Literal["json", "csv", "svg"] = "json") -> Response:
    payload = await _payload(request)
    match format:
        case "json":
            return Reply(await in_thread(request, need_of(payload), lambda: sweep.answer_sweep(sweep.sweep(payload)), is_long=True))
        case "csv":
            disposition = {"content-disposition": 'attachment; filename="vramplan-sweep.csv"'}
            text = await in_thread(request, need_of(payload), lambda: sweep.csv_of(sweep.sweep(payload)), is_long=True)
            return Response(text, media_type="text/csv; charset=utf-8", headers=disposition)
        case "svg":
            picture = await in_thread(request, need_of(payload), lambda: sweep.svg_of(sweep.sweep(payload)), is_long=True)
            return Response(picture, media_type="image/svg+xml")


async def _trace(request: Request, format: Literal["json", "svg", "snapshot"] = "json", alloc_conf: str = "") -> Response:
    payload = await _payload(request)
    run = partial(trace, payload, settings=alloc_conf)
    match format:
        case "json":
            return Reply(await in_thread(request, Need.BUILDER, lambda: answer_trace(run())))
        case "svg":
            return Response(await in_thread(request, Need.BUILDER, lambda: svg_of(run())), media_type="image/svg+xml")
        case "snapshot":
            content = await in_thread(request, Need.BUILDER, lambda: snapshot_of(run()))
            disposition = {"content-disposition": 'attachment; filename="vramplan-snapshot.pickle"'}
            return Response(content, media_type="application/octet-stream", headers=disposition)


async def _models(request: Request, q: str | None = None) -> Response:
    return Reply({"schema_version": 1, "models": list_models(q)})


async def _model(request: Request, model_id: str, revision: str | None = None) -> Response:
    asked = {"model": model_id, "revision": revision}
    return Reply(await in_thread(request, need_of(asked), partial(inspect_model, model_id, revision)))


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


async def _ready(request: Request) -> Response:
    """The Hub is told of, but not required: bundled models and pasted configs are answered without it."""
    state: State | None = request.app.state.state
    if state is not None:
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await asyncio.to_thread(state.check)
        except TimeoutError:
            raise SourceUnavailableError("the state of the service does not answer in time", retry_after_seconds=10) from None
    lookup: Lookup = request.app.state.lookup
    hub = "left alone" if lookup.breaker.is_open else "asked"
    in_use = corrections.current()
    told = {"state": "none" if state is None else "kept", "hub": hub, "corrections": None if in_use is None else in_use.version}
    return Reply({"status": "ready", **told})


async def _document(request: Request) -> Response:
    """Its examples are answers about bundled models, which take a second to find: off the event loop."""
    workers: Workers = request.app.state.workers
    return Reply(await workers.run(request.app.openapi, need=Need.NOTHING))


async def _docs() -> Response:
    return get_swagger_ui_html(openapi_url="/openapi.json", title="vramplan")


async def _metrics(request: Request) -> Response:
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.text(), media_type=CONTENT_TYPE)


async def _answered(request: Request, ask: Callable[[Mapping[str, Any]], Json]) -> Response:
    payload = await _payload(request)
    return Reply(await in_thread(request, need_of(payload), partial(ask, payload), is_long=True))


async def _payload(request: Request) -> Json:
    """The request of a body, its files read."""
    payload = read_json(await body_of(request))
    return await in_thread(request, Need.TEXT, partial(opened, payload)) if "files" in payload else payload


def _documented(name: str, shown: Mapping[str, Json]) -> Json:
    """The body is read by hand, so that FastAPI knows nothing of it."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": ref(name), "examples": dict(shown)}}}}


def _respond(refusal: Refusal | VramplanError) -> Response:
    if isinstance(refusal, VramplanError):
        return _own_error(refusal)
    headers = {"retry-after": str(refusal.retry_after_seconds)} if refusal.retry_after_seconds else None
    return Problem(problem(refusal.status, None, refusal.detail), status_code=refusal.status, headers=headers)


async def _on_own_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, VramplanError)
    return _own_error(error)


def _own_error(error: VramplanError) -> Response:
    headers = {"retry-after": str(error.retry_after_seconds)} if isinstance(error, SourceUnavailableError) else None
    return Problem(problem_of(error), status_code=error.status, headers=headers)


async def _on_validation_error(_: Request, error: Exception) -> Response:
    """FastAPI's own check of paths and queries, without the input that its default body echoes."""
    assert isinstance(error, RequestValidationError)
    errors = [FieldError(field=".".join(map(str, e["loc"][1:])), message=str(e["msg"])) for e in error.errors()]
    return Problem(problem(422, "Invalid request", "; ".join(f"{e.field}: {e.message}" for e in errors), errors=errors), status_code=422)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Problem(problem(error.status_code, None, str(error.detail)), status_code=error.status_code, headers=error.headers)


async def _on_disconnect(_: Request, __: Exception) -> Response:
    """Nobody is there to read it; 499 is what nginx writes into its log."""
    return Response(status_code=499)


async def _on_unforeseen_error(_: Request, __: Exception) -> Response:
    return Problem(problem(500, None, "an internal error, logged on the server"), status_code=500, headers=SECURITY_HEADERS)
