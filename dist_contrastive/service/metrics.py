"""What a service counts, in Prometheus' text form."""

from typing import Any

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class ServiceMetrics:
    """Counters of one service, in a registry of their own.

    Attributes:
        in_flight: requests under way, which is what the limit on the queue counts.
    """

    def __init__(self) -> None:
        import prometheus_client as prometheus

        self._generate = prometheus.generate_latest
        self._registry = prometheus.CollectorRegistry()
        self.in_flight = 0
        prefix, registry = "dist_contrastive_", self._registry
        self._latency = prometheus.Histogram(
            f"{prefix}request_seconds", "From a request's head to its answer.", ("route", "status"), buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self._batch = prometheus.Histogram(
            f"{prefix}batch_images", "Images that went through the model at once.", buckets=IMAGES, registry=registry
        )
        self._errors = prometheus.Counter(
            f"{prefix}errors", "Requests that were refused or failed.", ("kind",), registry=registry
        )
        queue = prometheus.Gauge(f"{prefix}queue_requests", "Requests under way.", registry=registry)
        queue.set_function(lambda: self.in_flight)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._latency.labels(route, str(status)).observe(seconds)

    def batched(self, num: int) -> None:
        self._batch.observe(num)

    def failed(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def page(self) -> bytes:
        found: Any = self._generate(self._registry)
        return bytes(found)
