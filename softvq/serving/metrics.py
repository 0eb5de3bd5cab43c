"""Figures of a server for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from softvq.serving.batching import Group

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = Counter(
            "softvq_requests", "Requests answered.", ["endpoint", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "softvq_request_seconds", "From request to answer.", ["endpoint"], buckets=SECONDS, registry=self._registry
        )
        self._batches = Histogram(
            "softvq_batch_images", "Images computed at once.", ["kind"], buckets=IMAGES, registry=self._registry
        )
        self._busy = Counter("softvq_busy_seconds", "Time the models were at work.", ["kind"], registry=self._registry)

    def gauge(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Add a figure that is read when it is asked for."""
        Gauge(name, meaning, registry=self._registry).set_function(read)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def batch(self, group: Group, images: int, seconds: float) -> None:
        """Count a batch."""
        kind = group[0]
        self._batches.labels(kind).observe(images)
        self._busy.labels(kind).inc(seconds)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)
