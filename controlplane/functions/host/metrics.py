"""Prometheus metrics of the host, by function."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

# From a warm call to the longest that a function may take.
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What is counted; one registry per host, so that two in one process do not add up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        label, registry = ("function",), self.registry
        self.calls = Counter(
            "htx_function_calls", "Calls, by how they ended.", ("function", "outcome"), registry=registry
        )
        self.seconds = Histogram(
            "htx_function_seconds", "How long handlers took.", label, buckets=_BUCKETS, registry=registry
        )
        self.cold_starts = Counter(
            "htx_function_cold_starts", "Calls for which a worker had to be started.", label, registry=registry
        )
        self.workers = Gauge("htx_function_workers", "Workers that there are.", label, registry=registry)
        self.memory = Gauge(
            "htx_function_memory_bytes", "The most that the worker of the last call had used.", label, registry=registry
        )

    def of(self, function_id: str) -> "FunctionMetrics":
        """Return the metrics of one function."""
        return FunctionMetrics(self, function_id)

    def forget(self, function_id: str) -> None:
        """Show nothing of a function any more."""
        for metric in (self.calls, self.seconds, self.cold_starts, self.workers, self.memory):
            metric.remove_by_labels({"function": function_id})


class FunctionMetrics:
    """What is counted of one function. To look a label up takes longer than to count."""

    def __init__(self, metrics: Metrics, function_id: str) -> None:
        self.workers = metrics.workers.labels(function_id)
        self._id = function_id
        self._calls = metrics.calls
        self._seconds = metrics.seconds.labels(function_id)
        self._cold_starts = metrics.cold_starts.labels(function_id)
        self._memory = metrics.memory.labels(function_id)

    def count(self, outcome: str, *, seconds: float, memory_mb: float, cold_start: bool) -> None:
        """Count a call that ran."""
        self._calls.labels(self._id, outcome).inc()
        self._seconds.observe(seconds)
        self._memory.set(memory_mb * 1024**2)
        if cold_start:
            self._cold_starts.inc()

    def count_refusal(self, outcome: str) -> None:
        """Count a call of which nothing was run."""
        self._calls.labels(self._id, outcome).inc()
