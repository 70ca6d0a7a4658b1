"""The sweep: what no row owns is seen, left alone for its grace and removed; what anybody owns is never touched."""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import delete
from sqlmodel import col

from controlplane.backups.model import RUNNING
from controlplane.backups.storage import FolderStorage, StorageUnavailable
from controlplane.databases.engines.engine import Busy, ClusterUnavailable, EngineError
from controlplane.databases.engines.mysql import MySQL
from controlplane.databases.engines.postgresql import PostgreSQL
from controlplane.databases.model import DELETED, READY, Database
from controlplane.databases.names import name_aside
from controlplane.databases.sweep import STORAGE, find_orphans
from controlplane.ids import new_id
from controlplane.local.mariadb import EmbeddedMariaDB
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.sql import Store
from tests.databases.engines.cluster import BIN_DIR
from tests.databases.engines.mysql import cluster as mysql_cluster
from tests.databases.fake_engine import FakeEngine
from tests.databases.yard import GRACE, Yard, files_of, leased, target
from tests.stack import eventually, free_port


@pytest.fixture
async def yard(storage_url: str, tmp_path: Path, postgres: EmbeddedPostgres) -> AsyncIterator[Yard]:
    """A yard on a storage of either kind."""
    async with Yard(storage_url, tmp_path / "backups", postgres) as yard:
        yield yard


async def test_what_nobody_owns_is_told_then_removed(yard: Yard) -> None:
    """A database, a role and a file without a row are logged and counted, left alone for the grace, then removed."""
    whole, alone = await yard.appear(yard.new_name()), yard.new_name()
    admin = await asyncpg.connect(yard.dsn)
    await admin.execute(f'CREATE ROLE "{alone}"')
    await admin.close()
    files = files_of(yard.new_name(), new_id("bk"))
    yard.write(*files)
    seen = yard.clock.now()
    lines = await yard.run()
    told = {(line["place"], line["name"]) for line in lines if line["event"] == "nobody owns this"}
    assert told == {("pg", whole), ("pg", alone), *((STORAGE, file) for file in files)}
    assert {line["removed_after"] for line in lines} == {str(seen + GRACE)}
    assert (yard.gauge("pg"), yard.gauge("fake"), yard.gauge(STORAGE)) == (2, 0, 2)
    yard.clock.advance(GRACE.total_seconds() - 1)
    assert await yard.run() == []
    assert await yard.there() == {whole, alone}
    assert set(await yard.files.list()) == set(files)
    assert set((await yard.known()).values()) == {seen}
    yard.clock.advance(1)
    lines = await yard.run()
    assert {(line["place"], line["name"]) for line in lines if line["event"] == "removed what nobody owns"} == told
    assert (await yard.there(), await yard.files.list(), await yard.known()) == (set(), [], {})
    assert (yard.gauge("pg"), yard.gauge(STORAGE)) == (0, 0)
    assert (yard.removed("pg"), yard.removed(STORAGE)) == (2, 2)
    assert await yard.run() == []


async def test_what_goes_or_gets_a_row_is_forgotten(yard: Yard) -> None:
    """An orphan that somebody removes, or that turns out to have a row, is forgotten; its grace begins anew if need be.

    So it is when somebody puts the rows back that a restore of the control plane's own database had lost.
    """
    row = yard.database(cluster="fake")
    gone, owned = await yard.appear(yard.new_name(), "fake"), await yard.appear(row.object_name, "fake")
    await yard.run()
    assert set(await yard.known()) == {("fake", gone), ("fake", owned)}
    yard.fake.databases.pop(gone)
    await yard.add(row)
    yard.clock.advance(2 * GRACE.total_seconds())
    await yard.run()
    assert await yard.known() == {}
    assert (await yard.there("fake"), yard.gauge("fake"), yard.removed("fake")) == ({owned}, 0, None)
    async with yard.store.session() as session:
        await session.execute(delete(Database).where(col(Database.id) == row.id))
        await session.commit()
    await yard.run()
    assert await yard.known() == {("fake", owned): yard.clock.now()}
    assert await yard.there("fake") == {owned}


async def test_what_is_not_called_as_ours_is_not_touched(yard: Yard) -> None:
    """What other installations and people have made, beside ours too, and templates stay, whatever the grace."""
    ours, other = yard.new_name(), f"h0000_{yard.new_name().partition('_')[2]}"
    foreign = {other, f"{ours}_copy", f"{yard.prefix}reports", f"{yard.prefix}{'i' * 26}", new_id("db"), "people"}
    backup = new_id("bk")
    files = {
        *files_of(other, backup),
        *files_of(new_id("db"), backup),
        f"{ours}/{backup}.txt",
        f"{ours}/notes.json",
        f"{ours}/My notes",
        f"{yard.prefix}keep/{backup}.htxb",
    }
    admin = await asyncpg.connect(yard.dsn)
    for name in foreign:
        await admin.execute(f'CREATE ROLE "{name}"')
    await admin.execute(f'CREATE DATABASE "{ours}_copy"')
    everything = "SELECT datname FROM pg_database UNION ALL SELECT rolname FROM pg_roles"
    before = sorted(row[0] for row in await admin.fetch(everything))
    yard.write(*files)
    await yard.appear(ours)
    try:
        await yard.run(grace=timedelta())
        assert sorted(row[0] for row in await admin.fetch(everything)) == before
        assert {str(path.relative_to(yard.folder)) for path in yard.folder.glob("*/*")} == files
        assert (yard.removed("pg"), yard.removed(STORAGE), await yard.known()) == (1, None, {})
    finally:
        await admin.execute(f'DROP DATABASE "{ours}_copy"')
        for name in foreign:
            await admin.execute(f'DROP ROLE "{name}"')
        await admin.close()


async def test_rows_own_what_they_have(yard: Yard) -> None:
    """A database with a row stays in any state and on any cluster, as do all files of backups that have a row.

    Two entries of the catalogue may be one server, and a cluster that was given another name is still the same.
    """
    cases = (("fake", READY), ("fake", "failed"), ("under-its-old-name", READY))
    rows = [yard.database(cluster=cluster, state=state) for cluster, state in cases]
    deleted = yard.database(state=DELETED, deleted_at=yard.clock.now(), undelete_until=yard.clock.now() + 7 * GRACE)
    await yard.add(*rows, deleted)
    backups = [yard.backup(deleted), yard.backup(rows[0], state=RUNNING), yard.backup(rows[1], state="failed")]
    await yard.add(*backups)
    names = {await yard.appear(row.object_name, "fake") for row in rows}
    files = {file for row, backup in zip((deleted, *rows), backups, strict=False) for file in files_of(row, backup.id)}
    yard.write(*files)
    assert await yard.run(grace=timedelta()) == []
    assert (await yard.there("fake"), set(await yard.files.list())) == (names, files)


async def test_what_is_left_of_a_deleted_database_goes(yard: Yard) -> None:
    """What a cluster still has of a deleted database is an orphan; the backup from which it can come back stays."""
    row = yard.database(state=DELETED, deleted_at=yard.clock.now(), undelete_until=yard.clock.now() + 7 * GRACE)
    await yard.add(row)
    backup = yard.backup(row)
    await yard.add(backup)
    yard.write(*files_of(row, backup.id))
    await yard.appear(row.object_name)
    await yard.run(grace=timedelta())
    assert (await yard.there(), len(await yard.files.list())) == (set(), 2)
    assert await yard.lease_of(row) is None


async def test_a_verification_owns_its_database(yard: Yard) -> None:
    """The database in which a backup is being verified is let be; one that was left over is an orphan."""
    row = yard.database(cluster="fake")
    await yard.add(row)
    at_work, done = yard.backup(row, **leased(yard.clock)), yard.backup(row)
    await yard.add(at_work, done)
    names = [await yard.appear(name_aside(row.object_name, backup.id), "fake") for backup in (at_work, done)]
    await yard.appear(row.object_name, "fake")
    await yard.run(grace=timedelta())
    assert await yard.there("fake") == {row.object_name, names[0]}
    assert (await yard.known(), yard.gauge("fake")) == ({}, 0)
    await yard.change(at_work, lease_token=None, lease_until=None)
    await yard.run()
    assert set(await yard.known()) == {("fake", names[0])}


async def test_what_comes_back_meanwhile_is_not_removed(yard: Yard) -> None:
    """An orphan that gets an owner between the look and its removal stays, and none gets one while it is removed."""
    row = yard.database(
        cluster="fake", object_name=f"{yard.prefix}{'0' * 25}1", state=DELETED, deleted_at=yard.clock.now()
    )
    back = yard.database(
        cluster="fake", object_name=f"{yard.prefix}{'0' * 25}2", state=DELETED, deleted_at=yard.clock.now()
    )
    await yard.add(row, back)
    backup = yard.backup(row)
    await yard.add(backup)
    for name in (row.object_name, back.object_name, name_aside(row.object_name, backup.id)):
        await yard.appear(name, "fake")
    gate = yard.fake.hold()
    yard.fake.calls.clear()
    running = asyncio.create_task(yard.run(grace=timedelta()))

    async def at_first() -> bool:
        return yard.fake.calls == [("drop", row.object_name)]

    await eventually(at_first)
    assert await yard.lease_of(row) not in {None, "somebody"}  # whoever undeletes it waits for us
    await yard.change(back, state="provisioning", deleted_at=None)
    await yard.change(backup, **leased(yard.clock))
    gate.set()
    await running
    assert await yard.there("fake") == {back.object_name, name_aside(row.object_name, backup.id)}
    assert await yard.lease_of(row) is None
    assert await yard.lease_of(backup) == "somebody"
    assert yard.removed("fake") == 1


async def test_a_sweep_that_was_overtaken_removes_nothing(yard: Yard) -> None:
    """A database that is undeleted while a sweep is paused, for longer than its lease, stays when the sweep goes on."""
    row = yard.database(cluster="fake", state=DELETED, deleted_at=yard.clock.now())
    await yard.add(row)
    await yard.appear(row.object_name, "fake")
    gate = yard.fake.hold()
    running = asyncio.create_task(yard.run(grace=timedelta()))

    async def is_at_it() -> bool:
        return ("drop", row.object_name) in yard.fake.calls

    await eventually(is_at_it)
    await yard.change(row, state="provisioning", deleted_at=None, **leased(yard.clock))
    gate.set()
    await running
    assert (await yard.there("fake"), yard.removed("fake")) == ({row.object_name}, None)
    assert await yard.lease_of(row) == "somebody"


async def test_a_deletion_under_way_is_not_reported(yard: Yard) -> None:
    """What is gone when it is looked at once more, as its deletion ended meanwhile, is no orphan."""

    class Ending(FakeEngine):
        async def names(self, prefix: str) -> set[str]:
            seen = await super().names(prefix)
            self.databases.clear()
            return seen

    yard.engines["fake"] = Ending()
    await yard.appear(yard.new_name(), "fake")
    assert await yard.run(grace=timedelta()) == []
    assert await yard.known() == {}


async def test_a_cluster_that_is_away_keeps_nobody(yard: Yard) -> None:
    """While a cluster does not answer the others are swept, and what was known of it stays known and counted."""
    away, there = await yard.appear(yard.new_name()), await yard.appear(yard.new_name(), "fake")
    await yard.run()
    seen = await yard.known()
    real = yard.engines["pg"]
    dead = f"postgresql://nobody@127.0.0.1:{free_port()}/postgres"
    yard.engines["pg"] = PostgreSQL(admin_dsn=dead, host="127.0.0.1", port=1, bin_dir=BIN_DIR)
    yard.clock.advance(GRACE.total_seconds())
    await yard.run()
    assert await yard.there("fake") == set()
    assert await yard.known() == {("pg", away): seen["pg", away]}
    assert (yard.gauge("pg"), yard.gauge("fake")) == (1, 0)
    del yard.engines["pg"]  # as for a server whose catalogue has it no more
    await yard.run()
    assert await yard.known() == {("pg", away): seen["pg", away]}
    yard.engines["pg"] = real
    await yard.run()
    assert (await yard.there(), await yard.known()) == (set(), {})
    assert there not in yard.fake.databases


async def test_a_storage_that_is_away_keeps_nobody(yard: Yard) -> None:
    """While the storage of backups does not answer, the clusters are swept, and its orphans stay known."""

    class Away(FolderStorage):
        async def list(self, folder: str = "") -> list[str]:
            raise StorageUnavailable(folder)

        async def sweep(self, *, before: datetime) -> None:
            raise StorageUnavailable(str(before))

    yard.write(*files_of(yard.new_name(), new_id("bk")))
    await yard.run()
    name = await yard.appear(yard.new_name(), "fake")
    yard.files = Away(yard.folder)
    lines = await yard.run(grace=timedelta())
    assert [line["event"] for line in lines if line.get("place") != "fake"] == [
        "what is left of unfinished backups cannot be removed"
    ]
    assert name not in yard.fake.databases
    assert (len(await yard.known()), yard.gauge(STORAGE)) == (2, 2)


async def test_what_cannot_be_removed_is_told_and_tried_again(yard: Yard) -> None:
    """An orphan that its cluster will not drop is logged and kept; one that does not answer is not asked further.

    What another server is busy with is no news.
    """
    names = sorted([await yard.appear(yard.new_name(), "fake") for _ in range(3)])
    for failure, tried, told in (
        (EngineError("No."), names, names),
        (ClusterUnavailable("Away."), names[:1], names[:1]),
        (Busy("Wait."), names, []),
    ):
        yard.fake.failure = failure
        yard.fake.calls.clear()
        lines = await yard.run(grace=timedelta())
        assert yard.fake.calls == [("drop", name) for name in tried]
        assert [line["name"] for line in lines if line["event"] == "what nobody owns cannot be removed"] == told
        assert (yard.gauge("fake"), yard.removed("fake"), len(await yard.known())) == (3, None, 3)
    yard.fake.failure = None
    await yard.run(grace=timedelta())
    assert (yard.fake.databases, yard.gauge("fake"), yard.removed("fake")) == ({}, 0, 3)


async def test_two_servers_sweep_at_once(yard: Yard) -> None:
    """Two servers that sweep together write down, remove and count each orphan once, and neither stumbles."""
    names = {await yard.appear(yard.new_name(), cluster) for cluster in ("pg", "pg", "fake", "fake")}
    yard.write(*files_of(yard.new_name(), new_id("bk")))
    other = Store(yard.url)
    both = yard.sweep(), yard.sweep(store=other)
    try:
        await asyncio.gather(*(sweep.run() for sweep in both))
        assert {name for place, name in await yard.known() if place != STORAGE} == names
        assert len(await yard.known()) == 6
        yard.clock.advance(GRACE.total_seconds())
        await asyncio.gather(*(sweep.run() for sweep in both))
        await both[0].run()  # what both were busy with
    finally:
        await other.close()
    assert (await yard.there(), await yard.there("fake"), await yard.files.list()) == (set(), set(), [])
    assert await yard.known() == {}
    assert (yard.removed("pg"), yard.removed("fake"), yard.removed(STORAGE)) == (2, 2, 2)


@pytest.mark.parametrize(("grace", "stays", "goes"), [(24, 23, 25), (0, 5.9, 6.1)])
async def test_what_is_left_of_unfinished_backups_goes(yard: Yard, grace: float, stays: float, goes: float) -> None:
    """The part of a file that nobody writes any more goes after the grace; one of a backup that may run yet stays."""
    folder = yard.folder / yard.new_name()
    parts = {}
    for hours in (0, stays, goes):
        part = folder / f"{new_id('bk')}.htxb.{hours}.part"
        yard.write(str(part.relative_to(yard.folder)))
        written = (yard.clock.now() - timedelta(hours=hours)).timestamp()
        os.utime(part, (written, written))
        parts[hours] = part
    await yard.run(grace=timedelta(hours=grace))
    assert {hours for hours, part in parts.items() if part.exists()} == {0, stays}


async def test_many_rows_are_asked_some_at_a_time(yard: Yard) -> None:
    """Of more names than are asked about at once, exactly those without a row are orphans."""
    rows = [yard.database(cluster="fake") for _ in range(601)]
    await yard.add(*rows)
    orphans = {yard.new_name() for _ in range(602)}
    yard.fake.databases = {name: target(name) for name in (*(row.object_name for row in rows), *orphans)}
    found = await find_orphans(yard.store, yard.engines, yard.files)
    assert found.orphans == {("fake", name) for name in orphans}
    await yard.run()
    assert set(await yard.known()) == found.orphans
    yard.fake.databases.clear()
    await yard.run()
    assert await yard.known() == {}


async def test_mariadb_is_swept(yard: Yard, folder: Path) -> None:
    """On MariaDB a database and a user without a row are removed, and what is not called as ours stays."""
    port, home = free_port(), folder / f"swept-{yard.prefix}"
    server = EmbeddedMariaDB(data_dir=home, run_dir=home / "run", port=port)
    await server.start()
    try:
        yard.engines["mysql"] = engine = MySQL(admin_url=server.admin_url, host="127.0.0.1", port=port)
        cluster = mysql_cluster.Cluster(admin_url=server.admin_url, port=port, engine=engine)
        row = yard.database(cluster="mysql")
        await yard.add(row)
        owned, whole, user = row.object_name, yard.new_name(), yard.new_name()
        for name in (owned, whole):
            await yard.appear(name, "mysql")
        with cluster.admin() as admin:
            mysql_cluster.run(admin, f"CREATE USER '{user}'", f"CREATE DATABASE `{whole}_copy`")
        await yard.run()
        assert {name for place, name in await yard.known() if place == "mysql"} == {whole, user}
        yard.clock.advance(GRACE.total_seconds())
        await yard.run()
        assert await yard.there("mysql") == {owned, f"{whole}_copy"}
        assert (yard.gauge("mysql"), yard.removed("mysql")) == (0, 2)
    finally:
        await server.stop()
