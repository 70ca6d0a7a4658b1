"""What the tests of backups share: a cluster of each engine, a stack on all four, and a bucket."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from controlplane.catalog.model import Catalog
from tests.backups.seaweed import Seaweed, running
from tests.backups.servers import Servers
from tests.faults.clusters import Cluster, clickhouse, mongodb, new_mysql
from tests.reconcile.conftest import Works
from tests.stack import Customer, Stack


@pytest.fixture(scope="session")
async def other_clusters(folder: Path) -> AsyncIterator[dict[str, Cluster]]:
    """A cluster of each engine but PostgreSQL, by engine; they start all at once."""
    starts = (
        new_mysql(folder / "backups-mysql"),
        mongodb(folder / "backups-mongodb"),
        clickhouse(folder / "backups-clickhouse"),
    )
    async with AsyncExitStack() as started:
        clusters = await asyncio.gather(*(started.enter_async_context(start) for start in starts))
        yield {cluster.engine: cluster for cluster in clusters}


@pytest.fixture(scope="session")
async def all_engines(folder: Path, catalog: Path, other_clusters: dict[str, Cluster]) -> AsyncIterator[Stack]:
    """A stack whose catalogue has a cluster of each engine, and which verifies each backup at once."""
    entries = (
        f'\n[[clusters]]\nname = "local-{cluster.engine}"\nengine = "{cluster.engine}"\nregion = "local"\n'
        f"admin = '{cluster.admin_url}'\nhost = \"127.0.0.1\"\nport = {cluster.port}\ncapacity = 1000\n"
        for cluster in other_clusters.values()
    )
    file = folder / "all-engines.toml"
    file.write_text("".join((catalog.read_text(), *entries)))  # noqa: ASYNC240
    async with Stack(folder / "all-engines", catalog=file, verify_after=0) as stack:
        yield stack


@pytest.fixture
async def owner(all_engines: Stack) -> Customer:
    """A new customer of the stack with all engines."""
    return await all_engines.customer()


@pytest.fixture(scope="session")
async def seaweed(folder: Path) -> AsyncIterator[Seaweed]:
    """The S3 server."""
    (made := folder / "seaweed").mkdir()
    async with running(made) as server:
        yield server


@pytest.fixture
async def servers(storage_url: str, tmp_path: Path, catalog: Path) -> AsyncIterator[Servers]:
    """Servers on a storage of either kind; none runs yet."""
    works = Works(storage_url, tmp_path, Catalog.load(catalog))
    await works.open()
    servers = Servers(works, tmp_path, catalog)
    yield servers
    works.engine.release()
    await servers.stop()
    await works.close()
