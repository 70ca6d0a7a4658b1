"""Backups over REST: ordered, listed, counted and removed, each with its sealed file and its manifest."""

import hashlib
import json
import stat

import asyncpg

from controlplane.api.v1 import backups_pb2, backups_pb2_grpc
from tests.backups.rest import DATABASES, back_up, connection_of, delete, file_of, path_of
from tests.stack import Customer, Stack, eventually

BACKUPS = f"{DATABASES}/analytics/backups"


async def test_size_and_digest_are_the_files(stack: Stack, customer: Customer) -> None:
    """A completed backup tells its sealed file's size and SHA-256; it and its manifest are the owner's alone."""
    await customer.create_database("analytics")
    object_name = (await connection_of(customer, "analytics"))["database"]
    backup = await back_up(customer, "analytics")
    file, manifest = (file_of(stack, object_name, backup, suffix) for suffix in (".htxb", ".json"))
    content = file.read_bytes()
    assert content.startswith(b"HTXB")
    assert backup["size_bytes"] == len(content)
    assert backup["sha256"] == hashlib.sha256(content).hexdigest()
    assert backup.keys() == {
        *("id", "database", "status", "trigger", "size_bytes", "sha256", "created_at", "completed_at")
    }
    assert (backup["database"], backup["trigger"]) == ("analytics", "on_demand")
    assert backup["completed_at"] > backup["created_at"]
    assert {stat.S_IMODE(each.stat().st_mode) for each in (file, manifest)} == {0o600}
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert {found.name for found in file.parent.iterdir()} == {file.name, manifest.name}
    said = json.loads(manifest.read_bytes())["manifest"]
    assert (said["sealed_bytes"], said["sealed_sha256"]) == (len(content), backup["sha256"])


async def test_nothing_can_be_read_in_the_files(stack: Stack, customer: Customer) -> None:
    """Of what the customer wrote, neither the file nor the manifest shows a word: of a table, its name and its rows."""
    word = b"the recipe of the sauce"
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    tenant = await asyncpg.connect(connection["uri"])
    await tenant.execute("CREATE TABLE recipes (text text, noise text)")
    rows = "SELECT $1, sha512(n::text::bytea)::text FROM generate_series(1, 200) n"  # noise does not compress
    await tenant.execute(f"INSERT INTO recipes {rows}", word.decode())
    await tenant.close()
    backup = await back_up(customer, "analytics")
    sealed, manifest = (
        file_of(stack, connection["database"], backup, suffix).read_bytes() for suffix in (".htxb", ".json")
    )
    assert len(sealed) > 200 * 64
    assert not [part for part in (word, b"recipes", b"CREATE TABLE", b"PGDMP") if part in sealed]
    assert word not in manifest
    assert json.loads(manifest)["manifest"]["contents"]["tables"]["public.recipes"]["rows"] == 200


async def test_a_file_under_its_name_is_whole(stack: Stack, customer: Customer) -> None:
    """For as long as the dump is written, there is neither a file under the backup's name nor a manifest."""
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    holder = await asyncpg.connect(connection["uri"])
    await holder.execute("CREATE TABLE notes ()")
    lock = holder.transaction()
    await lock.start()
    await holder.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")  # the dump waits for it
    backup = (await customer.call("POST", BACKUPS)).json()
    assert backup["status"] == "running"
    assert "size_bytes" not in backup
    file = file_of(stack, connection["database"], backup)

    async def parts() -> list[str]:
        return [each.name for each in file.parent.glob(f"{file.name}.*.part")]

    await eventually(parts)
    assert not [each for each in file.parent.iterdir() if each.suffix != ".part"]
    await lock.rollback()
    await holder.close()
    done = await customer.until("completed", path_of(backup))
    assert done["size_bytes"] == file.stat().st_size
    assert {each.name for each in file.parent.iterdir()} == {file.name, f"{backup['id']}.json"}


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
    backup = await back_up(customer, "analytics")
    refused = await customer.call("POST", BACKUPS)
    assert (refused.status_code, refused.json()["code"]) == (402, "quota_exceeded")
    assert "1 of 1 backups" in refused.json()["error"]
    assert len((await customer.call("GET", BACKUPS)).json()) == 1
    await customer.call("DELETE", path_of(backup))
    await customer.until("gone", path_of(backup))
    await back_up(customer, "analytics")


async def test_a_deletion_removes_the_files(stack: Stack, customer: Customer) -> None:
    """A deleted backup is deleting, then 404, and its two files are gone, but no other's; again changes nothing."""
    await customer.create_database("analytics")
    object_name = (await connection_of(customer, "analytics"))["database"]
    first, second = await back_up(customer, "analytics"), await back_up(customer, "analytics")
    answers = [await customer.call("DELETE", path_of(first)) for _ in range(2)]
    assert answers[0].json()["status"] == "deleting"
    assert answers[1].status_code in {200, 404}
    await customer.until("gone", path_of(first))
    folder = file_of(stack, object_name, second).parent
    assert {each.name for each in folder.iterdir()} == {f"{second['id']}.htxb", f"{second['id']}.json"}
    assert (await customer.call("GET", BACKUPS)).json() == [second]
    assert (await customer.call("GET", "/api/portal/account")).json()["quotas"]["backups"]["used"] == 1


async def test_with_a_database_go_its_backups_but_the_last(stack: Stack, customer: Customer) -> None:
    """A deleted database takes its backups and their quota along; the files of the last completed one are kept."""
    await customer.create_database("analytics")
    object_name = (await connection_of(customer, "analytics"))["database"]
    first, last = await back_up(customer, "analytics"), await back_up(customer, "analytics")
    await delete(customer, "analytics")
    assert not file_of(stack, object_name, first).exists()
    kept = {each.name for each in file_of(stack, object_name, last).parent.iterdir()}
    assert kept == {f"{last['id']}.htxb", f"{last['id']}.json"}
    assert (await customer.call("GET", "/api/portal/account")).json()["quotas"]["backups"]["used"] == 0


async def test_a_backup_that_is_written_goes_with_its_database(stack: Stack, customer: Customer) -> None:
    """A database whose only backup is still being written is deleted with it, and leaves no folder."""
    await customer.create_database("analytics")
    connection = await connection_of(customer, "analytics")
    holder = await asyncpg.connect(connection["uri"])
    await holder.execute("CREATE TABLE notes ()")
    lock = holder.transaction()
    await lock.start()
    await holder.execute("LOCK TABLE notes IN ACCESS EXCLUSIVE MODE")
    backup = (await customer.call("POST", BACKUPS)).json()
    folder = file_of(stack, connection["database"], backup).parent

    async def is_written() -> bool:
        return folder.exists()

    await eventually(is_written)
    answer = await customer.call("DELETE", f"{DATABASES}/analytics")
    assert "undelete_until" not in answer.json()
    await holder.close()
    await customer.until("gone", f"{DATABASES}/analytics", seconds=40)
    assert not folder.exists()
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
