"""Dumps of the PostgreSQL driver: whole, private, and never half a file."""

import asyncio
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from controlplane.databases.engines.engine import EngineError, Target
from tests.databases.engines.cluster import BIN_DIR, Cluster, files_in


def _children() -> set[bytes]:
    """Return the names of our child processes."""
    stats = [file.read_bytes() for file in Path("/proc/self/task").glob("*/children")]
    return {Path(f"/proc/{pid.decode()}/comm").read_bytes().strip() for line in stats for pid in line.split()}


async def test_dump(cluster: Cluster, target: Target, other: Target, tmp_path: Path) -> None:
    """A dump restores into another tenant's database as that tenant, also when its own tenant is locked out."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE notes (n int PRIMARY KEY); INSERT INTO notes SELECT generate_series(1, 1000)")
    await tenant.close()
    await cluster.engine.apply(replace(target, login=False))
    file = tmp_path / "dump"
    file.write_text("left over" * 100_000)
    file.chmod(0o600)

    await cluster.engine.dump(target.name, file)

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    uri = cluster.engine.connection(other.name, other.password).uri
    options = ("--no-owner", "--no-privileges", "--exit-on-error", f"--dbname={uri}")
    subprocess.run([BIN_DIR / "pg_restore", *options, file], check=True)  # noqa: ASYNC221
    tenant = await cluster.tenant(other)
    assert await tenant.fetchval("SELECT sum(n) FROM notes") == 500500
    assert await tenant.fetchval("SELECT tableowner FROM pg_tables WHERE tablename = 'notes'") == other.name
    await tenant.close()


async def test_dump_of_locked_tables(cluster: Cluster, target: Target, tmp_path: Path) -> None:
    """A tenant who took rights from himself, or made row-level security bind himself too, still gets a whole dump."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE mine (n int); REVOKE ALL ON mine FROM CURRENT_USER; CREATE TABLE rows (n int)")
    await tenant.execute("ALTER TABLE rows ENABLE ROW LEVEL SECURITY; ALTER TABLE rows FORCE ROW LEVEL SECURITY")
    await tenant.close()
    await cluster.engine.dump(target.name, tmp_path / "dump")
    assert (tmp_path / "dump").stat().st_size > 0


async def test_new_dump_is_private(cluster: Cluster, target: Target, tmp_path: Path) -> None:
    """Nobody but the control plane reads a dump, whatever the umask."""
    umask = os.umask(0)
    await cluster.engine.dump(target.name, tmp_path / "dump")
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "dump").stat().st_mode) == 0o600


async def test_failed_dump(cluster: Cluster, tmp_path: Path) -> None:
    """A dump that fails leaves no file; the customer reads a sentence, the log pg_dump's words."""
    with pytest.raises(EngineError, match=r"^The database could not be dumped") as failure:
        await cluster.engine.dump("db_missing", tmp_path / "dump")
    assert type(failure.value) is EngineError
    assert '"db_missing" does not exist' in str(failure.value.__cause__)
    assert not files_in(tmp_path)


async def test_cancelled_dump(cluster: Cluster, admin: asyncpg.Connection, target: Target, tmp_path: Path) -> None:
    """A dump that is cancelled ends pg_dump and leaves no file."""
    tenant = await cluster.tenant(target)
    await tenant.execute("CREATE TABLE notes (n int)")
    await tenant.execute("BEGIN; LOCK TABLE notes")
    dump = asyncio.create_task(cluster.engine.dump(target.name, tmp_path / "dump"))
    running = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pg_dump' AND wait_event_type = 'Lock'"
    async with asyncio.timeout(10):
        while not await admin.fetchval(running):  # noqa: ASYNC110
            await asyncio.sleep(0.02)

    assert b"pg_dump" in _children()

    dump.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dump

    assert not files_in(tmp_path)
    assert b"pg_dump" not in _children()
    await tenant.close()
