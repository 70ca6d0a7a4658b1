"""The embedded engines: the server behind an embedded cluster, and what a machine needs to run it."""

import ctypes
from typing import TypeAlias

from controlplane.catalog.model import EMBEDDED, Catalog
from controlplane.local.clickhouse import EmbeddedClickHouse
from controlplane.local.mariadb import EmbeddedMariaDB
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.settings import Settings

EmbeddedServer: TypeAlias = EmbeddedPostgres | EmbeddedMariaDB | EmbeddedClickHouse

_LANDLOCK_CREATE_RULESET, _VERSION = 444, 1


def runnable_engines(catalog: Catalog) -> list[str]:
    """Return the engines of the embedded clusters that this machine can run."""
    wanted = dict.fromkeys(cluster.engine for cluster in catalog.clusters if cluster.admin == EMBEDDED)
    return [engine for engine in wanted if not lacking(engine)]


def lacking(engine: str) -> str:
    """Return what this machine lacks to run an embedded engine, and how to get it; nothing if it can."""
    if engine == "mysql" and not EmbeddedMariaDB.is_installed():
        return "MariaDB: apt-get install mariadb-server-core mariadb-client-core"
    if engine == "clickhouse" and not EmbeddedClickHouse.is_installed():
        return "chDB: pip install 'htx-controlplane[clickhouse]'"
    if engine == "clickhouse" and not _has_landlock():
        return "Landlock, which keeps tenants apart: Linux 5.13 or later"
    return ""


def new_server(engine: str, settings: Settings) -> EmbeddedServer:
    """Return the server of an embedded engine as the settings want it; it is not started."""
    port = port_of(engine, settings)
    if engine == "mysql":
        return EmbeddedMariaDB(data_dir=settings.data_dir, run_dir=settings.run_dir, port=port)
    if engine == "clickhouse":
        return EmbeddedClickHouse(data_dir=settings.data_dir, port=port)
    return EmbeddedPostgres(data_dir=settings.data_dir, run_dir=settings.run_dir, port=port)


def port_of(engine: str, settings: Settings) -> int:
    """Return the port on which customers reach an embedded engine."""
    ports = {
        "postgresql": settings.postgres_port,
        "mysql": settings.mariadb_port,
        "clickhouse": settings.clickhouse_port,
    }
    return ports[engine]


def _has_landlock() -> bool:
    # Asked for its version; a kernel that does not know the call says -1.
    return bool(ctypes.CDLL(None).syscall(_LANDLOCK_CREATE_RULESET, None, 0, _VERSION) > 0)
