"""Prometheus metrics of the server."""

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Metrics:
    """What is counted; one registry per server, so that two in one process do not add up."""

    registry: CollectorRegistry
    rpcs: Counter
    rpc_seconds: Histogram
    steps: Counter
    step_seconds: Histogram
    due: Gauge
    lag_seconds: Gauge
    overdue: Gauge
    orphans: Gauge
    orphans_removed: Counter
    limiter_fallbacks: Counter
    limiter_up: Gauge


def new_metrics() -> Metrics:
    """Return a new set of metrics, before anything has happened."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    limiter_up = Gauge("htx_limiter_up", "0 while the shared rate limit does not answer.", registry=registry)
    limiter_up.set(1)
    return Metrics(
        registry=registry,
        rpcs=Counter("htx_rpcs", "RPCs answered, by how they ended.", ("rpc", "code"), registry=registry),
        rpc_seconds=Histogram("htx_rpc_seconds", "How long RPCs took.", ("rpc",), buckets=_BUCKETS, registry=registry),
        steps=Counter("htx_reconciler_steps", "Steps taken, by how they ended.", ("kind", "end"), registry=registry),
        step_seconds=Histogram(
            "htx_reconciler_step_seconds", "How long steps took.", ("kind",), buckets=_BUCKETS, registry=registry
        ),
        due=Gauge("htx_reconciler_due", "Resources whose next step is due.", ("kind",), registry=registry),
        lag_seconds=Gauge(
            "htx_reconciler_lag_seconds", "How long the oldest due step has been waiting.", ("kind",), registry=registry
        ),
        overdue=Gauge(
            "htx_reconciler_overdue", "Resources that are past their deadline.", ("kind",), registry=registry
        ),
        orphans=Gauge("htx_orphans", "Things that no row owns, by where they are.", ("place",), registry=registry),
        orphans_removed=Counter(
            "htx_orphans_removed", "Things that no row owned and that were removed.", ("place",), registry=registry
        ),
        limiter_fallbacks=Counter(
            "htx_limiter_fallbacks", "Requests that the shared rate limit did not decide.", registry=registry
        ),
        limiter_up=limiter_up,
    )
