"""Two servers on one storage, one of them paused in the middle of a step for longer than its lease.

What it does when it goes on answers a question that is no longer asked: its outcome does not count, on a cluster it
changes nothing that it has not begun under the lock there, and a file that no row owns by then is swept.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import bindparam, text

from controlplane.api.v1 import databases_pb2
from controlplane.backups.storage import FolderStorage
from controlplane.clock import SystemClock
from controlplane.databases.sweep import Sweep
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.observe.metrics import new_metrics
from controlplane.sql import UtcDateTime
from tests.clusters import Cluster
from tests.conftest import new_storage
from tests.faults.check import check
from tests.faults.installation import Installation, Uncertain, new_installation
from tests.faults.orders import KINDS, Order
from tests.faults.other import other_server
from tests.faults.process import Launcher
from tests.faults.table import Table
from tests.faults.transitions import Life, begin, new_key
from tests.stack import eventually

_numbers = itertools.count(1)
# The first thing that a step does to change something on a cluster; it has no lock there yet.
_BEFORE_ITS_LOCK = "SELECT pg_try_advisory_lock"


class Pair:
    """An installation whose server is to be paused, and another server on the same rows, files and cluster."""

    def __init__(self, there: Installation, cluster: Cluster, launcher: Launcher) -> None:
        self.there = there
        self.cluster = cluster
        self._launcher = launcher
        self._answer: asyncio.Task[float] | None = None

    def order(self, kind: str) -> Order:
        """Return an order of a new database."""
        return Order(Life(self.there, self.cluster, f"paused-{next(_numbers)}"), KINDS[kind])

    async def pause(self, order: Order, *points: str) -> None:
        """Order something, and pause the server where it comes to these points.

        A step begins as soon as its order is committed, so the answer may come only when the server goes on.
        """
        await order.prepare()
        await self._put_off_looks()
        async with asyncio.timeout(10):
            await self.there.process.pause_at(*points)
            self._answer = asyncio.create_task(order.give())
            await self.there.process.paused.wait()

    async def _put_off_looks(self) -> None:
        """Let no look at a database come to the point before the order does."""
        async with self.there.store.session() as session:
            await session.execute(text("UPDATE databases SET next_attempt_at = NULL WHERE waiting_on IS NULL"))
            await session.commit()

    @asynccontextmanager
    async def other(self) -> AsyncIterator[None]:
        """Run the other server, as if the leases of the first had run out; the customer asks it meanwhile."""
        await self._run_out()
        first = self.there.databases, self.there.backups
        async with other_server(self.there, self._launcher) as other:
            self.there.databases, self.there.backups = other
            try:
                yield
            finally:
                self.there.databases, self.there.backups = first
                self.there.process.go_on()

    async def _run_out(self) -> None:
        past = datetime.now(UTC) - timedelta(seconds=1)
        async with self.there.store.session() as session:
            for rows in ("databases", "backups"):
                over = text(f"UPDATE {rows} SET lease_until = :past WHERE lease_until IS NOT NULL")  # noqa: S608
                await session.execute(over.bindparams(bindparam("past", past, type_=UtcDateTime())))
            await session.commit()

    async def go_on(self) -> None:
        """Let the paused server go on until it has answered, and its step has come to an end that does not count."""
        log = self.there.folder / "server.log"
        before = log.read_text().count('"Superseded"')
        self.there.process.go_on()
        assert self._answer is not None
        await self._answer

        async def has_ended() -> bool:
            return log.read_text().count('"Superseded"') > before

        await eventually(has_ended)

    async def sweep(self) -> None:
        """Sweep twice, as if all had been there for long."""
        there = self.there
        for _ in range(2):
            await Sweep(
                store=there.store,
                clock=SystemClock(),
                engines={f"local-{self.cluster.engine}": self.cluster.driver},
                storage=FolderStorage(there.folder / "backups"),
                metrics=new_metrics(),
                grace=timedelta(0),
            ).run()


@pytest.fixture(scope="module")
async def pair(
    folder: Path, all_clusters: list[Cluster], servers: Launcher, postgres: EmbeddedPostgres
) -> AsyncIterator[Pair]:
    """The two servers, on the PostgreSQL that is the cluster too."""
    url = await new_storage(postgres, "faults_pauses")
    async with new_installation(
        folder / "pauses", launcher=servers, clusters=all_clusters[:1], database_url=url, scope="everything"
    ) as there:
        yield Pair(there, all_clusters[0], servers)


async def test_a_deleted_database_is_not_made(pair: Pair, table: Table) -> None:
    """A server that comes to make a database after another has deleted it makes nothing."""
    with table.losing("pauses", "create, then deleted by another") as row:
        order = pair.order("create")
        await pair.pause(order, _BEFORE_ITS_LOCK)
        async with pair.other():
            await order.life.undisturbed(KINDS["delete"].order, _is_gone)
            row.answered += 2
            await pair.go_on()
        row.moments.append("paused")
        await check(pair.there)


async def test_a_restored_database_is_not_dropped(pair: Pair, table: Table) -> None:
    """What was written into a restored database stays when another server comes to make room for the same restore."""
    with table.losing("pauses", "restore, then written to") as row:
        order = pair.order("restore a backup")
        await begin(order.life)
        await pair.pause(order, _BEFORE_ITS_LOCK)
        async with pair.other():
            await pair.there.rest()
            restored = replace(order.life, name=order.name, backups=[])
            await restored.check()
            await _write(restored)
            row.answered += 1
            await pair.go_on()
        row.moments.append("paused")
        await restored.check()
        await check(pair.there)


async def test_an_undeleted_database_is_not_dropped(pair: Pair, table: Table) -> None:
    """What was written into a database that is back stays when another server comes to its deletion."""
    with table.losing("pauses", "delete, then undeleted") as row:
        order = pair.order("delete")
        life = order.life
        await begin(life)
        await pair.pause(order, _BEFORE_ITS_LOCK)
        async with pair.other():
            await pair.there.rest()
            await order.check()
            await life.undisturbed(KINDS["undelete"].order, KINDS["undelete"].check)
            await _write(life)
            row.answered += 2
            await pair.go_on()
        row.moments.append("paused")
        await life.check()
        await check(pair.there)


async def test_a_file_that_is_written_for_a_deleted_backup_is_swept(pair: Pair, table: Table) -> None:
    """A manifest that is written after another server has deleted database and backup is found by the sweep."""
    with table.losing("pauses", "back up, then deleted by another") as row:
        order = pair.order("back up")
        await order.life.undisturbed(KINDS["create"].order, KINDS["create"].check)
        # The rename is that of the backup itself; the folder is made once more for the manifest.
        await pair.pause(order, "file rename", "file mkdir …")
        async with pair.other():
            await order.life.undisturbed(KINDS["delete"].order, _is_gone)
            row.answered += 2
            await pair.go_on()
        row.moments.append("paused")
        with pytest.raises(AssertionError, match="too many"):
            await check(pair.there)
        await pair.sweep()
        await check(pair.there)


async def test_an_old_password_is_not_set(pair: Pair, table: Table) -> None:
    """A server that comes to set a password after another has set the next one leaves that as it is."""
    with table.losing("pauses", "new password, then another") as row:
        order = pair.order("new password")
        life = order.life
        await life.undisturbed(KINDS["create"].order, KINDS["create"].check)
        await pair.pause(order, _BEFORE_ITS_LOCK)
        async with pair.other():
            await life.undisturbed(KINDS["new password"].order, KINDS["new password"].check)
            row.answered += 2
            await pair.go_on()
        row.moments.append("paused")
        await life.check()
        await check(pair.there)


async def test_a_deletion_waits_for_a_change_that_has_begun(pair: Pair, table: Table) -> None:
    """As long as another server holds a database's lock on its cluster, a deletion waits, and says for what."""
    with table.losing("pauses", "create, with the lock") as row:
        order = pair.order("create")
        await pair.pause(order, "CREATE DATABASE")
        async with pair.other():
            life = order.life
            life.key = new_key()
            await KINDS["delete"].order(life)
            row.answered += 2

            async def waits() -> bool:
                found = await life.ask("GetDatabase", databases_pb2.GetDatabaseRequest(name=life.name))
                return bool(found.progress.waiting_on == f"another change of {life.name}")

            await eventually(waits)
            await pair.go_on()
            await pair.there.rest()
        row.moments.append("paused")
        await _is_gone(life)
        await check(pair.there)


async def test_who_is_paused_in_a_transaction_keeps_nobody_waiting_for_long(pair: Pair, table: Table) -> None:
    """The database lets go of what a server has locked that is silent amid a transaction; its order is not recorded."""
    with table.losing("pauses", "an order, before its commit") as row:
        order, meanwhile = pair.order("create"), pair.order("create")
        await order.prepare()
        await pair.there.process.pause_at("commit idempotency_keys")
        answer = asyncio.create_task(order.give())
        async with asyncio.timeout(10):
            await pair.there.process.paused.wait()
        async with pair.other():
            await meanwhile.prepare()
            await meanwhile.give()
            await pair.there.rest()
            await meanwhile.check()
            row.answered += 1
        pair.there.process.go_on()
        row.moments.append("paused")
        with pytest.raises(Uncertain):
            await answer
        await _is_gone(order.life)
        await order.give()
        await pair.there.rest()
        await order.check()
        await check(pair.there)


async def _write(life: Life) -> None:
    life.word = "written since"
    await life.cluster.write(life.connection, life.word)


async def _is_gone(life: Life) -> None:
    assert life.name not in {found["name"] for found in await life.installation.rows("databases")}
