"""What is left of a deleted database for a while, how it comes back, and how it goes for good."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
from sqlmodel import col, select

from controlplane.backups.model import Backup
from controlplane.databases.model import Database
from controlplane.local.postgres import EmbeddedPostgres
from tests.backups.rest import DATABASES, back_up, connection_of, delete, events_of, names_on, path_of
from tests.clock import MovableClock
from tests.databases.test_life import run
from tests.stack import Customer, Stack, eventually

PATH = f"{DATABASES}/analytics"


async def undelete(customer: Customer) -> dict[str, Any]:
    """Bring the database back and wait until it is ready."""
    answer = await customer.call("POST", f"{PATH}/undelete")
    assert (answer.status_code, answer.json()["status"]) == (200, "restoring"), answer.text
    return await customer.until("ready", PATH)


async def refusal(customer: Customer) -> tuple[int, str]:
    """Return how an undelete is refused."""
    answer = await customer.call("POST", f"{PATH}/undelete")
    return answer.status_code, answer.json()["error"]


async def list_of(customer: Customer) -> list[dict[str, Any]]:
    """Return the account's databases, with the deleted ones."""
    found: list[dict[str, Any]] = (await customer.call("GET", f"{DATABASES}?show_deleted=true")).json()
    return found


async def used(customer: Customer) -> tuple[int, int]:
    """Return how many databases and backups count against the account's quotas."""
    quotas = (await customer.call("GET", "/api/portal/account")).json()["quotas"]
    return quotas["databases"]["used"], quotas["backups"]["used"]


@asynccontextmanager
async def held(postgres: EmbeddedPostgres, object_name: str) -> AsyncIterator[None]:
    """Keep whatever is done to a database on its cluster waiting."""
    admin = await asyncpg.connect(postgres.admin_dsn)
    await admin.execute("SELECT pg_advisory_lock(hashtextextended($1, 0))", object_name)
    try:
        yield
    finally:
        await admin.close()


def no_files(stack: Stack, object_name: str) -> Callable[[], Awaitable[bool]]:
    """Return what tells whether all files of a database's backups are gone."""
    folder: Path = stack.settings.data_dir / "backups" / object_name

    async def ask() -> bool:
        return not folder.exists() or not list(folder.iterdir())  # noqa: ASYNC240

    return ask


async def test_a_deleted_database_comes_back(customer: Customer) -> None:
    """It is what its last backup has, under its old id, name, password and labels; the backup stays and counts."""
    made = await customer.create_database("analytics", tags={"env": "test"}, backup_schedule="daily")
    connection = await connection_of(customer, "analytics")
    await run(connection["uri"], "CREATE TABLE kept AS SELECT 7 AS n")
    backup = await back_up(customer, "analytics")
    await run(connection["uri"], "INSERT INTO kept VALUES (8)")
    await customer.call("POST", f"{PATH}/stop")
    ordered = (await customer.call("DELETE", PATH)).json()
    until, since = (datetime.fromisoformat(ordered[name]) for name in ("undelete_until", "updated_at"))
    assert timedelta(days=7) <= until - since < timedelta(days=7, minutes=1)
    await customer.until("gone", PATH)
    assert await used(customer) == (0, 0)
    assert (await customer.call("GET", DATABASES)).json() == []
    (deleted,) = await list_of(customer)
    wanted = {"id": made["id"], "name": "analytics", "status": "deleted", "undelete_until": ordered["undelete_until"]}
    assert {name: deleted[name] for name in wanted} == wanted
    assert "next_backup_at" not in deleted
    found = await undelete(customer)
    for name in ("id", "name", "engine", "sku", "region", "tags", "backup_schedule", "next_backup_at", "created_at"):
        assert found[name] == made[name], name
    assert "undelete_until" not in found
    assert await connection_of(customer, "analytics") == connection
    assert await run(connection["uri"], "SELECT array_agg(n) FROM kept") == [7]
    assert (await customer.call("GET", f"{PATH}/backups")).json() == [backup]
    assert await used(customer) == (1, 1)
    assert await list_of(customer) == [found]
    assert (await refusal(customer))[0] == 404
    types = ("database.delete", "database.deleted", "database.undelete", "database.ready", "backup.deleted")
    assert [event["type"] for event in await events_of(customer, *types)][1:] == [*types[:4]]


async def test_only_the_last_backup_outlives_its_database(stack: Stack, customer: Customer) -> None:
    """The others go with the database; the last one is no longer shown, and its file stays."""
    await customer.create_database("analytics")
    object_name = (await connection_of(customer, "analytics"))["database"]
    backups = [await back_up(customer, "analytics") for _ in range(3)]
    await delete(customer, "analytics")
    files = {file.stem for file in (stack.settings.data_dir / "backups" / object_name).iterdir()}
    assert files == {backups[-1]["id"]}
    assert (await customer.call("GET", f"{PATH}/backups")).status_code == 404
    assert sorted(event["resource_id"] for event in await events_of(customer, "backup.deleted")) == [
        each["id"] for each in backups[:2]
    ]
    await undelete(customer)
    assert [each["id"] for each in (await customer.call("GET", f"{PATH}/backups")).json()] == [backups[-1]["id"]]


async def test_of_one_name_the_last_comes_back(customer: Customer) -> None:
    """Of two databases that had the name, the one that was deleted last comes back, also once more."""
    ids = []
    for number in range(2):
        ids.append((await customer.create_database("analytics"))["id"])
        await run((await connection_of(customer, "analytics"))["uri"], f"CREATE TABLE kept AS SELECT {number} AS n")
        await back_up(customer, "analytics")
        await delete(customer, "analytics")
    assert [(each["id"], each["name"]) for each in await list_of(customer)] == [(each, "analytics") for each in ids]
    for _ in range(2):
        assert (await undelete(customer))["id"] == ids[-1]
        assert await run((await connection_of(customer, "analytics"))["uri"], "SELECT n FROM kept") == 1
        await delete(customer, "analytics")


async def test_a_name_that_is_taken_or_a_full_plan_keeps_it_away(stack: Stack) -> None:
    """While another database has the name, or the plan has no room, it does not come back, and the answer says so."""
    customer = await stack.customer(plan="small")
    made = await customer.create_database("analytics")
    await back_up(customer, "analytics")
    await delete(customer, "analytics")
    await customer.create_database("analytics")
    status, sentence = await refusal(customer)
    assert (status, "already a database 'analytics'" in sentence) == (409, True)
    await delete(customer, "analytics")
    await customer.create_database("other")
    backup = await back_up(customer, "other")
    status, sentence = await refusal(customer)
    assert (status, "1 of 1 backups" in sentence) == (402, True)
    await customer.call("DELETE", f"{DATABASES}/other/backups/{backup['id']}")
    await customer.until("gone", f"{DATABASES}/other/backups/{backup['id']}")
    for name in ("more", "most"):
        await customer.create_database(name)
    status, sentence = await refusal(customer)
    assert (status, "3 of 3 databases" in sentence) == (402, True)
    assert await used(customer) == (3, 0)
    await delete(customer, "most")
    assert (await undelete(customer))["id"] == made["id"]
    assert await used(customer) == (3, 1)


async def test_without_a_backup_it_is_gone_for_good(stack: Stack, customer: Customer) -> None:
    """A database that was never backed up leaves nothing, and the answer to its deletion promises nothing."""
    made = await customer.create_database("analytics")
    ordered = (await customer.call("DELETE", PATH)).json()
    assert (ordered["status"], "undelete_until" in ordered) == ("deleting", False)
    await customer.until("gone", PATH)
    assert await refusal(customer) == (404, "There is no deleted database 'analytics'.")
    assert await list_of(customer) == []
    assert await rows_of(stack, made["id"]) == 0


async def test_to_delete_twice_changes_nothing(customer: Customer, postgres: EmbeddedPostgres) -> None:
    """A second deletion answers with the first one's time, and what is still being deleted does not come back yet."""
    await customer.create_database("analytics")
    await back_up(customer, "analytics")
    object_name = (await connection_of(customer, "analytics"))["database"]
    async with held(postgres, object_name):
        first, second = [(await customer.call("DELETE", PATH)).json() for _ in range(2)]
        assert (first["undelete_until"], first["generation"]) == (second["undelete_until"], second["generation"])
        being = "The database 'analytics' is being deleted: it can be brought back once it is deleted."
        assert await refusal(customer) == (409, being)
    await customer.until("gone", PATH)
    assert len(await events_of(customer, "database.deleted")) == 1
    await undelete(customer)


async def test_its_last_backup_can_be_deleted_too(stack: Stack, customer: Customer, postgres: EmbeddedPostgres) -> None:
    """Whoever deletes the last backup while the database is being deleted leaves nothing to bring it back from."""
    made = await customer.create_database("analytics")
    older, last = [await back_up(customer, "analytics") for _ in range(2)]
    object_name = (await connection_of(customer, "analytics"))["database"]
    async with held(postgres, object_name):
        assert "undelete_until" in (await customer.call("DELETE", PATH)).json()
        assert (await customer.call("DELETE", path_of(older))).status_code in {200, 404}
        assert "undelete_until" in (await customer.call("GET", PATH)).json()
        assert (await customer.call("DELETE", path_of(last))).status_code == 200
        assert "undelete_until" not in (await customer.call("GET", PATH)).json()
    await customer.until("gone", PATH)
    assert (await refusal(customer))[0] == 404
    assert (await list_of(customer), await used(customer)) == ([], (0, 0))
    assert await no_files(stack, object_name)()
    assert await rows_of(stack, made["id"]) == 0


async def test_a_backup_deleted_during_the_last_step_is_not_kept_for(
    stack: Stack, customer: Customer, postgres: EmbeddedPostgres
) -> None:
    """A step that has seen the last backup, which is then deleted, does not keep the database for it."""
    made = await customer.create_database("analytics")
    backup = await back_up(customer, "analytics")
    object_name = (await connection_of(customer, "analytics"))["database"]
    admin = await asyncpg.connect(postgres.admin_dsn)
    await admin.execute(f'BEGIN; ALTER ROLE "{object_name}" CONNECTION LIMIT 1')  # the step waits at its end
    await customer.call("DELETE", PATH)

    async def dropped() -> bool:
        return await names_on(postgres, object_name) == [object_name]  # the user is left

    await eventually(dropped)
    assert (await customer.call("DELETE", path_of(backup))).status_code == 200
    await customer.until("gone", path_of(backup))
    await admin.execute("ROLLBACK")
    await admin.close()

    async def forgotten() -> bool:
        return await rows_of(stack, made["id"]) == 0

    await eventually(forgotten)
    assert await names_on(postgres, object_name) == []


async def test_after_its_time_everything_goes(timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres) -> None:
    """Until a second before the end it can be brought back; after it row, backup and files go by themselves."""
    stack, clock = timed
    customer = await stack.customer()
    made = await customer.create_database("analytics")
    await back_up(customer, "analytics")
    object_name = (await connection_of(customer, "analytics"))["database"]
    ordered = (await customer.call("DELETE", PATH)).json()
    await customer.until("gone", PATH)
    until = datetime.fromisoformat(ordered["undelete_until"])
    clock.let_pass(seconds=(until - clock.now()).total_seconds() - 30)
    assert (await customer.call("POST", f"{PATH}/undelete?validate_only=true")).status_code == 200
    assert [each["id"] for each in await list_of(customer)] == [made["id"]]
    clock.let_pass(seconds=30)
    assert (await refusal(customer))[0] == 404

    async def forgotten() -> bool:
        return await rows_of(stack, made["id"]) == 0

    await eventually(forgotten)
    assert await no_files(stack, object_name)()
    assert await list_of(customer) == []
    assert (await names_on(postgres, object_name), await used(customer)) == ([], (0, 0))
    assert len(await events_of(customer, "database.deleted")) == 1
    assert len(await events_of(customer, "backup.deleted")) == 1
    again = await customer.create_database("analytics")
    assert again["id"] != made["id"]
    await delete(customer, "analytics")


async def rows_of(stack: Stack, database_id: str) -> int:
    """Return how many rows there are of a database and its backups."""
    store = stack.server.store
    databases = await store.fetch(select(Database.id).where(col(Database.id) == database_id))
    backups = await store.fetch(select(Backup.id).where(col(Backup.database_id) == database_id))
    return len(databases) + len(backups)
