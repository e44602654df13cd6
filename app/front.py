"""The door: who may come in, with what, and what is noted of it. Plain ASGI, since every request passes here."""

import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import corrections
from app.credentials import headers_of, hub_token
from app.flood import RateLimiter, Refusal
from app.in_force import Source
from app.logs import LOGGER
from app.metrics import Metrics
from estimator.errors import VramplanError
from estimator.sources.access import Access, using

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

Respond = Callable[[Refusal | VramplanError], ASGIApp]

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
# FastAPI's documentation page brings scripts of its own from a CDN: it gets a policy that lets them in.
DOCS_POLICY = (
    "default-src 'none'; script-src https://cdn.jsdelivr.net 'unsafe-inline'; style-src https://cdn.jsdelivr.net; "
    "img-src 'self' data: https://fastapi.tiangolo.com; connect-src 'self'"
)
_HEADERS = tuple((name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items())
_DOCS_HEADERS = tuple((name, DOCS_POLICY.encode() if name == b"content-security-policy" else value) for name, value in _HEADERS)
# Asked by machines that watch the service: never counted, never turned away.
_WATCHED = frozenset(("/healthz", "/readyz", "/metrics"))
_UNSAFE = frozenset(("POST", "PUT", "PATCH", "DELETE"))


class Front:
    """Lets requests in, with the access that their token gives.

    Args:
        app: what answers.
        allowed_hosts: names the service may be asked under; `*` for any.
        limiter: of requests by address.
        max_concurrent: requests under way at once.
        access: what everyone has; a caller's token is added to it.
        in_force: the corrections to answer with.
        metrics: where requests are counted.
        respond: makes an answer of a refusal.
        tracer: of spans; None for none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: tuple[str, ...],
        limiter: RateLimiter,
        max_concurrent: int,
        access: Callable[..., Access],
        in_force: Source,
        metrics: Metrics,
        respond: Respond,
        tracer: "Tracer | None" = None,
    ) -> None:
        self._app = app
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._limiter = limiter
        self._max_concurrent = max_concurrent
        self._access = access
        self._in_force = in_force
        self._metrics = metrics
        self._respond = respond
        self._tracer = tracer
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, request_id, status = time.perf_counter(), secrets.token_hex(8), 500
        method = scope["method"]
        is_head = method == "HEAD"
        if is_head:
            scope = {**scope, "method": "GET"}  # FastAPI's routes know no HEAD. Source: RFC 9110, sections 9.1 and 9.3.2
        added = _DOCS_HEADERS if scope["path"] == "/docs" else _HEADERS

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                own = [header for header in added if header[0] not in given]
                message["headers"] = [*message["headers"], *own, (b"x-request-id", request_id.encode())]
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        span = self._tracer.start_span("request") if self._tracer is not None else None
        self._active += 1
        self._metrics.active.inc()
        try:
            await self._let_in(scope, receive, send_with_headers)
        finally:
            self._active -= 1
            self._metrics.active.dec()
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.answered(method, route, status, seconds)
            method = method[:16]
            fields = {
                "request_id": request_id,
                "method": method,
                "route": route,
                "status": status,
                "milliseconds": round(1000 * seconds, 2),
            }
            LOGGER.info("request", extra={"fields": fields})
            if span is not None:
                span.update_name(f"{method} {route}")
                span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
                span.set_attribute("vramplan.request_id", request_id)
                span.end()

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope["headers"])
        answer: ASGIApp = self._app
        access = self._access()
        try:
            refusal = None if scope["path"] in _WATCHED else await self._refuses(scope, headers)
            if refusal is not None:
                self._metrics.refused.labels(refusal.reason).inc()
                answer = self._respond(refusal)
            else:
                access = self._access(token=hub_token(headers))
        except VramplanError as error:
            answer = self._respond(error)
        with using(access), corrections.in_force(self._in_force()):
            await answer(scope, receive, send)

    async def _refuses(self, scope: Scope, headers: dict[str, str]) -> Refusal | None:
        host = headers.get("host", "")
        if "*" not in self._allowed_hosts and _name(host) not in self._allowed_hosts:
            return Refusal(status=421, reason="host", detail="the service does not answer under this name", retry_after_seconds=0)
        if scope["method"] in _UNSAFE and _is_from_elsewhere(headers, host):
            return Refusal(status=403, reason="origin", detail="pages of other origins may not post here", retry_after_seconds=0)
        client = scope.get("client")
        if (refusal := await self._limiter.refuses(client[0] if client else "")) is not None:
            return refusal
        if self._active > self._max_concurrent:
            return Refusal(
                status=503, reason="concurrency", detail="too many requests are under way; try again in a moment", retry_after_seconds=1
            )
        return None


def _name(host: str) -> str:
    """A host without its port."""
    return host.rpartition(":")[0].lower() if host.rpartition(":")[2].isdigit() else host.lower()


def _is_from_elsewhere(headers: dict[str, str], host: str) -> bool:
    """Whether a browser says that another site's page sends this. Programs send neither header.

    Source: Fetch Metadata Request Headers, section 2.4 (Sec-Fetch-Site); RFC 6454, section 7 (Origin).
    """
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != host.lower()
    except ValueError:
        return True
