"""What is counted, for Prometheus. Labels have few values: routes as they are written, never a path, a model or a caller."""

import os

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

CONTENT_TYPE = CONTENT_TYPE_LATEST
_IN_SEVERAL = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class Metrics:
    """The counters of one application.

    With `PROMETHEUS_MULTIPROC_DIR` several worker processes are counted together, as prometheus-client describes.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("vramplan_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "vramplan_request_seconds", "Time from a request's first byte to the end of its answer.", ("route",), buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.active = Gauge("vramplan_requests_active", "Requests being answered.", registry=self.registry, multiprocess_mode="livesum")
        self.refused = Counter("vramplan_refused", "Requests turned away at the door.", ("reason",), registry=self.registry)
        self.hub = Counter("vramplan_hub", "Questions for a config of the Hub.", ("outcome",), registry=self.registry)
        self.measurements = Counter("vramplan_measurements", "Measurements posted.", ("outcome",), registry=self.registry)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts one request."""
        self.requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def hub_outcome(self, outcome: str) -> None:
        """Counts one question for a config."""
        self.hub.labels(outcome).inc()

    def close(self) -> None:
        """Takes the requests under way in this process out of the sum that several keep together; there are none any more."""
        if _IN_SEVERAL in os.environ:
            multiprocess.mark_process_dead(os.getpid())  # type: ignore[no-untyped-call]

    def text(self) -> bytes:
        """All of it in Prometheus's format."""
        if _IN_SEVERAL in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
            return generate_latest(registry)
        return generate_latest(self.registry)
