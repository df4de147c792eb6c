"""Metrics for Prometheus: what clients got, and what the engines did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from specdiff.serve.events import Counts

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
"""Bounds of the latency's buckets."""


class Metrics:
    """One registry for one application."""

    def __init__(self, counts: Callable[[], Sequence[Counts]]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "specdiff_requests", "Requests for pictures, by status.", ["status"],
            registry=self._registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "specdiff_picture_seconds", "From order to picture.", ["quality"],
            buckets=SECONDS, registry=self._registry,
        )  # fmt: skip
        self._registry.register(Engines(counts))

    def answered(self, status: int) -> None:
        """A request was answered; 499 is one that its client left."""
        self._requests.labels(str(status)).inc()

    def drawn(self, quality: str, seconds: float) -> None:
        """A picture was drawn."""
        self._seconds.labels(quality).observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class Engines:
    """The counts of the engines, summed when they are asked for."""

    def __init__(self, counts: Callable[[], Sequence[Counts]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """As Prometheus wants it."""
        engines = self._counts()
        steps = CounterMetricFamily("specdiff_steps", "Steps of generations.", labels=["kind"])
        for kind in ("dense", "selective", "skipped"):
            steps.add_metric([kind], sum(each.steps.get(kind, 0) for each in engines))
        yield steps
        fallbacks = CounterMetricFamily(
            "specdiff_fallbacks", "Steps dense by no plan.", labels=["reason"]
        )
        for reason in sorted({reason for each in engines for reason in each.fallbacks}):
            fallbacks.add_metric([reason], sum(each.fallbacks.get(reason, 0) for each in engines))
        yield fallbacks
        for name, text, values in (
            ("calls", "Calls of the model, each for one or more rows.", [e.calls for e in engines]),
            ("rows", "Rows of all calls.", [e.rows for e in engines]),
        ):
            yield CounterMetricFamily(f"specdiff_{name}", text, value=sum(values))
        for name, text, values in (
            ("cache_bytes", "Bytes kept for forecasts.", [e.cache_bytes for e in engines]),
            ("running", "Generations in progress.", [e.running for e in engines]),
            ("waiting", "Generations in the queue.", [e.waiting for e in engines]),
        ):
            yield GaugeMetricFamily(f"specdiff_{name}", text, value=sum(values))
