"""Errors as RFC 9457 problem documents. Of the input only what messages quote is echoed, and no token."""

from collections.abc import Iterable
from http import HTTPStatus

from app.answer import Json
from app.redaction import redacted
from estimator.errors import FieldError, VramplanError

MEDIA_TYPE = "application/problem+json"


def problem_of(error: VramplanError) -> Json:
    """The document for one of our own errors."""
    return problem(error.status, error.title, error.message, errors=error.errors, kind=_kind(error))


def problem(status: int, title: str | None, detail: str, *, errors: Iterable[FieldError] = (), kind: str = "about:blank") -> Json:
    """A problem document."""
    return {
        "type": kind,
        "title": title or HTTPStatus(status).phrase,
        "status": status,
        "detail": redacted(detail),
        "errors": [{"field": redacted(e.field), "message": redacted(e.message)} for e in errors],
    }


def _kind(error: VramplanError) -> str:
    """A stable name of the error's class: `urn:vramplan:unknown-name`."""
    words = "".join(f"-{c.lower()}" if c.isupper() else c for c in type(error).__name__.removesuffix("Error")).lstrip("-")
    return f"urn:vramplan:{words}"
