"""The page at `/`: a plain form and its answer. Works without JavaScript; the answer has an address that can be shared."""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import orjson
from anyio import to_thread
from fastapi import APIRouter, Request, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from app import form as fields
from app.answer import Json
from app.catalogue import list_gpus, list_models
from app.chart import chart_of
from app.form import Form
from app.plan import plan
from app.problem import problem_of
from app.reading import MAX_BODY_BYTES, read_json
from app.service import answer
from app.wording import engine_phrase, plan_sentence, setting_sentence, shortfall_sentence, verdict_sentence
from estimator.errors import RequestError, VramplanError
from estimator.units import gib

_HERE = Path(__file__).parent

router = APIRouter(include_in_schema=False)


@router.get("/")
async def show(request: Request) -> Response:
    """The form, and its answer when it was sent."""
    query = dict(request.query_params)
    if not query:
        return _page(Form.blank())
    form = Form.submitted(query)
    wants_plan = query.get("action") == "plan"
    return await _answered(request, form, lambda: form.request(plan=wants_plan), wants_plan)


@router.post("/")
async def show_pasted(request: Request) -> Response:
    """The answer to a pasted request."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return _page(Form.blank(), error=RequestError(f"the request is longer than {MAX_BODY_BYTES:,} bytes"))
    pasted = parse_qs(body.decode("utf-8", "replace"), max_num_fields=8).get("request", [""])[0]
    return await _answered(request, Form.blank(), lambda: read_json(pasted.encode()), False, pasted)


@router.get("/static/style.css")
async def style() -> Response:
    """The style sheet."""
    return Response(_style(), media_type="text/css", headers={"cache-control": "public, max-age=3600"})


async def _answered(request: Request, form: Form, payload: Any, wants_plan: bool, pasted: str = "") -> Response:
    try:
        result = await to_thread.run_sync(partial(_ask, payload, wants_plan), limiter=request.app.state.threads)
    except VramplanError as error:
        return _page(form, error=error, pasted=pasted)
    return _page(form, result=result, pasted=pasted)


def _ask(payload: Any, wants_plan: bool) -> Json:
    asked = payload()
    return {"request": asked, **(_planned(plan(asked)) if wants_plan else {"estimate": answer(asked)})}


def _planned(found: Json) -> Json:
    half = found["plan"] or found["shortfall"]
    if half is None:
        raise RequestError("hardware: a plan on this page needs a card; give gpu or capacity_gib", field="hardware")
    return {"estimate": half["estimate"], "plan": found["plan"], "shortfall": found["shortfall"]}


def _page(form: Form, *, result: Json | None = None, error: VramplanError | None = None, pasted: str = "") -> Response:
    context: dict[str, Any] = {
        "form": form.values,
        "fields": fields,
        "models": [model["id"] for model in list_models()],
        "gpus": list_gpus(),
        "error": None if error is None else problem_of(error),
        "pasted": pasted,
        "result": None if result is None else _view(result),
    }
    return HTMLResponse(_template().render(context), status_code=error.status if error is not None else 200)


def _view(result: Mapping[str, Any]) -> Json:
    """What the template shows, worded here so that it only places things."""
    estimate = result["estimate"]
    view: Json = {
        "answer": estimate,
        "verdict": verdict_sentence(estimate),
        "verdict_class": estimate["fit"]["verdict"] if estimate["fit"] else "unknown",
        "engine": engine_phrase(estimate),
        "chart": chart_of(estimate),
        "request": orjson.dumps(_without_nulls(result["request"]), option=orjson.OPT_INDENT_2).decode(),
        "plan": None,
        "alternatives": [],
        "changes": [],
    }
    if result.get("plan"):
        view["plan"] = plan_sentence(result["plan"])
        view["alternatives"] = result["plan"]["alternatives"]
    if result.get("shortfall"):
        view["plan"] = shortfall_sentence(result["shortfall"])
        view["changes"] = result["shortfall"]["changes"]
    return view


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return value


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["gib"] = gib
    environment.filters["setting"] = setting_sentence
    return environment.get_template("page.html")


@cache
def _style() -> bytes:
    return (_HERE / "static" / "style.css").read_bytes()
