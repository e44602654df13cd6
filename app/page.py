"""The page at `/`: a form and its answer, which has an address to share. Works without JavaScript; with it the answer follows the edits."""

from collections.abc import Mapping
from functools import partial
from urllib.parse import parse_qsl, urlencode

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse

from app import form as names
from app import presets, sections
from app.answer import Json
from app.catalogue import list_gpus, list_models
from app.form import AGAINST, EXTRA, MODEL, Form, fields, groups
from app.pasting import pasted_form
from app.problem import problem_of
from app.redaction import holds_token, redacted
from app.reference import router as reference
from app.rendering import HEADERS, STATIC, UNSTORED, content, fingerprint, page_of
from app.sections import Patience
from app.transfer import body_of
from app.work import Need, in_thread, need_of
from estimator.errors import RequestError, VramplanError
from estimator.units import gib

# What stands in every form: the run's sizes, before all else.
FIRST = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "global_batch_size")
WAIT = "wait"
"""Asks for an answer that may take seconds, since the model is looked up or the step is traced."""
_PATIENCE = {"": Patience.NONE, "model": Patience.MODEL}
FIRST_OF_GENERATION = ("batch_size", "prompt_length", "max_new_tokens")
SHOWN = "http://127.0.0.1:8000"
"""The service in documents."""
_PARAMETERS = frozenset((MODEL, EXTRA, AGAINST, "show", "preset", *fields()))

router = APIRouter(include_in_schema=False)
router.include_router(reference)


@router.get("/")
async def show(request: Request) -> Response:
    """The form and its answer; an example on the first visit."""
    query = dict(request.query_params)
    if not query:
        return await _page(request, presets.first(), is_example=True)
    form, error = _read(query)
    if error is not None:
        return await _page(request, form, error=error)
    tidy = form.query + (f"&{urlencode({'show': query['show']})}" if query.get("show") else "")
    if "preset" in query or set(query) - _PARAMETERS or any(not text.strip() for text in query.values()):
        return RedirectResponse(f"/?{tidy}" if form.values else "/", status_code=303, headers=HEADERS)
    return await _page(request, form, shown=query.get("show", ""))


@router.post("/")
async def show_posted(request: Request) -> Response:
    """The answer to a form that is too long for an address, or to a pasted request, config or training file."""
    sent = await _sent(request)
    pasted = sent.pop("request", "")
    if not pasted.strip():
        form, error = _read(sent)
        return await _page(request, form, error=error, shown=sent.get("show", ""))
    form, error = _read(sent)
    try:
        form = await in_thread(request, Need.TEXT, partial(pasted_form, pasted, form))
    except VramplanError as refused:
        return await _page(request, form, error=refused, pasted="" if holds_token(pasted) else pasted)
    if form.address is not None:
        return RedirectResponse(form.address, status_code=303, headers=HEADERS)
    return await _page(request, form)


@router.api_route("/page/{name}", methods=["GET", "POST"])
async def part(request: Request, name: str) -> Response:
    """A part of the page, which is put in place as the form is edited."""
    if name not in sections.SECTIONS and name != "answer":
        raise HTTPException(404)
    sent = await _sent(request) if request.method == "POST" else dict(request.query_params)
    form, error = _read(sent)
    if name == "answer":
        context = await _answered(request, form, error, _PATIENCE.get(sent.get(WAIT, ""), Patience.STEP))
        headers = {"hx-replace-url": form.address} if form.address is not None and error is None else {}
        return page_of("answer.html", {**context, "is_part": True}, headers={**UNSTORED, **headers})
    found = await _section(request, name, form) if error is None else {"error": problem_of(error)}
    return page_of(f"{name}.html", {"part": found}, headers=UNSTORED)


@router.get("/llms.txt")
@router.get("/SKILL.md")
async def skill(request: Request) -> Response:
    """How a program that reads may use the service, with the addresses of this one."""
    text = content("SKILL.md").decode().replace(SHOWN, f"{request.url.scheme}://{request.url.netloc}")
    return Response(text, media_type="text/markdown; charset=utf-8")


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    """Style sheet and scripts; their address changes with their content, so that they may be kept under it."""
    if name not in STATIC:
        raise HTTPException(404)
    kept = "public, max-age=31536000, immutable" if request.url.query == fingerprint(name) else "no-cache"
    return Response(content(name), media_type=STATIC[name], headers={"cache-control": kept})


async def _sent(request: Request) -> dict[str, str]:
    """The fields of a posted form.

    Raises:
        HTTPException: if it is too long.
    """
    body = await body_of(request)
    try:
        return dict(parse_qsl(body.decode("utf-8", "replace"), max_num_fields=200))
    except ValueError:
        raise HTTPException(422, "the form has too many fields") from None


def _read(query: Mapping[str, str]) -> tuple[Form, VramplanError | None]:
    """The form that was sent; the first one, and the reason, if it cannot be taken as it is."""
    try:
        form = Form.submitted(query)
        return (presets.applied_to(form, query["preset"]) if "preset" in query else form), None
    except RequestError as error:
        safe = {name: text for name, text in query.items() if name in _PARAMETERS and redacted(text) == text}
        return Form.submitted({**safe, "preset": ""}), error


async def _page(
    request: Request,
    form: Form,
    *,
    error: VramplanError | None = None,
    shown: str = "",
    pasted: str = "",
    is_example: bool = False,
) -> Response:
    context = await _answered(request, form, error, _PATIENCE.get(shown, Patience.STEP))
    wanted = set(sections.QUICK) if shown == "all" else {shown} & set(sections.SECTIONS)
    context["shown"] = {name: await _section(request, name, form) for name in sorted(wanted)} if context["result"] else {}
    context |= {
        "names": names,
        "fields": fields(),
        "groups": groups(),
        "first": FIRST_OF_GENERATION if presets.method_of(form) == "inference" else FIRST,
        "models": [model["id"] for model in list_models()],
        "gpus": _pickable(list_gpus()),
        "pasted": pasted,
        "is_example": is_example,
        "is_part": False,
    }
    return page_of("page.html", context, status=context["error"]["status"] if context["error"] else 200)


async def _answered(request: Request, form: Form, error: VramplanError | None, patience: Patience) -> Json:
    """What the answer's template shows; neither a result nor an error while the model has to be looked up."""
    context: Json = {
        "form": form,
        "presets": presets.PRESETS,
        "method": presets.method_of(form),
        "result": None,
        "error": None,
        "shown": {},
    }
    if error is None:
        try:
            origin = f"{request.url.scheme}://{request.url.netloc}"
            need = _need(form, patience)
            context["result"] = await in_thread(request, need, partial(sections.answered, form, origin, patience))
        except VramplanError as refused:
            error = refused
    return {**context, "error": None if error is None else problem_of(error)}


def _need(form: Form, patience: Patience) -> Need:
    """What an answer to the form may have to wait for, and the recipe that it is compared with."""
    needs = {need_of(one.values) for one in (form, form.beside) if one is not None}
    if needs == {Need.NOTHING}:
        return Need.NOTHING
    if patience is Patience.NONE:  # what is kept of models that are not bundled is asked of the state
        return Need.DATABASE
    return Need.BUILDER if Need.BUILDER in needs else Need.HUB


async def _section(request: Request, name: str, form: Form) -> Json:
    """What the template of a section shows; a refusal is shown there, the rest of the page stands."""
    try:
        is_long = name in sections.LONG
        need = Need.BUILDER if name == sections.TRACED else need_of(form.values)
        found = await in_thread(request, need, partial(sections.SECTIONS[name], form), is_long=is_long)
    except VramplanError as error:
        return {"form": form, "error": problem_of(error)}
    return {"form": form, "error": None, **found}


def _pickable(gpus: list[Json]) -> list[Json]:
    """Cards with what a picker says of each: real capacity, and the lowest price of one [USD/h]."""
    for gpu in gpus:
        paid = [offer["usd_per_hour"][0] / offer["count"] for offer in gpu["offers"] if offer["usd_per_hour"][1]]
        price = f", {min(paid):.2f} USD/h" if paid else ""
        gpu["label"] = f"{gpu['name']}, {gib(gpu['capacity_bytes'])}{price}"
    return gpus
