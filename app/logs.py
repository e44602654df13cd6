"""Logs as lines of JSON on standard error, without tokens, keys, addresses of callers or names of models."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import orjson

from app.redaction import redacted

LOGGER = logging.getLogger("vramplan")
_OWN = ("vramplan", "uvicorn", "uvicorn.error")


class JsonFormatter(logging.Formatter):
    """One object a line; what was passed as `extra={"fields": …}` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redacted(record.getMessage()),
        }
        for name, value in getattr(record, "fields", {}).items():
            entry[name] = redacted(value) if isinstance(value, str) else value
        if record.exc_info:
            entry["exception"] = redacted_lines(self.formatException(record.exc_info))
        return orjson.dumps(entry, default=lambda value: redacted(str(value))).decode()


class TextFormatter(logging.Formatter):
    """For people who watch it run."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={value}" for name, value in getattr(record, "fields", {}).items())
        text = redacted(f"{record.levelname.lower():<8}{record.getMessage()} {fields}".rstrip())
        return text + ("\n" + redacted_lines(self.formatException(record.exc_info)) if record.exc_info else "")


def redacted_lines(text: str) -> str:
    """Several lines without secrets; the ends of lines stay."""
    return "\n".join(map(redacted, text.splitlines()))


def configure(level: str, style: str) -> None:
    """Sends the logs of the service and of uvicorn to standard error."""
    # For the whole process, other libraries' loggers included: a formatter that wants a thread, a process or a line gets none.
    # Nothing of it is printed here, and finding it out is a tenth of what a request costs.
    # Source: Python, docs, howto/logging, Optimization.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    for name in _OWN:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    # uvicorn's own lines hold paths, and so names of models
    logging.getLogger("uvicorn.access").disabled = True
