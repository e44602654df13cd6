"""Everything that can be wrong with a question, as one tree.

VramplanError
├── RequestError          what was asked cannot be read or contradicts itself      422
│   └── UnknownNameError  a name (GPU, optimizer, dtype, field …) that is not known  422
├── ConfigError           the model's config is malformed or out of bounds          422
├── SourceError           the config could not be obtained
│   ├── ModelNotFoundError                                                          404
│   ├── AccessDeniedError gated or private                                          403
│   └── SourceUnavailableError  the Hub is down, slow or unreachable                503
└── InspectionError       the guarded process could not build the model             422
    ├── TraceError            the step cannot run on tensors without content        422
    └── InspectionLimitError  it ran into its limit of time or memory               422
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldError:
    """One field that is wrong: where it stands and what is wrong with it."""

    field: str
    message: str


class VramplanError(Exception):
    """Root of all errors that a user may see."""

    status = 500
    title = "Internal error"

    def __init__(self, message: str, *, field: str | None = None, errors: Iterable[FieldError] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.errors = tuple(errors) or ((FieldError(field=field, message=message),) if field else ())


class RequestError(VramplanError):
    """The request cannot be read, or contradicts itself."""

    status = 422
    title = "Invalid request"


class UnknownNameError(RequestError):
    """A name that is not known; the message lists what would be accepted."""

    title = "Unknown name"

    @classmethod
    def of(cls, field: str, value: object, accepted: Iterable[str]) -> "UnknownNameError":
        return cls(f"{field}: {value!r} is not known; accepted: {', '.join(sorted(accepted))}", field=field)


class ConfigError(VramplanError):
    """A model config that is malformed, hostile or out of bounds."""

    status = 422
    title = "Invalid model config"


class SourceError(VramplanError):
    """The config could not be obtained."""

    status = 502
    title = "Model source failed"


class ModelNotFoundError(SourceError):
    """No such model, revision or file."""

    status = 404
    title = "Model not found"


class AccessDeniedError(SourceError):
    """The model is gated or private, and the token (or its absence) does not open it."""

    status = 403
    title = "Access denied"


class SourceUnavailableError(SourceError):
    """The Hub is down, too slow, or cannot be reached from here."""

    status = 503
    title = "Model source unavailable"

    def __init__(self, message: str, *, field: str | None = None, retry_after_seconds: int = 30) -> None:
        super().__init__(message, field=field)
        self.retry_after_seconds = retry_after_seconds


class InspectionError(VramplanError):
    """transformers could not build the model from its config."""

    status = 422
    title = "Model cannot be inspected"


class TraceError(InspectionError):
    """The step cannot run on tensors without content; the message says where it stopped."""

    title = "Step cannot be traced"


class InspectionLimitError(InspectionError):
    """Building the model exceeded the limit of time or memory."""

    title = "Model inspection exceeded its limits"
