"""A real cluster for the tests of the drivers."""

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from controlplane.databases.engines.engine import Target
from tests.databases.engines.cluster import EVERYTHING, LARGE, VIEW, Cluster, new_target, running


@pytest.fixture(scope="session")
async def cluster(folder: Path) -> AsyncIterator[Cluster]:
    """An embedded PostgreSQL of their own, as these tests tamper with it."""
    async with running(folder / "engines") as cluster:
        yield cluster


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


@pytest.fixture(scope="session")
async def everything(cluster: Cluster) -> AsyncIterator[Target]:
    """A database with one of each."""
    target = new_target()
    await cluster.engine.apply(target)
    await cluster.run(target, EVERYTHING.read_text() + VIEW)
    yield target
    await cluster.engine.drop(target.name)


@pytest.fixture
async def large(cluster: Cluster, target: Target) -> Target:
    """A database whose dump does not fit into a pipe."""
    await cluster.run(target, LARGE)
    return target
