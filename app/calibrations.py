"""`/v1/calibrations`: measurements come in, and what follows from them goes out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from app.answer import SCHEMA_VERSION, Json
from app.credentials import KEY_HEADER
from app.prediction import predict
from app.reading import check_depth, read_json
from app.redaction import redacted
from app.transfer import body_of
from app.work import Need, in_thread
from calibration import gate
from calibration.comparison import rows_of
from calibration.record import Record
from estimator.errors import FieldError, RequestError, SourceUnavailableError
from estimator.fitted import dumped
from estimator.sources import bounds

if TYPE_CHECKING:
    from app.state.measurements import Posted

MAX_REASONS = 10
Result = TypeVar("Result")

router = APIRouter()


@router.post("/v1/calibrations", summary="A measurement of one's own", status_code=201)
async def post(request: Request) -> Response:
    """One line of the file that `vramplan calibrate run` writes. Posting it again changes nothing. Needs a key: `X-API-Key`."""
    payload = read_json(await body_of(request))
    secret = request.headers.get(KEY_HEADER, "").strip()
    admitted = await _in_state(request, partial(admit, secret=secret, payload=payload))
    if (found := admitted.found) is None:  # what is predicted may have to be built and traced, and holds up no other use of the state
        reasons = await in_thread(request, Need.BUILDER, partial(reasons_against, admitted.record))
        found = await _in_state(request, partial(keep, admitted=admitted, reasons=reasons))
    request.app.state.metrics.measurements.labels(found.status.value if found.is_new else "known").inc()
    shown = {"schema_version": SCHEMA_VERSION, **_shown(found)}
    return Response(orjson.dumps(shown), status_code=201 if found.is_new else 200, media_type="application/json")


@router.get("/v1/calibrations/current", summary="The corrections in force")
async def current(request: Request) -> Response:
    """What accepted measurements determine; `corrections` is null while nothing is in force."""
    return _json(await _in_state(request, in_force))


@router.get("/v1/calibrations/history", summary="How the corrections came to be")
async def history(request: Request) -> Response:
    """What was put in force, refused and taken back, the newest first."""
    return _json(await _in_state(request, happened))


@router.get("/v1/calibrations/{record_hash}", summary="What became of a measurement")
async def posted(request: Request, record_hash: str) -> Response:
    """`accepted`, `quarantined` (with reasons, until someone has looked), `released` or `rejected`."""
    return _json(await _in_state(request, partial(status_of, record_hash=record_hash)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A record that may be kept."""

    record: Record
    key_id: str
    found: "Posted | None"
    """What became of it, if it was posted before."""


def admit(database: Any, *, secret: str, payload: Mapping[str, Any]) -> Admitted:
    """The record of a payload, and what is known of it.

    Raises:
        HTTPException: without a key that is known.
        RequestError: if the payload is no record.
        ConfigError: if its config is out of bounds.
    """
    from app.state import keys, measurements

    key = keys.find(database, secret)
    if key is None:
        raise HTTPException(401, "X-API-Key: a key of this service is needed to post measurements", {"www-authenticate": "X-API-Key"})
    record = read_record(payload)
    return Admitted(record=record, key_id=key.id, found=measurements.find(database, measurements.hash_of(record)))


def reasons_against(record: Record) -> tuple[str, ...]:
    """Why a record is set aside; empty if it is not. It is predicted for this."""
    rows, _ = rows_of([record], predict)
    reasons = gate.reasons(record, rows[0] if rows else None)[:MAX_REASONS]
    return tuple(redacted(reason)[:300] for reason in reasons)


def keep(database: Any, *, admitted: Admitted, reasons: tuple[str, ...]) -> "Posted":
    """What becomes of a record."""
    from app.state import measurements

    return measurements.keep(database, admitted.record, admitted.key_id, reasons)


def read_record(payload: Mapping[str, Any]) -> Record:
    """The record of a payload.

    Raises:
        RequestError, ConfigError: if it is none.
    """
    check_depth(payload)
    try:
        record = Record.model_validate(payload)
    except ValidationError as error:
        errors = [
            FieldError(field=".".join(map(str, one["loc"])) or "record", message=redacted(one["msg"]))
            for one in error.errors(include_url=False, include_context=False, include_input=False)[:MAX_REASONS]
        ]
        raise RequestError("; ".join(f"{one.field}: {one.message}" for one in errors), errors=errors) from None
    bounds.check(record.case.config)
    if record.figures is None:
        raise RequestError("figures: required; a dry run measures nothing", field="figures")
    return record


def in_force(database: Any) -> Json:
    """The corrections in force, as `vramplan calibrate fit` writes them."""
    from app.state import corrections

    found = corrections.current(database)
    return {
        "schema_version": SCHEMA_VERSION,
        "version": None if found is None else found.version,
        "corrections": None if found is None else orjson.loads(dumped(found)),
    }


def happened(database: Any) -> Json:
    """The history of corrections."""
    from app.state import corrections

    events = corrections.history(database)
    shown = [{"version": one.version, "action": one.action, "reason": one.reason, "at": one.at} for one in events]
    return {"schema_version": SCHEMA_VERSION, "events": shown}


def status_of(database: Any, *, record_hash: str) -> Json:
    """What became of a record.

    Raises:
        HTTPException: if there is no such record.
    """
    from app.state import measurements

    found = measurements.find(database, record_hash) if len(record_hash) == 64 else None
    if found is None:
        raise HTTPException(404, "no such measurement")
    return {"schema_version": SCHEMA_VERSION, **_shown(found)}


def _shown(found: Any) -> Json:
    return {"hash": found.hash, "status": found.status.value, "reasons": list(found.reasons)}


async def _in_state(request: Request, call: Callable[[Any], Result]) -> Result:
    state = request.app.state.state
    if state is None:
        raise SourceUnavailableError("this service keeps no state, and so takes and gives no measurements", retry_after_seconds=3600)
    result: Result = await request.app.state.workers.run(partial(_with_database, state, call), need=Need.DATABASE)
    return result


def _with_database(state: Any, call: Callable[[Any], Result]) -> Result:
    from app.state.database import StateError
    from app.state.opening import unavailable

    try:
        return call(state.ready())
    except StateError:
        raise unavailable() from None


def _json(content: Json) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
