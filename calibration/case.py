"""What to run: a model and a recipe, as data that a worker can rebuild anywhere."""

import hashlib
from typing import Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from estimator.errors import RequestError, UnknownNameError

JsonObject = dict[str, JsonValue]

# The parts of a request that decide what is run. `hardware`, `stack` and `engine` are about the answer, not about the run.
_RUN_FIELDS = (
    "dtype",
    "attn_implementation",
    "quantization",
    "peft",
    "prepare_model_for_kbit_training",
    "trainer",
    "training",
    "padded",
    "inference",
)
# What else a request may hold.
_OTHER_FIELDS = ("model", "revision", "hardware", "stack", "engine")


def _without_nulls(value: JsonValue) -> JsonValue:
    """A null means the same as an absent field, so it must not change the hash."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


class Case(BaseModel):
    """One training run to measure: full-length batches of synthetic tokens, `num_steps` optimizer steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str | None = None
    """Catalogue or Hub id, for people; the config decides."""
    config: JsonObject
    """Content of the model's config.json."""
    request: JsonObject
    """The request's fields that decide the run, under the names of the contract; length and batch are in `training`."""
    num_steps: int = Field(default=2, ge=2, le=16)
    """Optimizer steps; the last one is reported, when optimizer states exist."""

    @model_validator(mode="after")
    def _is_a_training_run(self) -> Self:
        training = self.request.get("training")
        if not isinstance(training, dict):
            raise ValueError("training: required; inference is not measured yet")
        for name in ("per_device_train_batch_size", "max_length"):
            value = training.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"training.{name}: a positive integer is required to measure a case; got {value!r}")
        if self.config.get("model_type") is None:
            raise ValueError("config.model_type: required")
        if self.request.get("trainer", "transformers") not in ("transformers", "trl"):
            raise ValueError("trainer: accepted are transformers, trl")
        return self

    @classmethod
    def from_request(cls, request: JsonObject, config: JsonObject) -> "Case":
        """The case of a request whose model resolved to `config`.

        Raises:
            RequestError: if the request has no single run in it.
        """
        if unknown := sorted(set(request) - {*_RUN_FIELDS, *_OTHER_FIELDS}):
            raise UnknownNameError.of("request", unknown[0], (*_RUN_FIELDS, *_OTHER_FIELDS))
        model = request.get("model")
        run = {name: _without_nulls(request[name]) for name in _RUN_FIELDS if request.get(name) is not None}
        try:
            return cls(model=model if isinstance(model, str) else None, config=config, request=run)
        except ValueError as error:
            raise RequestError(_first_message(error)) from error

    @property
    def training(self) -> JsonObject:
        """Fields of `TrainingArguments` / `SFTConfig` as given."""
        training = self.request["training"]
        assert isinstance(training, dict)  # the validator saw to it
        return training

    @property
    def trainer(self) -> str:
        return str(self.request.get("trainer", "transformers"))

    @property
    def batch_size(self) -> int:
        """Sequences in one micro-batch."""
        return _int(self.training["per_device_train_batch_size"])

    @property
    def sequence_length(self) -> int:
        """Length of every sequence [tokens]."""
        return _int(self.training["max_length"])

    def at(self, *, batch_size: int | None = None, sequence_length: int | None = None) -> "Case":
        """The same case with another batch or length."""
        training = dict(self.training)
        if batch_size is not None:
            training["per_device_train_batch_size"] = batch_size
        if sequence_length is not None:
            training["max_length"] = sequence_length
        return Case(model=self.model, config=self.config, request={**self.request, "training": training}, num_steps=self.num_steps)

    @property
    def hash(self) -> str:
        """Identifies what is run, whatever the order of keys, nulls, or the name the model goes by."""
        content = {"config": _without_nulls(self.config), "request": _without_nulls(self.request), "num_steps": self.num_steps}
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def _int(value: JsonValue) -> int:
    assert isinstance(value, int)
    return value


def _first_message(error: ValueError) -> str:
    """Pydantic's first complaint without its framing."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return str(error)
    first = errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
