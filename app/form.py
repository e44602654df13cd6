"""The fields of the page: the request's own, under the libraries' names, as text. They stand in the address, and nothing else does.

A field that is empty is absent from the request. What no field stands for is kept as JSON in the field `extra`: every request has a form.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson

from app.answer import Json
from app.fields import OPTIMIZERS
from app.options import OPTIONS, PLAN_OPTIONS, Option, merged, names_of, versions_of
from app.pasted import canonical, spelling
from app.reading import read_json
from app.redaction import holds_token, redacted
from app.settings import applied
from estimator.errors import RequestError
from estimator.parallelism.options import Strategy

MODEL = "model"
EXTRA = "extra"
"""Fields of the request that have no place of their own, as JSON."""
AGAINST = "against"
"""Address of another recipe, shown beside this one."""

# Longer addresses are cut by some browsers and proxies on the way.
MAX_ADDRESS = 7_000
_MAX_VALUE = 2_000
_MAX_LONG = 60_000
_LONG = frozenset((EXTRA, AGAINST, "nvidia_smi"))

_FLAGS = {"true": True, "false": False}
_DTYPES = ("bfloat16", "float16", "float32")
CHOICES: Mapping[str, tuple[str, ...]] = {
    "dtype": (*_DTYPES, "auto"),
    "attn_implementation": ("sdpa", "eager", "flash_attention_2"),
    "quantization.bnb_4bit_quant_type": ("nf4", "fp4"),
    "quantization.bnb_4bit_compute_dtype": _DTYPES,
    "peft.bias": ("none", "all", "lora_only"),
    "trainer": ("transformers", "trl"),
    "inference.cache_implementation": ("dynamic", "static"),
    "hardware.strategy": ("ddp", "zero1", "zero2", "zero3", "fsdp", "device_map"),
    "engine": ("auto", "analytic", "trace"),
    "objective": ("largest_micro_batch", "longest_sequence", "most_margin"),
    "policy": ("cache_kept", "cache_given_back"),
    "sort": ("price", "margin", "batch", "length", "memory", "speed", "cost"),
}
SUGGESTIONS: Mapping[str, tuple[str, ...]] = {
    "training.optim": tuple(sorted(OPTIMIZERS)),
    "peft.target_modules": ("all-linear", "q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"),
    "training.loss_type": ("nll", "chunked_nll", "dft"),
}
# Where a form says something else than the command line.
_HELP: Mapping[str, str] = {
    "global_batch_size": "samples per optimizer step that the plan keeps; absent: batch × steps",
    "hardware.gpu": "capacity as CUDA reports it, and the lowest known price",
    "hardware.nvidia_smi": "what nvidia-smi printed on the machine, instead of a card",
    "stack": "versions to answer for: transformers=4.57,trl=0.25",
}
# Fields of a plan: none of an estimate.
_PLANNED = frozenset(option.path for group in PLAN_OPTIONS.values() for option in group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of the form."""

    name: str
    """In the form and in the address: the library's own name."""
    option: Option

    @property
    def path(self) -> str:
        return self.option.path

    @property
    def help(self) -> str:
        return _HELP.get(self.path, self.option.help)

    @property
    def choices(self) -> tuple[str, ...]:
        return ("true", "false") if self.option.kind == "flag" else CHOICES.get(self.path, ())

    @property
    def suggestions(self) -> tuple[str, ...]:
        return SUGGESTIONS.get(self.path, ())

    def value(self, text: str) -> Any:
        """What the text stands for in the request.

        Raises:
            RequestError: if it stands for nothing of this field's kind.
        """
        match self.option.kind:
            case "int":
                return self._whole(text)
            case "float":
                return self._number(text)
            case "flag":
                return self._flag(text)
            case "names":
                return versions_of(text) if self.path == "stack" else names_of(text)
            case _:
                return text

    def text(self, value: Any) -> str | None:
        """The text of a value; None if it has none that means the same."""
        text = self._written(value)
        if text is None or not text.strip():
            return None
        try:
            return text if self.value(text) == value and type(self.value(text)) is type(value) else None
        except RequestError:
            return None

    def _written(self, value: Any) -> str | None:
        if isinstance(value, bool):
            return str(value).lower() if self.option.kind == "flag" else None
        if isinstance(value, list):
            return ",".join(value) if self.option.kind == "names" and all(isinstance(one, str) for one in value) else None
        if isinstance(value, dict):
            return ",".join(f"{name}={version}" for name, version in value.items()) if self.path == "stack" else None
        return str(value) if isinstance(value, str | int | float) else None

    def _whole(self, text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 12):
            raise RequestError(f"{self.name}: {text[:40]!r} is not accepted; expected a whole number", field=self.path)
        return int(text)

    def _number(self, text: str) -> float:
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
            raise RequestError(f"{self.name}: {text[:40]!r} is not accepted; expected a number", field=self.path)
        return float(text)

    def _flag(self, text: str) -> bool:
        if text not in _FLAGS:
            raise RequestError(f"{self.name}: {text[:40]!r} is not accepted; expected true or false", field=self.path)
        return _FLAGS[text]


@cache
def groups() -> Mapping[str, tuple[Field, ...]]:
    """The fields under the headings of the command line."""
    tables = {**OPTIONS, **PLAN_OPTIONS}
    return {title: tuple(Field(name=option.path.rpartition(".")[2], option=option) for option in group) for title, group in tables.items()}


@cache
def fields() -> Mapping[str, Field]:
    """Every field by its name, but for the model and `extra`."""
    return {field.name: field for group in groups().values() for field in group}


@dataclass(frozen=True, slots=True)
class Form:
    """What stands in the form: texts by name, none of them empty."""

    values: Mapping[str, str]

    @classmethod
    def submitted(cls, query: Mapping[str, str]) -> "Form":
        """The form as sent.

        Raises:
            RequestError: if a field holds an access token, which must not stand in an address.
        """
        known = {name: _tidy(name, query[name]) for name in (MODEL, EXTRA, AGAINST, *fields()) if name in query}
        found = next((name for name, text in known.items() if holds_token(text)), None)
        if found is not None:
            raise RequestError(f"{found}: holds an access token, which does not belong into an address; it was not used", field=found)
        return cls({name: text for name, text in known.items() if text})

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> "Form":
        """The form that stands for a request of the contract."""
        form = cls._spelled_out(request)
        return form if form is not None else cls(_with_extra({}, dict(request)))

    @classmethod
    def _spelled_out(cls, request: Mapping[str, Any]) -> "Form | None":
        """With as many fields in their own place as can be; None where that would mean something else."""
        pasted = canonical(request)
        set_aside = [*pasted.ignored, *pasted.unmodelled, *pasted.evaluation]
        try:
            lost = {path: _at(request, spelling(request, path)) for path in set_aside}
            form = cls(_with_extra(*_taken(applied(pasted.payload, lost))))
            again = canonical(form._whole())
        except (RequestError, LookupError, TypeError):
            return None
        same = again.payload == pasted.payload and sorted(again.unmodelled) == sorted(pasted.unmodelled)
        return form if same and again.evaluation == pasted.evaluation else None

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, "")

    @property
    def beside(self) -> "Form | None":
        """The form of the recipe to compare with; None where there is none, or it cannot be read."""
        try:
            return Form.submitted(dict(parse_qsl(self[AGAINST], max_num_fields=200))) if self[AGAINST] else None
        except (RequestError, ValueError):
            return None

    def request(self) -> Json:
        """The request to `estimate` that the form stands for.

        Raises:
            RequestError: if a field cannot be read.
        """
        payload = self._whole()
        for name in _PLANNED:
            payload.pop(name, None)
        hardware = payload.get("hardware")
        if isinstance(hardware, dict) and "filter" in hardware:
            payload["hardware"] = {name: value for name, value in hardware.items() if name != "filter"}
        if MODEL not in payload:
            raise RequestError("model: is required; give an id of the catalogue or the Hub, or paste a config.json", field=MODEL)
        if "trainer" in payload and "inference" not in payload:
            payload.setdefault("training", {})
        return payload

    def plan_fields(self) -> Json:
        """The fields of a plan, the card's filter left out."""
        return {name: value for name, value in self._whole().items() if name in _PLANNED}

    def plan_request(self) -> Json:
        """The request to `plan`: for the global batch that the fields make up, if none is wanted."""
        payload = self.request() | self.plan_fields()
        payload.pop("sort", None)
        total = global_batch(payload) if payload.get("objective") != "longest_sequence" else None
        return payload if total is None else {"global_batch_size": total} | payload

    def cards_request(self) -> Json:
        """The request to `which`."""
        payload = self.plan_request()
        payload.pop("policy", None)  # is of a plan for one card
        hardware = payload.get("hardware") or {}
        kept = {name: hardware[name] for name in ("headroom", "strategy") if name in hardware}
        whole = self._whole()
        wanted = (whole.get("hardware") or {}).get("filter")
        sort = {"sort": whole["sort"]} if "sort" in whole else {}
        return payload | {"hardware": kept | ({"filter": wanted} if wanted else {})} | sort

    def edited(self, **texts: str) -> "Form":
        """The form with some fields written anew; empty ones are cleared."""
        return Form({name: text for name, text in {**self.values, **texts}.items() if text})

    def changed(self, setting: Mapping[str, Any]) -> "Form":
        """The form of the request with some of its fields set."""
        changed = Form.of(applied(self.request(), setting))
        kept = {name: self[name] for name in self.values if name == AGAINST or (name in fields() and fields()[name].path in _PLANNED)}
        return replace(changed, values={**changed.values, **kept})

    @property
    def query(self) -> str:
        """The form as an address has it behind the question mark."""
        order = (MODEL, *fields(), EXTRA, AGAINST)
        return urlencode({name: self.values[name] for name in order if name in self.values})

    @property
    def address(self) -> str | None:
        """The page with this form; None if it is too long for an address."""
        return f"/?{self.query}" if len(self.query) <= MAX_ADDRESS else None

    def _given(self) -> Iterator[tuple[Field, Any]]:
        for name, text in self.values.items():
            if name in fields():
                yield fields()[name], fields()[name].value(text)

    def _whole(self) -> Json:
        """The request with the fields of a plan."""
        given: Json = {MODEL: self[MODEL]} if self[MODEL] else {}
        for field, value in self._given():
            given = applied(given, {field.path: value})
        return merged(self.further(), given)

    def further(self) -> Json:
        """Fields without a place of their own.

        Raises:
            RequestError: if they are no JSON object.
        """
        return read_json(self[EXTRA].encode()) if self[EXTRA] else {}


def global_batch(payload: Mapping[str, Any]) -> int | None:
    """Samples per optimizer step over all cards that share them; None where the request leaves its micro-batch open."""
    training, hardware = payload.get("training") or {}, payload.get("hardware") or {}
    batch, steps = training.get("per_device_train_batch_size"), training.get("gradient_accumulation_steps")
    shares = (hardware.get("num_gpus") or 1) if Strategy(hardware.get("strategy") or Strategy.SINGLE).is_data_parallel else 1
    return None if batch is None else int(batch * (steps or 1) * shares)


def _tidy(name: str, text: str) -> str:
    return text.strip()[: _MAX_LONG if name in _LONG else _MAX_VALUE]


def _taken(payload: Mapping[str, Any]) -> tuple[dict[str, str], Json]:
    """The texts of the fields that have a place of their own, and the rest of the request."""
    values: dict[str, str] = {}
    rest: Json = {}
    places = {field.path: field for field in fields().values()}

    def take(node: Mapping[str, Any], prefix: str) -> Json:
        left: Json = {}
        for name, value in node.items():
            path = prefix + name
            text = places[path].text(value) if path in places else None
            if text is not None and not holds_token(text):
                values[places[path].name] = text
            elif isinstance(value, dict) and value and path != MODEL:
                inner = take(value, f"{path}.")
                if inner:
                    left[name] = inner
            elif value is not None:
                left[name] = value
        return left

    rest = take(payload, "")
    if isinstance(rest.get(MODEL), str):
        values[MODEL] = rest.pop(MODEL)
    return values, rest


def _with_extra(values: dict[str, str], rest: Json) -> dict[str, str]:
    return {**values, EXTRA: redacted(orjson.dumps(rest).decode())} if rest else values


def _at(payload: Mapping[str, Any], path: str) -> Any:
    found: Any = payload
    for name in path.split("."):
        found = found[name]
    return found
