"""Verification: whether the newest backup can be restored is found out before somebody needs it."""

from datetime import datetime

import asyncpg
import pytest
from sqlmodel import col, select

from controlplane.backups.model import Backup
from controlplane.databases.engines.engine import ClusterUnavailable, EngineError
from controlplane.databases.names import name_aside
from controlplane.local.postgres import EmbeddedPostgres
from controlplane.reconcile.lease import LEASE
from tests.backups.held import held, new_key, slow_table, until_held
from tests.backups.rest import DATABASES, back_up, connection_of, events_of, file_of, names_on, path_of
from tests.backups.servers import DAY, HOUR, Servers
from tests.clock import MovableClock
from tests.doors import check_nothing_leaked
from tests.stack import Stack, eventually

QUARTER = HOUR / 4  # when a new backup is verified


def aside(backup: str) -> str:
    """Return what a backup is restored as."""
    return name_aside("db_1", backup)


async def test_a_backup_is_verified(timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres) -> None:
    """A quarter of an hour after it was made it is restored aside and compared: GET and an event say that it can be."""
    stack, clock = timed
    customer = await stack.customer()
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    tenant = await asyncpg.connect(connection["uri"])
    await tenant.execute("CREATE TABLE notes AS SELECT n, sha512(n::text::bytea) AS hash FROM generate_series(1, 50) n")
    backup = await back_up(customer, "analytics")
    await tenant.execute("DELETE FROM notes")  # what is there now is not what it is compared with
    await tenant.close()
    assert "verified_at" not in backup
    clock.let_pass(minutes=16)

    async def verified() -> bool:
        return "verified_at" in (await customer.call("GET", path_of(backup))).json()

    await eventually(verified)
    shown = (await customer.call("GET", path_of(backup))).json()
    assert shown.items() >= backup.items()
    assert shown.keys() - backup.keys() == {"verified_at"}
    assert shown["verified_at"] > shown["completed_at"]
    (event,) = await events_of(customer, "backup.verified", "backup.verification_failed")
    assert (event["type"], event["resource_id"]) == ("backup.verified", backup["id"])
    assert await names_on(postgres, name_aside(connection["database"], backup["id"])) == []


@pytest.mark.parametrize("suffix", [".htxb", ".json"])
async def test_a_damaged_backup_is_found(
    timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres, suffix: str
) -> None:
    """Of a backup that was changed GET and an event say why it cannot be restored, and nothing is left of the try."""
    stack, clock = timed
    customer = await stack.customer()
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    backup = await back_up(customer, "analytics")
    file = file_of(stack, connection["database"], backup, suffix)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    clock.let_pass(minutes=16)

    async def found() -> str | None:
        shown = (await customer.call("GET", path_of(backup))).json()
        assert "verified_at" not in shown
        reason: str | None = shown.get("verification_error")
        return reason

    reason = await eventually(found)
    assert (
        reason
        == {
            ".htxb": "The backup was changed, or it is another one.",
            ".json": "The backup's manifest was changed.",
        }[suffix]
    )
    check_nothing_leaked(reason)
    assert (await customer.call("GET", path_of(backup))).json()["status"] == "completed"
    (event,) = await events_of(customer, "backup.verified", "backup.verification_failed")
    assert (event["type"], event["detail"]) == ("backup.verification_failed", reason)
    assert await names_on(postgres, name_aside(connection["database"], backup["id"])) == []


async def test_what_was_damaged_since(servers: Servers) -> None:
    """It is verified every week, and every day while it cannot be restored; each turn is told once."""
    await servers.order()
    await servers.start()
    await servers.rest()
    backup = await servers.back_up()
    file = servers.folder / f"{backup}.htxb"
    content = file.read_bytes()
    await servers.pass_time(QUARTER)
    verified, failed = ("backup.verified", None), ("backup.verification_failed", "The backup is cut off.")
    assert await servers.events("backup.verif") == [verified]
    file.write_bytes(content[:-1])
    await servers.pass_time(6 * DAY)
    assert await servers.events("backup.verif") == [verified]
    await servers.pass_time(DAY)
    assert await servers.events("backup.verif") == [verified, failed]
    (row,) = await servers.backups()
    assert (row.state, row.verification_error) == ("completed", failed[1])
    assert row.verified_at is not None
    file.write_bytes(content)
    await servers.pass_time(DAY)
    assert await servers.events("backup.verif") == [verified, failed, verified]
    (row,) = await servers.backups()
    assert (row.verification_error, row.verified_at) == (None, servers.clock.now())
    await servers.pass_time(7 * DAY)
    assert await servers.events("backup.verif") == [verified, failed, verified]
    assert servers.engine.databases.keys() == {"db_1"}


async def test_what_is_refused_is_found(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup that the cluster refuses to restore is no good, though its files are as they were."""
    await servers.order()
    await servers.start()
    await servers.rest()

    async def refuse(*_: object) -> None:
        raise EngineError("The database refused what is in it.")

    monkeypatch.setattr(servers.engine, "restore", refuse)
    await servers.back_up()
    await servers.pass_time(QUARTER)
    ((kind, detail),) = await servers.events("backup.verif")
    assert (kind, detail) == (
        "backup.verification_failed",
        "It could not be restored: The database refused what is in it.",
    )
    assert servers.engine.databases.keys() == {"db_1"}


async def test_only_the_newest_is_verified(servers: Servers) -> None:
    """An older backup is left alone, until the newer ones are gone."""
    await servers.order()
    await servers.start()
    await servers.rest()
    older = await servers.back_up()
    await servers.pass_time(60)
    newer = await servers.back_up()
    await servers.pass_time(10 * DAY)
    assert ("restore", aside(newer)) in servers.engine.calls
    assert ("restore", aside(older)) not in servers.engine.calls
    assert [bool(row.verified_at) for row in await servers.backups()] == [False, True]


async def test_a_cluster_that_is_down(servers: Servers) -> None:
    """While the cluster does not answer nothing is said about the backup; it is verified once the cluster is back."""
    await servers.order()
    await servers.start()
    await servers.rest()
    await servers.back_up()
    servers.engine.failure = ClusterUnavailable("The cluster does not answer.")
    servers.clock.advance(QUARTER)
    for attempts in range(1, 4):

        async def tried(attempts: int = attempts) -> bool:
            return (await servers.backups())[0].attempts == attempts

        await eventually(tried)
        servers.clock.advance(30)
    (row,) = await servers.backups()
    assert (row.state, row.verified_at, row.verification_error) == ("completed", None, None)
    assert (row.waiting_on, row.last_error) == ("cluster local-postgresql", "The cluster does not answer.")
    servers.engine.failure = None
    await servers.pass_time(60)
    (row,) = await servers.backups()
    assert (row.state, row.waiting_on, row.last_error) == ("completed", None, None)
    assert row.verified_at is not None
    assert await servers.events("backup.verif") == [("backup.verified", None)]
    assert servers.engine.databases.keys() == {"db_1"}


async def test_a_server_that_is_gone_in_between(servers: Servers) -> None:
    """When a server stands still in the midst of it another begins anew, and neither of the two leaves anything."""
    await servers.order()
    await servers.start()
    await servers.rest()
    backup = await servers.back_up()
    held = servers.hold()
    servers.clock.advance(QUARTER)
    await servers.asked("drop", aside(backup))
    first = servers.hold()
    held.set()
    await servers.asked("apply", aside(backup))
    second = servers.hold()
    first.set()
    await servers.asked("restore", aside(backup))
    assert aside(backup) in servers.engine.databases
    servers.hold().set()
    servers.clock.advance(LEASE.total_seconds() + 1)
    await servers.start()
    await servers.rest()
    (row,) = await servers.backups()
    assert row.verified_at == servers.clock.now()
    assert servers.engine.databases.keys() == {"db_1"}
    second.set()
    await servers.stop()
    assert servers.engine.databases.keys() == {"db_1"}
    assert (await servers.backups())[0].verified_at == row.verified_at
    assert await servers.events("backup.verif") == [("backup.verified", None)]


async def test_a_stop_in_between(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is stopped in the midst of it removes what it has restored so far."""
    monkeypatch.setattr("controlplane.reconcile.loop._SECONDS_TO_STOP", 0.05)
    await servers.order()
    await servers.start()
    await servers.rest()
    backup = await servers.back_up()
    held = servers.hold()
    servers.clock.advance(QUARTER)
    await servers.asked("drop", aside(backup))
    restoring = servers.hold()
    held.set()
    await servers.asked("apply", aside(backup))
    servers.hold()
    restoring.set()
    await servers.asked("restore", aside(backup))
    servers.hold().set()
    await servers.stop()
    assert servers.engine.databases.keys() == {"db_1"}
    (row,) = await servers.backups()
    assert (row.verified_at, row.lease_token) == (None, None)


async def test_the_deletion_of_its_database_decides(
    timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres
) -> None:
    """When a database is deleted while its backup is verified, that says when the backup goes, not the verification."""
    stack, clock = timed
    key, customer = new_key(), await stack.customer()
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    tenant = await asyncpg.connect(connection["uri"])
    await tenant.execute(slow_table(key))
    await tenant.close()
    backup = await back_up(customer, "analytics")
    name = name_aside(connection["database"], backup["id"])

    async def row() -> Backup:
        rows = await stack.server.store.fetch(select(Backup).where(col(Backup.id) == backup["id"]))
        found: Backup = rows[0]
        return found

    async with held(postgres, key):
        clock.let_pass(minutes=16)
        await until_held(postgres, name)
        deleted = (await customer.call("DELETE", f"{DATABASES}/analytics")).json()

    async def at_rest() -> bool:
        return (await row()).lease_token is None

    await eventually(at_rest)
    assert (
        (await row()).expires_at == (await row()).next_attempt_at == datetime.fromisoformat(deleted["undelete_until"])
    )
    assert await names_on(postgres, name) == []
