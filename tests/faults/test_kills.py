"""The server, killed at every moment of every transition of every engine: nothing is lost, and nothing is left over."""

import asyncio
import itertools
import traceback
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from controlplane.audit.verify import verify
from controlplane.keys import Keys
from controlplane.local.postgres import EmbeddedPostgres
from tests.clusters import Cluster, Refused
from tests.conftest import new_storage
from tests.faults.check import check
from tests.faults.installation import Installation, Refusal, new_installation
from tests.faults.kill import kill
from tests.faults.points import Scope
from tests.faults.process import Launcher
from tests.faults.table import EVERYTHING, Table
from tests.faults.transitions import TRANSITIONS, Life, begin

# Where the control plane on each engine keeps its rows. Its commits, and the files of backups, are the same for each
# engine: two are enough to kill it there too, one on either storage.
STORAGES = {"postgresql": "sqlite", "mysql": "postgresql", "mongodb": "sqlite", "clickhouse": "postgresql"}
SCOPES: dict[str, Scope] = {"postgresql": "usual", "mysql": "usual", "mongodb": "cluster", "clickhouse": "cluster"}
# The embedded one starts a process of 300 MB for each database: a kill takes two seconds of a core, elsewhere one half.
STRIDES = {"clickhouse": 3}


@pytest.fixture(scope="module")
async def killed(  # noqa: PLR0917 - fixtures
    folder: Path,
    all_clusters: list[Cluster],
    servers: Launcher,
    postgres: EmbeddedPostgres,
    table: Table,
    request: pytest.FixtureRequest,
) -> Table:
    """The table, once everything is done that tests were asked for; the engines at the same time."""
    wanted = {
        cluster.engine: {
            str(item.callspec.params["transition"])
            for item in request.session.items
            if isinstance(item, pytest.Function)
            and item.function is test_no_kill_loses_anything
            and item.callspec.params["engine"] == cluster.engine
        }
        for cluster in all_clusters
    }
    async with AsyncExitStack() as stack:
        installations = {}
        for cluster in all_clusters:
            if wanted[cluster.engine]:
                is_sqlite = STORAGES[cluster.engine] == "sqlite"
                installations[cluster.engine] = await stack.enter_async_context(
                    new_installation(
                        folder / f"killed-{cluster.engine}",
                        launcher=servers,
                        clusters=[cluster],
                        database_url="" if is_sqlite else await new_storage(postgres, f"killed_{cluster.engine}"),
                        scope="everything" if EVERYTHING else SCOPES[cluster.engine],
                    )
                )
        async with asyncio.TaskGroup() as group:
            for engine, installation in installations.items():
                group.create_task(_kill_everywhere(installation, engine, wanted[engine], table))
    return table


@pytest.mark.parametrize("transition", [transition.name for transition in TRANSITIONS])
@pytest.mark.parametrize("engine", STORAGES)
def test_no_kill_loses_anything(killed: Table, engine: str, transition: str) -> None:
    """Wherever the server is killed: acknowledged orders are fulfilled, others whole, and no thing is without a row."""
    row = killed.rows.get((engine, transition))
    assert row is not None, "not come to, as something was lost before"
    assert row.lost is None, row.lost
    assert row.moments or SCOPES[engine] == "cluster"


async def _kill_everywhere(installation: Installation, engine: str, wanted: set[str], table: Table) -> None:
    """Let a database go through each transition again and again, and kill the server at each of its moments.

    A transition is done with once it has come to its end before that moment came.
    """
    lives = (Life(installation, installation.clusters[engine], f"life-{number}") for number in itertools.count(1))
    patient = next(lives)
    await begin(patient)
    for transition in TRANSITIONS:
        if transition.name not in wanted:
            continue
        row = table.row(engine, transition.name)
        try:
            for moment in itertools.count(1, 1 if EVERYTHING else max(transition.stride, STRIDES.get(engine, 1))):
                life = next(lives) if transition.is_own else patient
                if not await kill(life, transition, moment, row, check=check):
                    break
        except (AssertionError, Refused, Refusal, TimeoutError):
            row.lost = f"{traceback.format_exc()}\n{installation.log()}"
            return
    await installation.kill()
    assert not (await verify(installation.store, Keys.load(installation.folder / "keys.json"))).broken
