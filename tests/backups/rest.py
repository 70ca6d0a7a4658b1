"""What the tests of backups ask over REST, and where what they ask for can be seen."""

from pathlib import Path
from typing import Any

import asyncpg
from sqlmodel import col, select

from controlplane.databases.model import Database
from controlplane.local.postgres import EmbeddedPostgres
from tests.stack import Customer, Stack

DATABASES = "/api/portal/databases"


async def connection_of(customer: Customer, name: str) -> dict[str, Any]:
    """Return how the customer reaches his database."""
    answer = await customer.call("GET", f"{DATABASES}/{name}/connection")
    assert answer.status_code == 200, answer.text
    connection: dict[str, Any] = answer.json()
    return connection


async def back_up(customer: Customer, name: str) -> dict[str, Any]:
    """Order a backup and wait until it is completed."""
    answer = await customer.call("POST", f"{DATABASES}/{name}/backups")
    assert answer.status_code == 201, answer.text
    return await customer.until("completed", path_of(answer.json()))


async def order_restore(customer: Customer, backup: dict[str, Any], name: str, **wanted: Any) -> dict[str, Any]:
    """Order that a backup is restored into a new database."""
    answer = await customer.call("POST", f"{path_of(backup)}/restore", json={"name": name, **wanted})
    assert answer.status_code == 201, answer.text
    ordered: dict[str, Any] = answer.json()
    assert ordered["status"] == "restoring"
    return ordered


async def restore(customer: Customer, backup: dict[str, Any], name: str, **wanted: Any) -> dict[str, Any]:
    """Restore a backup into a new database and wait until that is ready."""
    await order_restore(customer, backup, name, **wanted)
    return await customer.until("ready", f"{DATABASES}/{name}")


async def delete(customer: Customer, name: str) -> None:
    """Delete a database and wait until it is gone."""
    answer = await customer.call("DELETE", f"{DATABASES}/{name}")
    assert answer.status_code == 200, answer.text
    await customer.until("gone", f"{DATABASES}/{name}")


async def events_of(customer: Customer, *kinds: str) -> list[dict[str, Any]]:
    """Return the account's events of these kinds, oldest first."""
    answer = await customer.call("GET", "/api/portal/events?after=0")
    return [event for event in answer.json() if event["type"] in kinds]


def path_of(backup: dict[str, Any]) -> str:
    """Return the path of a backup."""
    return f"{DATABASES}/{backup['database']}/backups/{backup['id']}"


async def object_name_of(stack: Stack, database: dict[str, Any]) -> str:
    """Return what a database is called on its cluster and in the storage, also before its customer is told."""
    rows = await stack.server.store.fetch(select(Database).where(col(Database.id) == database["id"]))
    name: str = rows[0].object_name
    return name


def file_of(stack: Stack, object_name: str, backup: dict[str, Any], suffix: str = ".htxb") -> Path:
    """Return where the sealed file of a backup is; its manifest has the suffix `.json`."""
    return stack.settings.data_dir / "backups" / object_name / f"{backup['id']}{suffix}"


async def names_on(postgres: EmbeddedPostgres, prefix: str) -> list[str]:
    """Return the databases and users on the cluster whose names begin with this."""
    admin = await asyncpg.connect(postgres.admin_dsn)
    rows = await admin.fetch("SELECT datname AS name FROM pg_database UNION ALL SELECT rolname FROM pg_roles")
    await admin.close()
    return [row["name"] for row in rows if row["name"].startswith(prefix)]
