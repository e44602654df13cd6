"""From bytes or a mapping to a checked request, or an error that names the field, the value and what would be accepted."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from app import fields
from app.pasted import canonical
from app.redaction import redacted
from app.request import InferenceFields, PeftFields, PlanRequest, QuantizationFields, Request, SweepRequest, TrainingFields
from app.training import OPTIM_ARGS
from estimator.errors import FieldError, RequestError
from estimator.optimizers import MODELLED

MAX_BODY_BYTES = 1 << 20
MAX_DEPTH = 32
_SHOWN_ERRORS = 8
_SHOWN_CHARACTERS = 80

# What fields accept that may be of several kinds, of which pydantic would name the first only.
_AXIS = "expected numbers from 1 on: one, a list, or first..last:step such as 512..8192:512"
_EXPECTED: Mapping[str, str] = {
    "global_batch_size": "expected a whole number of samples, 1 to 1,048,576, or null: as large as fits",
    "hardware.gpu": "expected a card such as 'rtx4090', 'a100 40gb' or '23.5GiB'; `vramplan gpus` lists those known",
    "hardware.headroom": "expected bytes, a size such as 512MiB, or a share such as 5%",
    "training.optim": f"expected one of {', '.join(sorted(MODELLED))}",
    "training.optim_args": OPTIM_ARGS,
    "training.optim_args.*": "expected text, a number, true or false",
    "training.weight_decay": "expected a number from 0 on",
    "sweep": "expected the axes per_device_train_batch_size, max_length and r",
    "sweep.per_device_train_batch_size": _AXIS,
    "sweep.max_length": _AXIS,
    "sweep.r": _AXIS,
}

RequestT = TypeVar("RequestT", bound=Request)
RequestT_co = TypeVar("RequestT_co", bound=Request, covariant=True)

_KNOWN: Mapping[str, frozenset[str]] = {
    "quantization": fields.BITS_AND_BYTES_CONFIG,
    "peft": fields.LORA_CONFIG,
    "training": fields.TRAINING,
    "inference": fields.GENERATION_CONFIG,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question(Generic[RequestT_co]):
    """A checked request and what was set aside while reading it."""

    request: RequestT_co
    ignored: tuple[str, ...]
    unmodelled: tuple[str, ...]
    evaluation: tuple[str, ...]
    """Fields of an evaluation during training; empty without one."""


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object of at most `MAX_BODY_BYTES`, without NaN or infinities, in which no key stands twice.

    Raises:
        RequestError: if it is anything else.
    """
    if len(body) > MAX_BODY_BYTES:
        raise RequestError(f"the request is {len(body):,} bytes long; at most {MAX_BODY_BYTES:,} are accepted")
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the request is not JSON: {redacted(str(error))}") from None
    if not isinstance(payload, dict):
        raise RequestError("the request must be a JSON object; see /docs for an example")
    _check_keys(body)
    return payload


def _check_keys(body: bytes) -> None:
    """Refuses keys that stand twice in one object: which of both was meant cannot be known."""
    try:
        json.loads(body, object_pairs_hook=_unique, parse_int=str, parse_float=str)
    except RecursionError:
        raise RequestError(f"the request is nested deeper than {MAX_DEPTH} levels") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise repeated_key(key)
        found[key] = value
    return found


def repeated_key(key: object) -> RequestError:
    """The error for a key that stands twice in one object."""
    name = _shown(key)
    return RequestError(f"{name}: is given twice in one object; give it once", field=name)


def read_estimate(payload: Mapping[str, Any]) -> Question[Request]:
    """The question of a payload in the form of the contract's `Request`."""
    return _without_filter(_read(payload, Request))


def read_sweep(payload: Mapping[str, Any]) -> Question[SweepRequest]:
    """The question of a payload to `sweep`."""
    return _without_filter(_read(payload, SweepRequest))


def read_plan(payload: Mapping[str, Any]) -> Question[PlanRequest]:
    """The question of a payload to `plan`."""
    return _read(payload, PlanRequest)


def _without_filter(question: Question[RequestT]) -> Question[RequestT]:
    hardware = question.request.hardware
    if hardware is not None and hardware.filter is not None:
        raise RequestError("hardware.filter: only a plan looks at several cards; give gpu or capacity_gib", field="hardware.filter")
    return question


def read_quantization(stored: Mapping[str, Any]) -> QuantizationFields:
    """The `quantization_config` of a checkpoint, by the same rules as a pasted one."""
    quantization = _read({"model": "-", "quantization": dict(stored)}, Request).request.quantization
    assert quantization is not None
    return quantization


def _read(payload: Mapping[str, Any], kind: type[RequestT]) -> Question[RequestT]:
    check_depth(payload)
    pasted = canonical(payload)
    try:
        request = kind.model_validate(pasted.payload)
    except ValidationError as error:
        raise _request_error(error, kind) from None
    return Question(
        request=request, ignored=tuple(pasted.ignored), unmodelled=tuple(pasted.unmodelled), evaluation=tuple(pasted.evaluation)
    )


def check_depth(payload: object) -> None:
    """Refuses what is nested too deep.

    Raises:
        RequestError: if it is.
    """
    level: list[object] = [payload]
    for _ in range(MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise RequestError(f"the request is nested deeper than {MAX_DEPTH} levels")


def _children(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _request_error(error: ValidationError, kind: type[Request]) -> RequestError:
    details = error.errors(include_url=False, include_context=True)
    # A union reports every member; the branch that got furthest is what the user meant, the first error says enough.
    seen: dict[str, FieldError] = {}
    for detail in details:
        if len(seen) == _SHOWN_ERRORS:  # each takes a search for what was meant, and there may be tens of thousands
            break
        field = _location(detail["loc"])
        seen.setdefault(field, FieldError(field=field, message=_message(field, detail, kind)))
    # Of a list, the element that is wrong says more than that a number would have been accepted as well.
    errors = [e for e in seen.values() if not any(other.startswith(f"{e.field}.") for other in seen)]
    return RequestError("; ".join(e.message for e in errors), errors=errors)


def _location(loc: tuple[int | str, ...]) -> str:
    """Dotted name of a field; the members of unions that pydantic adds are left out."""
    parts = [
        str(part)
        for part in loc
        if not re.fullmatch(r"(list|dict|constrained-|function-|tagged-).*|str|int|float|bool|InlineModel|literal\[.*", str(part))
    ]
    return ".".join(_shown(part) for part in parts) or "request"


def _message(field: str, detail: ErrorDetails, kind: type[BaseModel]) -> str:
    if detail["type"] == "extra_forbidden":
        section, _, name = field.rpartition(".")
        return f"{field}: not a known field{_suggestion(section, name, kind)}"
    if detail["type"] == "missing":
        return f"{field}: is required"
    expected = _EXPECTED.get(re.sub(r"\.\d+$", "", field)) or _EXPECTED.get(f"{field.rpartition('.')[0]}.*") or redacted(detail["msg"])
    given = detail["input"]
    quoted = repr(_shown(given)) if isinstance(given, str) else _shown(given)
    return f"{field}: {quoted} is not accepted; {expected[0].lower()}{expected[1:]}"


def _suggestion(section: str, name: str, kind: type[BaseModel]) -> str:
    models: dict[str, type[BaseModel]] = {
        "": kind,
        "quantization": QuantizationFields,
        "peft": PeftFields,
        "training": TrainingFields,
        "inference": InferenceFields,
    }
    model = models.get(section)
    if model is None:
        return ""
    known = set(model.model_fields) | _KNOWN.get(section, frozenset())
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; accepted: {', '.join(sorted(model.model_fields))}"


def _shown(value: object) -> str:
    """A value as messages quote it: short, and never a whole object."""
    scalar = value is None or isinstance(value, str | int | float)
    return redacted(str(value) if scalar else type(value).__name__)[:_SHOWN_CHARACTERS]
