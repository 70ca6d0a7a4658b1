"""The launcher of servers and the table, which is printed at the end."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests import clusters
from tests.faults.process import Launcher, launcher
from tests.faults.table import Table

_TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    """Have the clusters' fixture, unless another folder's conftest has brought it."""
    if not config.pluginmanager.is_registered(clusters):
        config.pluginmanager.register(clusters)


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
