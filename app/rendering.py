"""Templates made into pages that hold to the page's policy: scripts and styles from here, nothing inline, nobody else asked."""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse

from app.wording import change_sentence, corrections_sentence
from estimator.units import gib

_HERE = Path(__file__).parent
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
# `same-origin`: under `no-referrer` browsers send forms with the origin `null`, which a check of the origin cannot tell from a stranger's.
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "same-origin"}
# Of a part that may be of somebody's private model.
UNSTORED = {"cache-control": "no-store"}
STATIC = {"style.css": "text/css", "page.js": "text/javascript", "htmx.min.js": "text/javascript"}


def page_of(template: str, context: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A template with its context."""
    return HTMLResponse(_templates().get_template(template).render(context), status_code=status, headers={**HEADERS, **(headers or {})})


@cache
def content(name: str) -> bytes:
    """A file that is served as it is."""
    return (_HERE / "static" / name).read_bytes()


@cache
def fingerprint(name: str) -> str:
    """What changes with a file's content."""
    return hashlib.sha256(content(name)).hexdigest()[:12]


def _address(name: str) -> str:
    """Where a file is served."""
    return f"/static/{name}?{fingerprint(name)}"


def _breakable(name: str) -> Markup:
    """A long name that may go on in the next line after an underscore."""
    return Markup("_<wbr>").join(name.split("_"))


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:+.{digits}f} %"


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "gib": gib,
        "change": change_sentence,
        "corrections": corrections_sentence,
        "breakable": _breakable,
        "percent": _percent,
    }
    environment.globals["static"] = _address
    return environment
