"""What the tests of backups share: a stack on clusters of all four engines, and a bucket."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from controlplane.catalog.model import Catalog
from tests import clusters
from tests.backups.seaweed import Seaweed, running
from tests.backups.servers import Servers
from tests.clusters import Cluster, entries
from tests.reconcile.conftest import Works
from tests.stack import Customer, Stack


def pytest_configure(config: pytest.Config) -> None:
    """Have the clusters' fixture, unless another folder's conftest has brought it."""
    if not config.pluginmanager.is_registered(clusters):
        config.pluginmanager.register(clusters)


@pytest.fixture(scope="session")
def by_engine(all_clusters: list[Cluster]) -> dict[str, Cluster]:
    """The clusters by engine."""
    return {cluster.engine: cluster for cluster in all_clusters}


@pytest.fixture(scope="session")
async def all_engines(folder: Path, catalog: Path, all_clusters: list[Cluster]) -> AsyncIterator[Stack]:
    """A stack whose catalogue has a cluster of each engine, and which verifies each backup at once."""
    file = folder / "all-engines.toml"
    file.write_text(catalog.read_text() + entries(all_clusters[1:]))  # noqa: ASYNC240
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
