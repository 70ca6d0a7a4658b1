"""A real MariaDB for the tests of its driver."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pymysql
import pytest

from controlplane.databases.engines.engine import Target
from controlplane.databases.engines.mysql import MySQL
from controlplane.local.mariadb import EmbeddedMariaDB
from tests.databases.engines.mysql.cluster import OPERATOR, Cluster, Session, new_target, run
from tests.stack import free_port


@pytest.fixture(scope="session")
async def cluster(folder: Path) -> AsyncIterator[Cluster]:
    """An embedded MariaDB, with a second admin who comes by TCP."""
    port = free_port()
    server = EmbeddedMariaDB(data_dir=folder / "mysql", run_dir=folder / "mysql/run", port=port)
    await server.start()
    engine = MySQL(admin_url=server.admin_url, host="127.0.0.1", port=port)
    cluster = Cluster(admin_url=server.admin_url, port=port, engine=engine)
    with cluster.admin() as admin:
        run(admin, f"CREATE USER operator IDENTIFIED BY '{OPERATOR}'", "GRANT ALL ON *.* TO operator WITH GRANT OPTION")
    yield cluster
    await server.stop()


@pytest.fixture
def admin(cluster: Cluster) -> Iterator[Session]:
    """The admin's session, to change things behind the driver's back."""
    with cluster.admin() as connection:
        yield connection


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


def is_alive(session: Session) -> bool:
    """Return whether a session still takes statements."""
    try:
        run(session, "SELECT 1")
    except pymysql.Error:
        return False
    return True
