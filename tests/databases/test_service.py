"""Databases over REST and native gRPC, from the order to the drop, on a real cluster."""

import asyncio
from typing import Any

import asyncpg
import pytest

from controlplane.local.postgres import EmbeddedPostgres
from tests.backups.rest import DATABASES, connection_of, names_on
from tests.stack import Customer, Stack

ORDER = {"name": "analytics", "engine": "postgresql", "sku": "db-s-1vcpu-2gb"}


async def patch(customer: Customer, name: str, **change: Any) -> dict[str, Any]:
    """Change a database; return it as the answer shows it."""
    answer = await customer.call("PATCH", f"{DATABASES}/{name}", json=change)
    assert answer.status_code == 200, answer.text
    changed: dict[str, Any] = answer.json()
    return changed


async def test_the_documented_path(customer: Customer) -> None:
    """The documents' calls create a database, show it, back it up and delete it."""
    assert (await customer.call("GET", DATABASES)).json() == []
    made = await customer.call("POST", DATABASES, json=ORDER)
    assert made.status_code == 201, made.text
    assert made.json()["status"] == "provisioning"
    await customer.until("ready", "/api/portal/databases/analytics")
    listed = (await customer.call("GET", DATABASES)).json()
    assert [database["name"] for database in listed] == ["analytics"]
    backup = await customer.call("POST", "/api/portal/databases/analytics/backups")
    assert backup.status_code == 201, backup.text
    done = await customer.until("completed", f"/api/portal/databases/analytics/backups/{backup.json()['id']}")
    assert (await customer.call("GET", "/api/portal/databases/analytics/backups")).json() == [done]
    deleted = await customer.call("DELETE", "/api/portal/databases/analytics")
    assert (deleted.status_code, deleted.json()["status"]) == (200, "deleting")
    await customer.until("gone", "/api/portal/databases/analytics")
    assert (await customer.call("GET", "/api/portal/functions")).json() == []
    assert (await customer.call("GET", "/api/portal/proxies")).json() == []
    assert (await customer.call("GET", "/api/openapi")).json()["openapi"] == "3.1.0"


async def test_a_database_is_shown_as_it_was_ordered(customer: Customer) -> None:
    """Everything that was ordered is in the answer, in a get and in a list, and the progress goes once it is ready."""
    wanted = {**ORDER, "region": "local", "tags": {"env": "test"}, "deletion_protection": True}
    made = (await customer.call("POST", DATABASES, json=wanted)).json()
    assert made.items() >= wanted.items()
    assert made["progress"]["waiting_on"] == "cluster local-postgresql"
    assert (made["generation"], made["observed_generation"]) == (1, 0)
    ready = await customer.until("ready", f"{DATABASES}/analytics")
    assert "progress" not in ready
    assert (ready["generation"], ready["observed_generation"], ready["cluster_target"]) == (1, 1, "local-postgresql")
    assert ready.items() >= {**wanted, "id": made["id"], "created_at": made["created_at"]}.items()
    assert (await customer.call("GET", DATABASES)).json() == [ready]


async def test_a_taken_name_is_refused(customer: Customer) -> None:
    """A name is unique within an account, also when two orders of it come at once; one of them is charged."""
    answers = await asyncio.gather(*(customer.call("POST", DATABASES, json=ORDER) for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    assert {answer.json().get("code") for answer in answers} == {None, "already_exists"}
    quotas = (await customer.call("GET", "/api/portal/account")).json()["quotas"]
    assert quotas["databases"]["used"] == 1


async def test_tags_are_merged(customer: Customer) -> None:
    """A change sets the labels that it names, removes those that are null, and leaves the others alone."""
    await customer.create_database("analytics", tags={"env": "test", "team": "a"})
    changed = await patch(customer, "analytics", tags={"env": "production", "team": None, "cost": "1"})
    assert changed["tags"] == {"env": "production", "cost": "1"}
    assert (changed["status"], changed["generation"], changed["observed_generation"]) == ("ready", 2, 2)
    assert (await patch(customer, "analytics", tags={}))["tags"] == changed["tags"]


async def test_a_new_size_changes_the_real_limit(customer: Customer) -> None:
    """A database of another size lets in as many connections as that size says, and keeps its data."""
    await customer.create_database("analytics", sku="db-s-1vcpu-1gb")
    uri = (await connection_of(customer, "analytics"))["uri"]
    open_now = [await asyncpg.connect(uri) for _ in range(3)]
    await open_now[0].execute("CREATE TABLE kept AS SELECT 7 AS n")
    with pytest.raises(asyncpg.TooManyConnectionsError):
        await asyncpg.connect(uri)
    changed = await patch(customer, "analytics", sku="db-s-1vcpu-2gb")
    assert (changed["status"], changed["sku"]) == ("updating", "db-s-1vcpu-2gb")
    await customer.until("ready", f"{DATABASES}/analytics")
    open_now += [await asyncpg.connect(uri) for _ in range(2)]
    with pytest.raises(asyncpg.TooManyConnectionsError):
        await asyncpg.connect(uri)
    assert await open_now[-1].fetchval("SELECT n FROM kept") == 7
    await asyncio.gather(*(connection.close() for connection in open_now))


async def test_a_size_of_another_family_is_refused(customer: Customer) -> None:
    """A ClickHouse size does not fit a PostgreSQL database, in an order nor in a change."""
    made = await customer.call("POST", DATABASES, json={**ORDER, "sku": "ch-s-1vcpu-2gb"})
    assert (made.status_code, made.json()["fields"][0]["field"]) == (400, "sku")
    await customer.create_database("analytics")
    changed = await customer.call("PATCH", f"{DATABASES}/analytics", json={"sku": "ch-s-1vcpu-2gb"})
    assert (changed.status_code, changed.json()["fields"][0]["field"]) == (400, "sku")
    unknown = await customer.call("POST", DATABASES, json={**ORDER, "name": "other", "sku": "db-xxl"})
    assert "/api/portal/skus" in unknown.json()["error"]


async def test_a_protected_database_is_not_deleted(customer: Customer) -> None:
    """While it is protected a deletion is refused with what to do; once it is not, it goes."""
    await customer.create_database("analytics", deletion_protection=True)
    refused = await customer.call("DELETE", f"{DATABASES}/analytics")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    assert "deletion_protection" in refused.json()["error"]
    await patch(customer, "analytics", deletion_protection=False)
    assert (await customer.call("DELETE", f"{DATABASES}/analytics")).status_code == 200
    await customer.until("gone", f"{DATABASES}/analytics")


async def test_a_deletion_removes_everything(customer: Customer, postgres: EmbeddedPostgres) -> None:
    """A deletion drops database and role and frees quota and name; a repeated one changes nothing; then it is 404."""
    made = await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    name = connection["database"]
    assert await names_on(postgres, name) == [name, name]
    tenant = await asyncpg.connect(connection["uri"])
    answers = [await customer.call("DELETE", f"{DATABASES}/analytics") for _ in range(2)]
    assert {answer.status_code for answer in answers} <= {200, 404}
    assert answers[0].json()["status"] == "deleting"
    await customer.until("gone", f"{DATABASES}/analytics")
    assert await names_on(postgres, name) == []
    tenant.terminate()
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("GET", "/connection"),
        ("POST", "/password"),
        ("POST", "/stop"),
        ("POST", "/start"),
        ("POST", "/retry"),
        ("POST", "/undelete"),
        ("GET", "/backups"),
        ("POST", "/backups"),
    ):
        assert (await customer.call(method, f"{DATABASES}/analytics{path}")).status_code == 404
    assert (await customer.call("GET", "/api/portal/account")).json()["quotas"]["databases"]["used"] == 0
    again = await customer.create_database("analytics")
    assert again["id"] != made["id"]


async def test_what_is_being_deleted_cannot_be_changed(customer: Customer, postgres: EmbeddedPostgres) -> None:
    """Until it is gone a deleted database shows so, keeps its name, and takes neither changes nor connections."""
    await customer.create_database("analytics")
    name = (await connection_of(customer, "analytics"))["database"]
    admin = await asyncpg.connect(postgres.admin_dsn)
    await admin.execute("SELECT pg_advisory_lock(hashtextextended($1, 0))", name)  # its deletion waits
    await customer.call("DELETE", f"{DATABASES}/analytics")
    shown = (await customer.call("GET", f"{DATABASES}/analytics")).json()
    assert shown["status"] == "deleting"
    for method, path, body in (
        ("PATCH", "", {"tags": {"a": "b"}}),
        ("GET", "/connection", None),
        ("POST", "/password", None),
        ("POST", "/stop", None),
        ("POST", "/start", None),
        ("POST", "/retry", None),
        ("POST", "/backups", None),
        ("DELETE", "?validate_only=true", None),
    ):
        answer = await customer.call(method, f"{DATABASES}/analytics{path}", json=body)
        assert answer.status_code == (200 if method == "DELETE" else 409), answer.text
    assert (await customer.call("POST", DATABASES, json=ORDER)).json()["code"] == "already_exists"
    await admin.close()
    await customer.until("gone", f"{DATABASES}/analytics")


async def test_the_connection_works_and_leads_nowhere_else(stack: Stack, customer: Customer) -> None:
    """The URI makes a table; another account's database, and those of the cluster itself, stay closed to it."""
    stranger = await stack.customer()
    mine, theirs = await asyncio.gather(customer.create_database("same"), stranger.create_database("same"))
    assert mine["id"] != theirs["id"]
    connection = await connection_of(customer, "same")
    theirs = await connection_of(stranger, "same")
    assert connection["database"] == connection["username"] != theirs["database"]
    tenant = await asyncpg.connect(
        **{key: connection[key] for key in ("host", "port", "database", "password")}, user=connection["username"]
    )
    await tenant.execute("CREATE TABLE notes (text TEXT)")
    await tenant.execute("INSERT INTO notes VALUES ('mine')")
    await tenant.close()
    for database in (theirs["database"], "postgres", "template1"):
        with pytest.raises(asyncpg.PostgresError):
            await asyncpg.connect(connection["uri"], database=database)
    tenant = await asyncpg.connect(theirs["uri"])
    assert await tenant.fetchval("SELECT to_regclass('notes')") is None
    await tenant.close()
    with pytest.raises(asyncpg.PostgresError):
        await asyncpg.connect(theirs["uri"], password=connection["password"])


async def test_the_same_name_in_two_accounts(stack: Stack, customer: Customer) -> None:
    """Two accounts' databases of one name are two: to delete one leaves the other, with its data."""
    stranger = await stack.customer()
    await asyncio.gather(customer.create_database("same"), stranger.create_database("same"))
    tenant = await asyncpg.connect((await connection_of(customer, "same"))["uri"])
    await tenant.execute("CREATE TABLE kept ()")
    await stranger.call("DELETE", f"{DATABASES}/same")
    await stranger.until("gone", f"{DATABASES}/same")
    assert await tenant.fetchval("SELECT to_regclass('kept')::text") == "kept"
    await tenant.close()
    assert (await stranger.call("GET", DATABASES)).json() == []
    assert [found["name"] for found in (await customer.call("GET", DATABASES)).json()] == ["same"]


async def test_another_accounts_database_looks_like_none(stack: Stack, customer: Customer) -> None:
    """What another account has answers exactly as what does not exist, to every call."""
    await customer.create_database("analytics")
    stranger = await stack.customer()
    for method, path, body in (
        ("GET", "", None),
        ("PATCH", "", {"tags": {"a": "b"}}),
        ("DELETE", "", None),
        ("GET", "/connection", None),
        ("POST", "/password", None),
        ("POST", "/stop", None),
        ("POST", "/start", None),
        ("POST", "/retry", None),
        ("POST", "/undelete", None),
        ("GET", "/backups", None),
        ("POST", "/backups", None),
    ):
        theirs, nobodys = [
            await stranger.call(method, f"{DATABASES}/{name}{path}", json=body) for name in ("analytics", "analytica")
        ]
        assert (theirs.status_code, theirs.json()["code"]) == (404, "not_found")
        assert nobodys.json()["error"].replace("analytica", "analytics") == theirs.json()["error"]
