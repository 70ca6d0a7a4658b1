"""A running cluster of every engine, as the tests of the drivers start theirs, and the catalogue that sells them."""

import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from controlplane.databases.engines.engine import Engine, Target
from controlplane.databases.engines.mysql import MySQL
from controlplane.local.chdb.gateway import ADMIN, admin_password
from controlplane.local.mariadb import EmbeddedMariaDB
from tests.databases.engines import clickhouse_server, wire_compatible
from tests.databases.engines.cluster import running as running_postgresql
from tests.stack import free_port

_CATALOG = """\
default_plan = "bench"
default_region = "local"

[[plans]]
name = "bench"
rate_limit_per_minute = 1000000
quotas = { databases = 1000000, tokens = 10 }

[[skus]]
name = "db-s-1vcpu-2gb"
engines = ["postgresql", "mysql", "mongodb"]
vcpus = 1
memory_mb = 2048
storage_gb = 20
connections = 40

[[skus]]
name = "ch-s-1vcpu-2gb"
engines = ["clickhouse"]
vcpus = 1
memory_mb = 2048
storage_gb = 20
connections = 40

[[regions]]
name = "local"
title = "This machine"
"""
_CLUSTER = """
[[clusters]]
name = "local-{cluster.kind}"
engine = "{cluster.kind}"
region = "local"
admin = "{cluster.admin_url}"
host = "127.0.0.1"
port = {cluster.port}
capacity = 1000000
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster: what it is called, the way in for its admin, and the driver bound to it."""

    kind: str
    title: str
    admin_url: str
    port: int
    engine: Engine

    @property
    def sku(self) -> str:
        """The size to order."""
        return "ch-s-1vcpu-2gb" if self.kind == "clickhouse" else "db-s-1vcpu-2gb"


@asynccontextmanager
async def postgresql_cluster(folder: Path) -> AsyncIterator[Cluster]:
    """Run a PostgreSQL. It does not wait for the disk (fsync = off): the disk's noise is larger than what we add."""
    async with running_postgresql(folder) as cluster:
        yield Cluster("postgresql", "PostgreSQL", cluster.admin_dsn, cluster.port, cluster.engine)


@asynccontextmanager
async def other_clusters(folder: Path) -> AsyncIterator[list[Cluster]]:
    """Run a cluster of each of the other engines, in an existing folder."""
    async with AsyncExitStack() as stack:
        port = free_port()
        mariadb = EmbeddedMariaDB(data_dir=folder / "mariadb", run_dir=folder / "mariadb/run", port=port)
        await mariadb.start()
        stack.push_async_callback(mariadb.stop)
        mysql = MySQL(admin_url=mariadb.admin_url, host="127.0.0.1", port=port)
        mongo = await stack.enter_async_context(wire_compatible.running(folder / "mongodb"))
        house = clickhouse_server.Server(folder / "clickhouse")
        await house.start()
        stack.push_async_callback(house.stop)
        house_url = house.url.replace("//", f"//{ADMIN}:{admin_password(house.folder)}@")
        yield [
            Cluster("mysql", "MySQL (MariaDB)", mariadb.admin_url, port, mysql),
            Cluster("mongodb", "MongoDB (compatible)", mongo.admin_url, mongo.port, mongo.engine),
            Cluster("clickhouse", "ClickHouse (chDB)", house_url, house.port, house.engine),
        ]


async def new_storage(cluster: Cluster, name: str) -> str:
    """Make an empty database on a PostgreSQL for a control plane's own rows; return its SQLAlchemy URL."""
    admin = await asyncpg.connect(cluster.admin_url)
    await admin.execute(f'CREATE DATABASE "{name}"')
    await admin.close()
    return cluster.admin_url.replace("postgresql://", "postgresql+asyncpg://").replace("/postgres?", f"/{name}?")


def catalog_of(clusters: Iterable[Cluster]) -> str:
    """Return a catalogue (TOML) with room for anything on these clusters."""
    return _CATALOG + "".join(_CLUSTER.format(cluster=cluster) for cluster in clusters)


def new_target() -> Target:
    """Return a database that is not there yet, of the size that the catalogue sells."""
    # No underscore: MySQL's driver writes it in two ways, and the one name is put in the other's place.
    name, password = f"h{secrets.token_hex(15)}", secrets.token_urlsafe(24)
    return Target(name=name, password=password, connections=40, memory_mb=2048, storage_gb=20)
