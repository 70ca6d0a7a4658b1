"""Clusters that fail while orders of every kind are under way: orders wait, nothing is lost, and nothing else stops."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import bindparam, text

from controlplane.api.v1 import backups_pb2, databases_pb2
from controlplane.databases.engines.engine import ClusterUnavailable, Target
from controlplane.databases.engines.postgresql import PostgreSQL
from controlplane.sql import UtcDateTime
from tests.clusters import Cluster
from tests.databases.engines.cluster import BIN_DIR
from tests.faults import breakable
from tests.faults.breakable import Breakable
from tests.faults.check import check
from tests.faults.installation import new_installation
from tests.faults.orders import Order, Place
from tests.faults.process import Launcher
from tests.faults.table import Table
from tests.stack import eventually

# Half of what it takes to find out that a cluster does not answer: whoever is answered sooner has not waited for one.
_SECONDS_TO_ANSWER = 1.5
_WAITING = ("databases", "backups")


@dataclass(frozen=True, kw_only=True)
class Outage:
    """What happens to a cluster. With `is_total` nothing can be done there until it ends."""

    name: str
    begin: Callable[[Breakable], Awaitable[None]]
    end: Callable[[Breakable], Awaitable[None]]
    is_total: bool = True


async def _restart(cluster: Breakable) -> None:
    await cluster.kill()
    await cluster.start()


async def _nothing(_cluster: Breakable) -> None:
    pass


OUTAGES = (
    Outage(name="stopped, started again", begin=lambda cluster: cluster.stop(), end=lambda cluster: cluster.start()),
    Outage(name="killed, started at once", begin=_restart, end=_nothing, is_total=False),
    Outage(name="refuses connections", begin=lambda cluster: cluster.disturb("refuses"), end=Breakable.mend),
    Outage(name="swallows packets", begin=lambda cluster: cluster.disturb("swallows"), end=Breakable.mend),
    Outage(name="slow", begin=lambda cluster: cluster.disturb("slow"), end=Breakable.mend, is_total=False),
    Outage(name="cuts connections", begin=lambda cluster: cluster.disturb("cuts"), end=Breakable.mend, is_total=False),
    Outage(
        name="read-only",
        begin=lambda cluster: cluster.set_read_only(True),
        end=lambda cluster: cluster.set_read_only(False),
    ),
)


@pytest.fixture(scope="module")
async def weak(folder: Path) -> AsyncIterator[list[Breakable]]:
    """A PostgreSQL and a MariaDB that can break."""
    async with (
        breakable.postgresql(folder / "weak-postgresql") as one,
        breakable.mysql(folder / "weak-mysql") as other,
    ):
        yield [one, other]


@pytest.fixture(scope="module")
async def place(
    folder: Path, weak: list[Breakable], all_clusters: list[Cluster], servers: Launcher
) -> AsyncIterator[Place]:
    """An installation with these two, beside a cluster of another engine."""
    well = next(cluster for cluster in all_clusters if cluster.engine == "mongodb")
    clusters = [each.cluster for each in weak]
    async with new_installation(
        folder / "outages", launcher=servers, clusters=[*clusters, well], scope="cluster"
    ) as installation:
        made = Place(installation, clusters, well)
        await made.begin()
        yield made


@pytest.mark.parametrize("outage", OUTAGES, ids=lambda outage: outage.name)
async def test_an_outage_only_delays(place: Place, weak: list[Breakable], outage: Outage, table: Table) -> None:
    """Orders wait and say for what, all others are fulfilled meanwhile, and afterwards everything is as ordered."""
    with table.losing("clusters", outage.name) as row:
        before, meanwhile = await place.next_turn()
        await asyncio.gather(*(order.give() for order in before))
        await asyncio.gather(*(outage.begin(cluster) for cluster in weak))
        seconds = await asyncio.gather(*(order.give() for order in meanwhile))
        row.answered += len(before) + len(meanwhile)
        await place.is_served_elsewhere()
        if outage.is_total:
            await place.until(_names(meanwhile), _waits_for_its_cluster)
            seconds.append(await _seconds_to_read(place))
        await asyncio.gather(*(outage.end(cluster) for cluster in weak))
        row.moments.append(outage.name)
        assert max(seconds) < _SECONDS_TO_ANSWER, seconds
        await place.installation.rest()
        await _check_and_bring_back(place, [*before, *meanwhile])


async def test_what_is_late_can_be_tried_again(place: Place, weak: list[Breakable], table: Table) -> None:
    """Whose deadline passes in an outage has failed with a reason; but a deletion goes on until it is done."""
    with table.losing("clusters", "deadlines pass") as row:
        orders = [order for half in await place.next_turn() for order in half]
        await asyncio.gather(*(cluster.disturb("refuses") for cluster in weak))
        await asyncio.gather(*(order.give() for order in orders))
        row.answered += len(orders)
        await place.until(_names(orders), _waits_for_its_cluster)
        await _let_deadlines_pass(place)
        deletions = {order.name for order in orders if order.kind.name == "delete"}
        backups = [order for order in orders if order.kind.name == "back up"]
        failed = _names(orders) - deletions
        await place.until(failed, lambda database: database.status == "failed" and bool(database.progress.last_error))
        for order in backups:
            await eventually(lambda order=order: _has_failed_backup(order))  # type: ignore[misc]
        await place.until(deletions, lambda database: database.status == "deleting")
        await asyncio.gather(*(cluster.mend() for cluster in weak))
        row.moments.append("a deadline passed")
        there = place.installation
        for name in failed:
            await there.ask(there.databases.RetryDatabase, databases_pb2.RetryDatabaseRequest(name=name))
        for order in backups:
            await _back_up_again(order)
        await there.rest()
        await _check_and_bring_back(place, orders)


@pytest.mark.parametrize("disturb", ["refuses", "is read-only"])
async def test_a_restore_that_is_interrupted_is_tried_again(weak: list[Breakable], disturb: str) -> None:
    """What pg_restore says of a cluster that has gone, or has become read-only, is no fault of the backup."""
    cluster, name = weak[0], "interrupted"
    driver = cluster.cluster.driver
    by_the_way = PostgreSQL(
        admin_dsn=cluster.cluster.admin_url, host="127.0.0.1", port=cluster.cluster.port, bin_dir=BIN_DIR
    )
    await driver.apply(Target(name=name, password=name, connections=3, memory_mb=512, storage_gb=1))
    uri = driver.connection(name, name).uri
    await cluster.cluster.write(databases_pb2.DatabaseConnection(uri=uri), "to be restored")
    async with driver.dump(name) as dump:
        whole = b"".join([chunk async for chunk in dump.chunks()])

    async def chunks() -> AsyncIterator[bytes]:
        await (cluster.set_read_only(True) if disturb == "is read-only" else cluster.disturb("refuses"))
        yield whole

    try:
        with pytest.raises(ClusterUnavailable):
            await by_the_way.restore(name, name, chunks())
    finally:
        await cluster.set_read_only(False)
        await cluster.mend()
    await driver.drop(name)


def _names(orders: list[Order]) -> set[str]:
    """Return whose state shows that they wait; a database that is backed up is ready meanwhile."""
    return {order.name for order in orders if order.kind.name != "back up"}


def _waits_for_its_cluster(database: databases_pb2.Database) -> bool:
    progress = database.progress
    return bool(
        progress.attempts and progress.last_error and progress.waiting_on == f"cluster {database.cluster_target}"
    )


async def _seconds_to_read(place: Place) -> float:
    began = time.monotonic()
    await place.databases()
    return time.monotonic() - began


async def _check_and_bring_back(place: Place, orders: list[Order]) -> None:
    await asyncio.gather(*(order.check() for order in orders))
    await check(place.installation)
    await asyncio.gather(*(order.bring_back() for order in orders))
    await check(place.installation)


async def _let_deadlines_pass(place: Place) -> None:
    now = datetime.now(UTC)
    async with place.installation.store.session() as session:
        for rows in _WAITING:
            late = text(f"UPDATE {rows} SET deadline_at = :now, next_attempt_at = :now WHERE waiting_on IS NOT NULL")  # noqa: S608
            await session.execute(late.bindparams(bindparam("now", now, type_=UtcDateTime())))
        await session.commit()


async def _failed_backups(order: Order) -> list[backups_pb2.Backup]:
    answer = await order.life.ask("ListBackups", backups_pb2.ListBackupsRequest(name=order.name))
    return [backup for backup in answer.backups if backup.status == "failed" and backup.progress.last_error]


async def _has_failed_backup(order: Order) -> bool:
    return bool(await _failed_backups(order))


async def _back_up_again(order: Order) -> None:
    """Do what the customer does whose backup has failed."""
    for backup in await _failed_backups(order):
        await order.life.ask("DeleteBackup", backups_pb2.DeleteBackupRequest(name=order.name, id=backup.id))
    await order.prepare()
    await order.give()
