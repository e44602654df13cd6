"""Spans for OpenTelemetry, where they are asked for: routes, statuses and durations, never a path, a query or a header."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.errors import RequestError

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Where spans are made, and the way to end it."""

    tracer: "Tracer"
    close: Callable[[], None]
    """Sends what is left, and ends the thread that sends."""


def spans_of_environment() -> Spans:
    """Spans that are sent where the `OTEL_…` variables say, by OTLP over HTTP.

    Raises:
        RequestError: if the SDK is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise RequestError("traces: OpenTelemetry's SDK is not installed; pip install 'vramplan[otel]'", field="traces") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "vramplan"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(tracer=provider.get_tracer("vramplan"), close=provider.shutdown)
