"""A real cluster for the tests of the drivers."""

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from controlplane.databases.engines.engine import Target
from controlplane.databases.engines.postgresql import PostgreSQL
from controlplane.local.postgres import EmbeddedPostgres
from tests.databases.engines.cluster import BIN_DIR, Cluster, new_target
from tests.stack import free_port


@pytest.fixture(scope="session")
async def cluster(folder: Path) -> AsyncIterator[Cluster]:
    """An embedded PostgreSQL of their own, as these tests tamper with it."""
    data_dir = folder / "engines"
    port = free_port()
    server = EmbeddedPostgres(data_dir=data_dir, run_dir=data_dir / "run", port=port)
    await server.start()
    engine = PostgreSQL(admin_dsn=server.admin_dsn, host="127.0.0.1", port=port, bin_dir=BIN_DIR)
    yield Cluster(admin_dsn=server.admin_dsn, rules=data_dir / "run/postgres.hba", port=port, engine=engine)
    await server.stop()


@pytest.fixture
async def admin(cluster: Cluster) -> AsyncIterator[asyncpg.Connection]:
    """The superuser's session, to change things behind the driver's back."""
    connection = await cluster.admin()
    yield connection
    await connection.close()


@pytest.fixture
async def target(cluster: Cluster) -> AsyncIterator[Target]:
    """A database that exists."""
    target = new_target()
    await cluster.engine.apply(target)
    yield target
    await cluster.engine.drop(target.name)


@pytest.fixture
async def other(cluster: Cluster) -> AsyncIterator[Target]:
    """Another tenant's database."""
    other = new_target()
    await cluster.engine.apply(other)
    yield other
    await cluster.engine.drop(other.name)
