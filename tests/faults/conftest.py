"""The clusters, the launcher of servers and the table, which is printed at the end."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from controlplane.local.postgres import EmbeddedPostgres
from tests.faults import clusters
from tests.faults.clusters import Cluster
from tests.faults.process import Launcher, launcher
from tests.faults.table import Table

_TABLE = pytest.StashKey[Table]()


@pytest.fixture(scope="session")
async def all_clusters(folder: Path, postgres: EmbeddedPostgres, postgres_port: int) -> AsyncIterator[list[Cluster]]:
    """A cluster of each engine."""
    async with AsyncExitStack() as running:
        yield [
            clusters.postgresql(postgres, postgres_port),
            await running.enter_async_context(clusters.new_mysql(folder / "faults-mysql")),
            await running.enter_async_context(clusters.mongodb(folder / "faults-mongodb")),
            await running.enter_async_context(clusters.clickhouse(folder / "faults-clickhouse")),
        ]


@pytest.fixture(scope="session")
async def servers(folder: Path) -> AsyncIterator[Launcher]:
    """The launcher of servers."""
    async with launcher(folder / "faults.sock") as running:
        yield running


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> Table:
    """The table of what was done, and what was lost."""
    return pytestconfig.stash.setdefault(_TABLE, Table())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    if table := config.stash.get(_TABLE, None):
        terminalreporter.section("faults")
        for line in table.lines():
            terminalreporter.write_line(line)
