"""Restores over REST: a backup becomes a new database that holds what the old one did, by its own user's rights."""

from typing import Any

import asyncpg
import pytest

from controlplane.local.postgres import EmbeddedPostgres
from tests.backups.held import held, new_key, slow_table, until_held
from tests.backups.rest import (
    DATABASES,
    back_up,
    connection_of,
    delete,
    events_of,
    file_of,
    names_on,
    object_name_of,
    order_restore,
    path_of,
    restore,
)
from tests.clock import MovableClock
from tests.doors import check_nothing_leaked
from tests.stack import Customer, Stack, eventually

# A row goes into this table by nobody but the user that the database is named after, wherever it is restored.
NOTES = """
CREATE FUNCTION by_its_user(id int) RETURNS bool LANGUAGE plpgsql AS $$
BEGIN
  IF session_user <> current_database() OR current_user <> session_user OR current_setting('is_superuser') = 'on' THEN
    RAISE EXCEPTION 'by %', session_user;
  END IF;
  RETURN true;
END $$;
CREATE TABLE notes (id serial PRIMARY KEY, text text UNIQUE NOT NULL, CHECK (by_its_user(id)));
CREATE INDEX notes_by_length ON notes (length(text));
CREATE VIEW short AS SELECT id FROM notes WHERE length(text) < 8;
INSERT INTO notes (text) SELECT 'note ' || n FROM generate_series(1, 500) n
"""
# What is in the second column depends on the database that the row is in.
PLACES = """
CREATE FUNCTION place(n int) RETURNS text IMMUTABLE RETURN current_database();
CREATE TABLE notes (n int, place text GENERATED ALWAYS AS (place(n)) STORED);
INSERT INTO notes VALUES (1)
"""


async def run(customer: Customer, name: str, statement: str) -> list[Any]:
    """Run SQL as the tenant of a database; return the first column of what a single query answers."""
    tenant = await asyncpg.connect((await connection_of(customer, name))["uri"])
    try:
        if ";" in statement:
            await tenant.execute(statement)
            return []
        return [row[0] for row in await tenant.fetch(statement)]
    finally:
        await tenant.close()


async def test_everything_comes_back(stack: Stack, customer: Customer) -> None:
    """Tables, rows, sequences, indexes, checks and views are as they were when the backup was made, and go on."""
    await customer.create_database("analytics")
    await run(customer, "analytics", NOTES)
    backup = await back_up(customer, "analytics")
    await run(customer, "analytics", "INSERT INTO notes (text) VALUES ('too late'); DROP VIEW short")
    restored = await restore(customer, backup, "copy")
    assert "progress" not in restored
    assert (restored["sku"], restored["region"], restored["engine"]) == ("db-s-1vcpu-2gb", "local", "postgresql")
    wanted = [f"note {number}" for number in range(1, 501)]
    assert await run(customer, "copy", "SELECT text FROM notes ORDER BY id") == wanted
    assert await run(customer, "copy", "SELECT count(*) FROM short") == [99]
    indexes = "SELECT indexname FROM pg_indexes WHERE tablename = 'notes' ORDER BY 1"
    assert await run(customer, "copy", indexes) == ["notes_by_length", "notes_pkey", "notes_text_key"]
    assert await run(customer, "copy", "INSERT INTO notes (text) VALUES ('goes on') RETURNING id") == [501]
    with pytest.raises(asyncpg.UniqueViolationError):
        await run(customer, "copy", "INSERT INTO notes (text) VALUES ('goes on') RETURNING id")
    owners = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'"
    assert await run(customer, "copy", owners) == [await object_name_of(stack, restored)]
    # And the source is as it was.
    assert await run(customer, "analytics", "SELECT text FROM notes WHERE id > 500") == ["too late"]
    assert (await customer.call("GET", path_of(backup))).json() == backup
    ready = [event for event in await events_of(customer, "database.ready") if event["resource_id"] == restored["id"]]
    assert [event["resource_name"] for event in ready] == ["copy"]


async def test_a_restored_database_is_its_own(customer: Customer) -> None:
    """It has a user and a password of its own, neither opens the other's, and deleting one leaves the other."""
    await customer.create_database("analytics")
    await run(customer, "analytics", NOTES)
    backup = await back_up(customer, "analytics")
    restored = await restore(customer, backup, "copy", sku="db-s-1vcpu-1gb")
    assert restored["sku"] == "db-s-1vcpu-1gb"
    connections = [await connection_of(customer, name) for name in ("analytics", "copy")]
    for field in ("database", "username", "password"):
        assert connections[0][field] != connections[1][field]
    for one, other in (connections, reversed(connections)):
        for password in (one["password"], other["password"]):
            with pytest.raises(asyncpg.PostgresError):
                await asyncpg.connect(one["uri"], database=other["database"], password=password)
    limit = "SELECT rolconnlimit FROM pg_roles WHERE rolname = session_user"
    assert await run(customer, "copy", limit) == [3]
    await delete(customer, "analytics")
    assert await run(customer, "copy", "SELECT count(*) FROM notes") == [500]


async def test_a_restored_database_can_be_backed_up(customer: Customer) -> None:
    """A backup of a restored database restores too."""
    await customer.create_database("analytics")
    await run(customer, "analytics", NOTES)
    await restore(customer, await back_up(customer, "analytics"), "second")
    await run(customer, "second", "UPDATE notes SET text = 'changed' WHERE id = 1; ANALYZE")
    await restore(customer, await back_up(customer, "second"), "third")
    assert await run(customer, "third", "SELECT text FROM notes WHERE id < 3 ORDER BY id") == ["changed", "note 2"]


async def test_what_only_a_superuser_may_is_refused(
    stack: Stack, customer: Customer, postgres: EmbeddedPostgres
) -> None:
    """A backup with what its database's own user may not make fails with the reason, and leaves nothing behind."""
    await customer.create_database("analytics")
    object_name = (await connection_of(customer, "analytics"))["database"]
    admin = await asyncpg.connect(postgres.admin_dsn, database=object_name)
    await admin.execute("CREATE EXTENSION file_fdw")  # it reads the server's files: only a superuser may have it
    await admin.close()
    backup = await back_up(customer, "analytics")
    copy = await object_name_of(stack, await order_restore(customer, backup, "copy"))
    failed = await customer.until("failed", f"{DATABASES}/copy")
    assert "The database refused what is in the backup" in failed["progress"]["last_error"]
    await delete(customer, "copy")
    assert await names_on(postgres, copy) == []


async def test_what_does_not_come_back_as_it_was_is_refused(customer: Customer) -> None:
    """Where another database makes another thing of the same rows, the restore fails and names the table."""
    await customer.create_database("analytics")
    await run(customer, "analytics", PLACES)
    await order_restore(customer, await back_up(customer, "analytics"), "copy")
    failed = await customer.until("failed", f"{DATABASES}/copy")
    assert failed["progress"]["last_error"] == (
        "The backup cannot be restored: What was restored is not what was backed up:"
        " the rows of the table public.notes differ."
    )
    await delete(customer, "copy")


async def test_the_source_goes_during_a_restore(stack: Stack, customer: Customer, postgres: EmbeddedPostgres) -> None:
    """Until it is whole nobody is told how to reach it; it becomes so although its source is deleted meanwhile."""
    key = new_key()
    await customer.create_database("analytics")
    await run(customer, "analytics", slow_table(key))
    backup = await back_up(customer, "analytics")
    async with held(postgres, key):
        ordered = await order_restore(customer, backup, "copy")
        await until_held(postgres, await object_name_of(stack, ordered))
        for method, path in (("GET", "connection"), ("POST", "password"), ("POST", "stop"), ("POST", "backups")):
            refused = await customer.call(method, f"{DATABASES}/copy/{path}")
            assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
            assert "is restoring" in refused.json()["error"]
        await delete(customer, "analytics")
        assert (await customer.call("GET", f"{DATABASES}/copy")).json()["status"] == "restoring"
    await customer.until("ready", f"{DATABASES}/copy")
    assert await run(customer, "copy", "SELECT id FROM slow") == [1]


async def test_a_backup_goes_during_its_restore(stack: Stack, customer: Customer, postgres: EmbeddedPostgres) -> None:
    """A restore that has begun ends although the backup is deleted; one that has not fails with the reason."""
    key = new_key()
    await customer.create_database("analytics")
    await run(customer, "analytics", slow_table(key))
    object_name = (await connection_of(customer, "analytics"))["database"]
    backup = await back_up(customer, "analytics")
    file = file_of(stack, object_name, backup)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    await order_restore(customer, backup, "late")
    await customer.until("failed", f"{DATABASES}/late")
    file.write_bytes(content)
    async with held(postgres, key):
        ordered = await order_restore(customer, backup, "copy")
        await until_held(postgres, await object_name_of(stack, ordered))
        await customer.call("DELETE", path_of(backup))
        await customer.until("gone", path_of(backup))
        assert not file.exists()
    await customer.until("ready", f"{DATABASES}/copy")
    assert await run(customer, "copy", "SELECT id FROM slow") == [1]
    assert (await customer.call("POST", f"{DATABASES}/late/retry")).json()["status"] == "restoring"
    failed = await customer.until("failed", f"{DATABASES}/late")
    assert failed["progress"]["last_error"] == "The backup was deleted before it was restored."


async def test_the_new_database_goes_during_its_restore(
    stack: Stack, customer: Customer, postgres: EmbeddedPostgres
) -> None:
    """A database that is deleted while it is restored is gone, with what was restored so far and its quota."""
    key = new_key()
    await customer.create_database("analytics")
    await run(customer, "analytics", slow_table(key))
    backup = await back_up(customer, "analytics")
    async with held(postgres, key):
        ordered = await order_restore(customer, backup, "copy")
        object_name = await object_name_of(stack, ordered)
        await until_held(postgres, object_name)
        answer = await customer.call("DELETE", f"{DATABASES}/copy")
        assert answer.json()["status"] == "deleting"
    await customer.until("gone", f"{DATABASES}/copy")
    assert await names_on(postgres, object_name) == []
    assert (await customer.call("GET", "/api/portal/account")).json()["quotas"]["databases"]["used"] == 1


async def test_nobody_gets_in_before_it_is_whole(customer: Customer, postgres: EmbeddedPostgres) -> None:
    """Who knows the password already, as of a database that is undeleted, is let in when it is ready, not before."""
    key = new_key()
    await customer.create_database("analytics")
    await run(customer, "analytics", slow_table(key))
    connection = await connection_of(customer, "analytics")
    await back_up(customer, "analytics")
    await delete(customer, "analytics")
    async with held(postgres, key):
        assert (await customer.call("POST", f"{DATABASES}/analytics/undelete")).json()["status"] == "restoring"
        await until_held(postgres, connection["database"])
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(connection["uri"])
    await customer.until("ready", f"{DATABASES}/analytics")
    assert await connection_of(customer, "analytics") == connection
    assert await run(customer, "analytics", "SELECT id FROM slow") == [1]


async def test_what_cannot_be_ordered(stack: Stack, customer: Customer) -> None:
    """A restore is refused as any order of a database is, and of what is not the caller's there is nothing."""
    await customer.create_database("analytics")
    await customer.create_database("other")
    stranger = await stack.customer()
    await stranger.create_database("analytics")
    backup = await back_up(customer, "analytics")
    path = f"{path_of(backup)}/restore"
    for body, status, code in (
        ({"name": "other"}, 409, "already_exists"),
        ({"name": "analytics"}, 409, "already_exists"),
        ({"name": "copy", "sku": "db-none"}, 400, "invalid_field"),
        ({"name": "copy", "sku": "ch-s-1vcpu-2gb"}, 400, "invalid_field"),
        ({"name": "No Name"}, 400, "invalid_field"),
        ({}, 400, "invalid_field"),
        ({"name": "copy", "engine": "mysql"}, 400, "invalid_request"),
    ):
        refused = await customer.call("POST", path, json=body)
        assert (refused.status_code, refused.json()["code"]) == (status, code), refused.text
    for caller, missing in (
        (stranger, path),
        (customer, path.replace("analytics", "other")),
        (customer, path.replace("analytics", "nothing")),
        (customer, path.replace(backup["id"], "bk_nothing")),
    ):
        refused = await caller.call("POST", missing, json={"name": "copy"})
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    assert {row["name"] for row in (await customer.call("GET", DATABASES)).json()} == {"analytics", "other"}


async def test_what_would_be_restored(customer: Customer) -> None:
    """With validate_only the answer is what would be, and nothing is, while what would fail does."""
    await customer.create_database("analytics")
    backup = await back_up(customer, "analytics")
    path = f"{path_of(backup)}/restore?validate_only=true"
    answer = await customer.call("POST", path, json={"name": "copy"})
    assert (answer.status_code, answer.json()["status"], answer.json()["name"]) == (201, "restoring", "copy")
    assert (await customer.call("GET", f"{DATABASES}/copy")).status_code == 404
    assert (await customer.call("GET", "/api/portal/account")).json()["quotas"]["databases"]["used"] == 1
    assert (await customer.call("POST", path, json={"name": "analytics"})).status_code == 409


async def test_a_restore_takes_a_place_in_the_quota(stack: Stack) -> None:
    """A plan's last database cannot be followed by a restored one: 402."""
    customer = await stack.customer(plan="small")
    await customer.create_database("analytics")
    backup = await back_up(customer, "analytics")
    for name in ("second", "third"):
        await order_restore(customer, backup, name)
    refused = await customer.call("POST", f"{path_of(backup)}/restore", json={"name": "fourth"})
    assert (refused.status_code, refused.json()["code"]) == (402, "quota_exceeded")
    await customer.until("ready", f"{DATABASES}/third")


async def test_only_what_is_completed_is_restored(
    timed: tuple[Stack, MovableClock], postgres: EmbeddedPostgres
) -> None:
    """A backup that is being written, or has failed, is refused with 409 and says so."""
    stack, clock = timed
    customer = await stack.customer()
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    holder = await asyncpg.connect(connection["uri"])
    await holder.execute("CREATE TABLE notes ()")
    lock = holder.transaction()
    await lock.start()
    await holder.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")  # the dump waits for it
    backup = (await customer.call("POST", f"{DATABASES}/analytics/backups")).json()
    path = f"{path_of(backup)}/restore"
    running = await customer.call("POST", path, json={"name": "copy"})
    clock.let_pass(hours=7)
    admin = await asyncpg.connect(postgres.admin_dsn)
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND wait_event_type = 'Lock'"
    await eventually(lambda: admin.fetch(end, connection["database"]))
    await admin.close()
    await customer.until("failed", path_of(backup))
    failed = await customer.call("POST", path, json={"name": "copy"})
    for refused, state in ((running, "running"), (failed, "failed")):
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
        assert refused.json()["error"] == (
            f"The backup '{backup['id']}' is {state}: it can be restored once it is completed."
        )
        check_nothing_leaked(refused.json()["error"])
    await holder.close()
