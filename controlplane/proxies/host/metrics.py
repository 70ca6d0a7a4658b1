"""What a host counts for Prometheus. Nothing of it says where anybody goes."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from controlplane.proxies.host.credentials import Credentials


class Metrics(Collector):
    """Counters of its own, and those of the credentials, read when somebody asks."""

    def __init__(self, registry: CollectorRegistry, credentials: Credentials) -> None:
        self.refused = Counter(
            "htx_proxy_refused", "Connections and datagrams not carried, by why.", ("reason",), registry=registry
        )
        self.failed_logins = Counter("htx_proxy_failed_logins", "Wrong logins.", registry=registry)
        self._credentials = credentials
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """Return what the credentials have open and have carried."""
        total = self._credentials.total()
        yield GaugeMetricFamily(
            "htx_proxy_connections", "Connections open by credentials.", self._credentials.open_sessions
        )
        yield CounterMetricFamily("htx_proxy_connections_made", "Connections made to targets.", total.connections)
        carried = CounterMetricFamily("htx_proxy_bytes", "Bytes carried, up to targets or down.", None, ("direction",))
        carried.add_metric(("up",), total.bytes_up)
        carried.add_metric(("down",), total.bytes_down)
        yield carried
