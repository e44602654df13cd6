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
    """One run to measure, `num_steps` times: optimizer steps over full-length batches of synthetic tokens, or calls of `generate`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str | None = None
    """Catalogue or Hub id, for people; the config decides."""
    config: JsonObject
    """Content of the model's config.json."""
    request: JsonObject
    """The request's fields that decide the run, under the names of the contract; length and batch are in `training`."""
    num_steps: int = Field(default=2, ge=2, le=16)
    """Optimizer steps, or calls of `generate`; the last one is reported, when optimizer states exist."""
    checkpoint: str | None = Field(default=None, min_length=1, max_length=200)
    """Hub id of the weights that are loaded, `ID` or `ID@REVISION`; None for random ones, which take the same memory."""
    cap_bytes: int | None = Field(default=None, gt=0)
    """What the process may have of the card, context included, so that the card is as full as a smaller one [bytes]."""

    @model_validator(mode="after")
    def _is_one_run(self) -> Self:
        section, sizes = self._sizes
        fields = self.request.get(section)
        if not isinstance(fields, dict) or (section == "training" and self.request.get("inference") is not None):
            raise ValueError("training: either training or inference is required to measure a case")
        for name in sizes:
            value = fields.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{section}.{name}: a positive integer is required to measure a case; got {value!r}")
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

    def with_hub_weights(self, revision: JsonValue = None) -> "Case":
        """The same case with the weights of its model on the Hub.

        Raises:
            RequestError: if the model has no name there, or the revision is none.
        """
        from estimator.sources.hub import check_revision

        if self.model is None:
            raise RequestError("model: weights from the Hub need the model's id there; got a config", field="model")
        if revision is not None and not isinstance(revision, str):
            raise RequestError(f"revision: {revision!r:.120} is not accepted; expected a branch, tag or commit", field="revision")
        checkpoint = self.model if revision is None else f"{self.model}@{check_revision(revision)}"
        try:
            return Case.model_validate({**self.model_dump(), "checkpoint": checkpoint})
        except ValueError as error:
            raise RequestError(f"{_first_message(error)}; got {checkpoint!r:.240}", field="checkpoint") from error

    @property
    def is_training(self) -> bool:
        return self.request.get("training") is not None

    @property
    def _sizes(self) -> tuple[str, tuple[str, ...]]:
        """Where batch and length stand: the section, and the fields in it."""
        if self.is_training:
            return "training", ("per_device_train_batch_size", "max_length")
        return "inference", ("batch_size", "prompt_length", "max_new_tokens")

    @property
    def training(self) -> JsonObject:
        """Fields of `TrainingArguments` / `SFTConfig` as given."""
        return self._section("training")

    @property
    def inference(self) -> JsonObject:
        """Arguments of `generate` as given."""
        return self._section("inference")

    def _section(self, name: str) -> JsonObject:
        fields = self.request[name]
        assert isinstance(fields, dict)  # the validator saw to it
        return fields

    @property
    def trainer(self) -> str:
        return str(self.request.get("trainer", "transformers"))

    @property
    def batch_size(self) -> int:
        """Sequences in one micro-batch."""
        section, (batch, *_) = self._sizes
        return _int(self._section(section)[batch])

    @property
    def sequence_length(self) -> int:
        """Length of every sequence, at the end of generation where there is one [tokens]."""
        section, (_, *lengths) = self._sizes
        return sum(_int(self._section(section)[name]) for name in lengths)

    def at(self, *, batch_size: int | None = None, sequence_length: int | None = None, cap_bytes: int | None = None) -> "Case":
        """The same case with another batch, another length (of a prompt, where it generates), or under a cap."""
        section, (batch, length, *_) = self._sizes
        given = {batch: batch_size, length: sequence_length}
        fields = {**self._section(section), **{name: value for name, value in given.items() if value is not None}}
        request = {**self.request, section: fields}
        return self.model_copy(update={"request": request, "cap_bytes": self.cap_bytes if cap_bytes is None else cap_bytes})

    @property
    def hash(self) -> str:
        """Identifies what is run, whatever the order of keys, nulls, or the name the model goes by."""
        content: dict[str, object] = {
            "config": _without_nulls(self.config),
            "request": _without_nulls(self.request),
            "num_steps": self.num_steps,
        }
        if self.cap_bytes is not None:
            content["cap_bytes"] = self.cap_bytes
        if self.checkpoint is not None:
            content["checkpoint"] = self.checkpoint
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
