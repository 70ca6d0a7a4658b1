"""Scheduled backups as servers make them: each once, whoever is there, and no more of them than are to be kept."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text

from controlplane.access.quota import charge
from controlplane.accounts.model import Account
from controlplane.backups.model import SCHEDULED, Backup
from controlplane.databases.model import STOPPING, Database
from controlplane.databases.names import name_aside
from controlplane.reconcile.model import FAILED
from tests.backups.servers import DAY, HOUR, Servers, files_of

HOURLY: dict[str, Any] = {"backup_schedule": "0 * * * *", "backups_kept": 100}
MIDNIGHT = datetime(2030, 1, 1, tzinfo=UTC)  # when the clock of the servers begins


async def test_each_is_made_once(servers: Servers) -> None:
    """Two servers make one backup every hour, on the hour, and no other."""
    await servers.order(**HOURLY)
    for _ in range(2):
        await servers.start()
    await servers.rest()
    assert await servers.backups() == []
    for hours in range(1, 6):
        await servers.pass_time(HOUR)
        assert [row.created_at for row in await servers.backups()] == [
            MIDNIGHT + timedelta(hours=hour) for hour in range(1, hours + 1)
        ]
        assert (await servers.database()).next_backup_at == MIDNIGHT + timedelta(hours=hours + 1)
    assert {(row.state, row.trigger) for row in await servers.backups()} == {("completed", "scheduled")}
    assert servers.engine.calls.count(("dump", "db_1")) == 5
    assert await servers.events("backup.completed") == [("backup.completed", None)] * 5
    assert await servers.events("backup.skipped") == []


async def test_one_comes_at_its_time(servers: Servers) -> None:
    """However seldom a database is looked at, it is looked at when its backup is due."""
    await servers.order(backup_schedule="7 0 * * *", backups_kept=7)
    await servers.start()
    await servers.rest()
    for moment in (6, 310, 7 * 60):  # it is looked at after 5 seconds, then every 300
        await servers.pass_time(moment - (servers.clock.now() - MIDNIGHT).total_seconds())
    assert [row.created_at for row in await servers.backups()] == [MIDNIGHT + timedelta(minutes=7)]


async def test_what_was_missed_is_made_once(servers: Servers) -> None:
    """When no server was there for hours, one backup makes up for all that were missed."""
    await servers.order(**HOURLY)
    await servers.start()
    await servers.rest()
    await servers.stop()
    servers.clock.advance(6.5 * HOUR)
    for _ in range(2):
        await servers.start()
    await servers.rest()
    assert [row.created_at for row in await servers.backups()] == [MIDNIGHT + timedelta(hours=6.5)]
    assert (await servers.database()).next_backup_at == MIDNIGHT + timedelta(hours=7)


async def test_one_that_becomes_due_during_a_look(servers: Servers) -> None:
    """A look that begins before a backup is due and ends after that orders none; the next orders it, once."""
    await servers.order(**HOURLY)
    await servers.start()
    await servers.rest()
    applying = servers.hold()
    servers.clock.advance(HOUR - 10)
    await servers.asked("apply", "db_1")
    observing = servers.hold()
    applying.set()
    await servers.asked("observe", "db_1")
    servers.clock.advance(20)  # less than a lease
    observing.set()
    await servers.rest()
    assert [row.created_at for row in await servers.backups()] == [MIDNIGHT + timedelta(seconds=HOUR + 10)]
    assert await servers.events("backup.skipped") == []


async def test_beyond_the_quota_it_is_skipped(servers: Servers) -> None:
    """A backup that the plan has no room for is left out; an event says why, and the next comes in its time."""
    async with servers.works.store.session() as session:
        (await session.get_one(Account, "ac_1")).plan = "small"
        await charge(session, account_id="ac_1", kind="backups", resource_id="bk_other", limit=1)
        await session.commit()
    await servers.order(**HOURLY)
    await servers.start()
    await servers.rest()
    await servers.pass_time(HOUR)
    assert await servers.backups() == []
    ((kind, detail),) = await servers.events("backup.")
    assert kind == "backup.skipped"
    assert "1 of 1 backups" in str(detail)
    async with servers.works.store.session() as session:
        (await session.get_one(Account, "ac_1")).plan = "roomy"
        await session.commit()
    await servers.pass_time(HOUR)
    assert [row.created_at for row in await servers.backups()] == [MIDNIGHT + timedelta(hours=2)]


async def test_while_one_is_written_the_next_is_skipped(servers: Servers) -> None:
    """There is never more than one scheduled backup of a database under way; one on demand is none of them."""
    await servers.order(**HOURLY)
    await servers.start()
    await servers.rest()
    await servers.back_up(next_attempt_at=MIDNIGHT + timedelta(days=1))
    await servers.pass_time(HOUR)
    assert len(await servers.backups()) == 2
    await servers.back_up(trigger=SCHEDULED, next_attempt_at=MIDNIGHT + timedelta(days=1))
    await servers.pass_time(HOUR)
    assert len(await servers.backups()) == 3
    assert await servers.events("backup.skipped") == [
        ("backup.skipped", "The backup before it is still being written.")
    ]


async def test_what_is_stopped_is_not_backed_up(servers: Servers) -> None:
    """While a database is stopped its schedule rests, without a word; once it is started it goes on."""
    await servers.order(**HOURLY)
    await servers.start()
    await servers.rest()
    await servers.change(Database, stopped=True)
    await servers.works.order_again(STOPPING)
    await servers.rest()
    for _ in range(3):
        await servers.pass_time(HOUR)
    row = await servers.database()
    assert (row.state, row.next_backup_at) == ("stopped", MIDNIGHT + timedelta(hours=4))
    assert await servers.backups() == []
    assert await servers.events("backup.") == []
    await servers.change(Database, stopped=False)
    await servers.works.order_again("starting")
    await servers.rest()
    await servers.pass_time(HOUR)
    assert len(await servers.backups()) == 1


async def test_so_many_are_kept(servers: Servers) -> None:
    """Of the scheduled backups the newest so many stay, with their files; those on demand do not count."""
    await servers.order(**{**HOURLY, "backups_kept": 2})
    await servers.start()
    await servers.rest()
    wanted = await servers.back_up()
    for hours in range(1, 6):
        await servers.pass_time(HOUR)
        rows = await servers.backups()
        assert [row.created_at for row in rows if row.trigger == "scheduled"] == [
            MIDNIGHT + timedelta(hours=hour) for hour in range(max(1, hours - 1), hours + 1)
        ]
        assert wanted in {row.id for row in rows}
        assert servers.files() == files_of(*(row.id for row in rows))
    charges = await servers.works.store.fetch(text("SELECT resource_id FROM quota_charges WHERE kind = 'backups'"))
    assert {row.resource_id for row in charges} == {row.id for row in rows} - {wanted}  # which nobody charged


async def test_for_so_many_days_they_are_kept(servers: Servers) -> None:
    """A scheduled backup goes when its days are over, but the newest completed one of a database never does."""
    await servers.order(backup_schedule="0 12 * * *", backup_days_kept=2)
    await servers.start()
    await servers.rest()
    for _ in range(8):
        await servers.pass_time(DAY / 2)
    rows = await servers.backups()
    assert [row.created_at.day for row in rows] == [3, 4]
    assert [row.expires_at.day for row in rows if row.expires_at] == [5, 6]
    await servers.change(Database, backup_schedule=None, backup_days_kept=None, next_backup_at=None)
    for _ in range(10):
        await servers.pass_time(DAY)
    assert [row.id for row in await servers.backups()] == [rows[-1].id]
    assert servers.files() == files_of(rows[-1].id)
    newer = await servers.back_up()
    for _ in range(2):
        await servers.pass_time(DAY)
    assert [row.id for row in await servers.backups()] == [newer]
    assert servers.files() == files_of(newer)


@pytest.mark.parametrize("kept", [{"backups_kept": 1}, {"backup_days_kept": 30}, {"backups_kept": 5}])
async def test_the_failed_go_once_there_is_a_newer(servers: Servers, kept: dict[str, int]) -> None:
    """A scheduled backup that has failed is kept to be seen, until a newer one is completed."""
    await servers.order(**{**HOURLY, "backups_kept": None, **kept})
    await servers.start()
    await servers.rest()
    await servers.pass_time(HOUR)
    await servers.change(Backup, state=FAILED, last_error="It was not done in time.", next_attempt_at=None)
    (failed,) = await servers.backups()
    await servers.pass_time(HOUR / 2)
    assert [row.id for row in await servers.backups()] == [failed.id]
    await servers.pass_time(HOUR / 2)
    (newer,) = await servers.backups()
    assert (newer.id != failed.id, newer.state) == (True, "completed")


async def test_a_look_in_the_midst_of_a_deletion(servers: Servers) -> None:
    """A backup that is deleted while it is looked at is removed, and nothing comes of the look."""
    await servers.order()
    await servers.start()
    await servers.rest()
    backup = await servers.back_up()
    held = servers.hold()
    servers.clock.advance(HOUR)
    await servers.asked("drop", name_aside("db_1", backup))
    async with servers.works.store.session() as session:
        row = await session.get_one(Backup, backup, with_for_update=True)
        row.order("deleting", now=servers.clock.now(), within=timedelta(hours=1), waiting_on="its file")
        await session.commit()
    held.set()
    await servers.rest()
    assert (await servers.backups(), servers.files()) == ([], set())
    assert await servers.events("backup.verif") == []
