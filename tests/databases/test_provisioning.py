"""What happens to databases and backups while their cluster is down, or is no longer in the catalogue."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import update
from sqlmodel import col

from controlplane.databases.model import Database
from controlplane.local.postgres import EmbeddedPostgres
from tests.backups.rest import DATABASES, connection_of, delete, events_of
from tests.conftest import new_storage
from tests.stack import Customer, Stack, eventually, free_port

ELSEWHERE = {"engine": "postgresql", "sku": "db-s-1vcpu-1gb", "region": "elsewhere"}


@pytest.fixture(scope="module")
def later_port() -> int:
    """The port of the cluster that does not run yet."""
    return free_port()


@pytest.fixture(scope="module")
async def later(folder: Path, database_url: str, later_port: int) -> AsyncIterator[EmbeddedPostgres]:
    """A cluster that does not run yet."""
    home = folder / ("later-pg" if database_url else "later")
    server = EmbeddedPostgres(data_dir=home, run_dir=home / "run", port=later_port)
    yield server
    await server.stop()


@pytest.fixture(scope="module")
def wider(folder: Path, catalog: Path, later: EmbeddedPostgres, later_port: int) -> Path:
    """A catalogue with that cluster in another region."""
    cluster = f'name = "later"\nengine = "postgresql"\nregion = "elsewhere"\nadmin = "{later.admin_dsn}"\n'
    file = folder / "wider.toml"
    file.write_text(f'{catalog.read_text()}\n[[clusters]]\n{cluster}host = "127.0.0.1"\nport = {later_port}\n')
    return file


@pytest.fixture(scope="module")
async def stack(folder: Path, database_url: str, wider: Path, postgres: EmbeddedPostgres) -> AsyncIterator[Stack]:
    """A stack with that catalogue."""
    url = await new_storage(postgres, "provisioning") if database_url else ""
    async with Stack(folder / ("prov-pg" if url else "prov"), database_url=url, catalog=wider) as running:
        yield running


async def test_a_cluster_that_is_down_is_waited_for(customer: Customer, later: EmbeddedPostgres) -> None:
    """Orders for a cluster that is down are accepted and tried again, visibly, and are done when it is back."""
    for name in ("stays", "goes"):
        answer = await customer.call("POST", DATABASES, json={"name": name, **ELSEWHERE})
        assert answer.status_code == 201, answer.text

    async def tried_twice() -> dict[str, object] | None:
        shown: dict[str, object] = (await customer.call("GET", f"{DATABASES}/stays")).json()["progress"]
        return shown if shown["attempts"] >= 2 else None  # type: ignore[operator]

    progress = await eventually(tried_twice)
    assert progress is not None
    assert progress.pop("next_attempt_at") > "2026"  # type: ignore[operator]
    assert progress.pop("attempts") == 2
    assert progress == {
        "waiting_on": "cluster later",
        "last_error": "The database cluster is not available at the moment; try again later.",
    }
    for method, verb in (("GET", "connection"), *(("POST", verb) for verb in ("password", "stop", "start"))):
        refused = await customer.call(method, f"{DATABASES}/stays/{verb}")
        assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
        assert refused.json()["error"] == "The database 'stays' is provisioning: it takes no connections."
    refused = await customer.call("POST", f"{DATABASES}/stays/retry")
    assert refused.json()["error"] == "The database 'stays' is provisioning: there is nothing to try again."
    refused = await customer.call("POST", f"{DATABASES}/stays/backups")
    assert refused.json()["error"] == "The database 'stays' is provisioning: it can be backed up once it is ready."
    deleted = await customer.call("DELETE", f"{DATABASES}/goes")
    assert (deleted.status_code, deleted.json()["status"]) == (200, "deleting")
    await later.start()
    await customer.until("ready", f"{DATABASES}/stays")
    await customer.until("gone", f"{DATABASES}/goes")
    tenant = await asyncpg.connect((await customer.call("GET", f"{DATABASES}/stays/connection")).json()["uri"])
    await tenant.execute("CREATE TABLE notes ()")
    await tenant.close()


async def test_a_deletion_takes_running_backups_along(
    stack: Stack, customer: Customer, later: EmbeddedPostgres
) -> None:
    """A backup that waits for its cluster is removed with its database, which itself waits for the cluster."""
    await later.stop()
    await later.start()
    await customer.create_database("analytics", **ELSEWHERE)
    object_name = (await connection_of(customer, "analytics"))["database"]
    done = (await customer.call("POST", f"{DATABASES}/analytics/backups")).json()
    await customer.until("completed", f"{DATABASES}/analytics/backups/{done['id']}")
    await later.stop()
    running = (await customer.call("POST", f"{DATABASES}/analytics/backups")).json()
    path = f"{DATABASES}/analytics/backups/{running['id']}"

    async def waits() -> bool:
        shown = (await customer.call("GET", path)).json()
        return bool(shown["status"] == "running" and shown["progress"]["attempts"])

    await eventually(waits)
    await customer.call("DELETE", f"{DATABASES}/analytics")
    await customer.until("gone", path)
    await customer.until("deleting", f"{DATABASES}/analytics")
    files = {file.stem for file in (stack.settings.data_dir / "backups" / object_name).iterdir()}
    assert files == {done["id"]}
    await later.start()
    await customer.until("gone", f"{DATABASES}/analytics", seconds=40)
    quotas = (await customer.call("GET", "/api/portal/account")).json()["quotas"]
    assert (quotas["databases"]["used"], quotas["backups"]["used"]) == (0, 0)


async def test_a_cluster_that_is_no_longer_in_the_catalogue(stack: Stack, customer: Customer) -> None:
    """A database on a cluster that the catalogue has lost says so, is not lost itself, and can go once it is back."""
    made = await customer.create_database("analytics")
    await set_cluster(stack, made["id"], "vanished")
    refused = await customer.call("GET", f"{DATABASES}/analytics/connection")
    assert (refused.status_code, refused.json()["code"]) == (409, "conflict")
    await customer.call("PATCH", f"{DATABASES}/analytics", json={"sku": "db-s-1vcpu-1gb"})
    await customer.call("POST", f"{DATABASES}/analytics/backups")

    async def told() -> dict[str, str] | None:
        shown: dict[str, str] = (await customer.call("GET", f"{DATABASES}/analytics")).json()["progress"]
        return shown if "last_error" in shown else None

    shown = await eventually(told)
    assert shown is not None
    assert shown["waiting_on"] == "cluster vanished"
    assert shown["last_error"] == "The provider has taken this cluster out of service."
    assert (await customer.call("DELETE", f"{DATABASES}/analytics")).status_code == 200
    await set_cluster(stack, made["id"], "local-postgresql")
    await customer.until("gone", f"{DATABASES}/analytics")


async def test_a_cluster_that_is_down_at_a_look_is_told(customer: Customer, later: EmbeddedPostgres) -> None:
    """A database whose cluster goes down stays ready, and its progress says so until the cluster is back."""
    await later.stop()
    await later.start()
    await customer.create_database("analytics", **ELSEWHERE)
    connection = await connection_of(customer, "analytics")
    await later.stop()

    async def told() -> dict[str, Any] | None:
        shown: dict[str, Any] = (await customer.call("GET", f"{DATABASES}/analytics")).json()
        return shown if "progress" in shown else None

    shown = await eventually(told)
    assert shown is not None
    assert (shown["status"], shown["generation"], shown["observed_generation"]) == ("ready", 1, 1)
    assert (shown["progress"]["waiting_on"], shown["progress"]["last_error"]) == (
        "cluster later",
        "The database cluster is not available at the moment; try again later.",
    )
    assert await connection_of(customer, "analytics") == connection
    await later.start()

    async def well() -> bool:
        return await told() is None

    await eventually(well, seconds=60)
    assert await events_of(customer, "database.failed", "database.repaired") == []
    assert len(await events_of(customer, "database.ready")) == 1
    await delete(customer, "analytics")


async def test_a_size_that_is_no_longer_in_the_catalogue(stack: Stack, customer: Customer) -> None:
    """A database of a size that the catalogue has lost stays as it is, and can be changed to another."""
    made = await customer.create_database("analytics")
    async with stack.server.store.session() as session:
        await session.execute(update(Database).where(col(Database.id) == made["id"]).values(sku="db-old"))
        await session.commit()
    shown = (await customer.call("GET", f"{DATABASES}/analytics")).json()
    assert (shown["sku"], shown["status"]) == ("db-old", "ready")
    assert (await customer.call("PATCH", f"{DATABASES}/analytics", json={"tags": {"a": "b"}})).status_code == 200
    await customer.call("PATCH", f"{DATABASES}/analytics", json={"sku": "db-s-1vcpu-2gb"})
    await customer.until("ready", f"{DATABASES}/analytics")


async def set_cluster(stack: Stack, database_id: str, cluster: str) -> None:
    """Let a database be on another cluster, as after a change of the catalogue."""
    async with stack.server.store.session() as session:
        changed = update(Database).where(col(Database.id) == database_id)
        await session.execute(changed.values(cluster_target=cluster))
        await session.commit()
