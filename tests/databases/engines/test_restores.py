"""Restores of the PostgreSQL driver: as a tenant, as a whole or not at all, and never trusting the dump."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from controlplane.databases.engines.engine import ClusterUnavailable, Contents, EngineError, Target
from tests.databases.engines.cluster import LARGE, VIEW, Cluster, is_alone, new_target, programs, running
from tests.stack import eventually


@pytest.mark.parametrize(
    "hostile",
    [
        "ALTER ROLE {own} SUPERUSER",
        "SET SESSION AUTHORIZATION controlplane",
        "SET ROLE controlplane",
        "ALTER ROLE {other} PASSWORD 'x'",
        "DROP DATABASE {other}",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{other}'",
        "COPY many FROM PROGRAM 'id'",
        "COPY many TO '/tmp/many'",
        "SELECT pg_read_file('PG_VERSION')",
        "SELECT lo_import('/etc/passwd')",
        "CREATE EXTENSION file_fdw SCHEMA public",
        "CREATE FUNCTION public.f() RETURNS int LANGUAGE c AS 'libc', 'getpid'",
        "\\connect {other}",
        "\\! touch /tmp/many",
        "COMMIT; ALTER ROLE {own} SUPERUSER",
    ],
)
async def test_hostile_dump(cluster: Cluster, everything: Target, other: Target, hostile: str) -> None:
    """A dump with what a tenant may not do is refused as a whole, and reaches nothing but the tenant's own database."""
    into, victim = new_target(), await cluster.tenant(other)
    await cluster.engine.apply(into)
    dump, _ = await cluster.dump(everything)
    assert dump.count(VIEW.encode()) == 1
    statement = hostile.format(own=into.name, other=other.name) + ";"
    with pytest.raises(EngineError) as refused:
        await cluster.restore(into, dump.replace(VIEW.encode(), statement.ljust(len(VIEW)).encode()))
    assert type(refused.value) is EngineError
    assert re.search("permission denied|must be|cannot run inside|syntax error", str(refused.value.__cause__))
    if not statement.startswith("COMMIT"):
        assert await cluster.engine.contents(into.name) == Contents({})
    assert await cluster.engine.apply(into) == ()
    assert await victim.fetchval("SELECT 1") == 1
    await victim.close()
    await cluster.engine.drop(into.name)


async def test_damaged_dump(cluster: Cluster, everything: Target, other: Target) -> None:
    """What is cut off anywhere, or no dump at all, is refused as a whole."""
    dump, _ = await cluster.dump(everything)
    cuts = [dump[: len(dump) * part // 12] for part in range(12)]
    for damaged in (
        *cuts,
        dump[:5],
        dump[:-1],
        dump[:-200],
        secrets.token_bytes(5000),
        b"PGDMP" + secrets.token_bytes(5000),
    ):
        with pytest.raises(EngineError) as refused:
            await cluster.restore(other, damaged)
        assert type(refused.value) is EngineError
        assert await cluster.engine.contents(other.name) == Contents({})
    await cluster.restore(other, dump)
    with pytest.raises(EngineError, match="refused what is in the backup"):
        await cluster.restore(other, dump)  # not into what is there
    assert await cluster.engine.contents(other.name) == await cluster.engine.contents(everything.name)


@pytest.mark.parametrize("error", [RuntimeError("gone"), ConnectionResetError("gone"), OSError("gone")])
async def test_lost_source(cluster: Cluster, large: Target, other: Target, error: Exception) -> None:
    """When a dump cannot be read any further, the restore ends with what the reader said, and nothing is left."""
    dump, _ = await cluster.dump(large)

    async def break_off() -> AsyncIterator[bytes]:
        yield dump[: len(dump) // 2]
        raise error

    with pytest.raises(type(error), match="gone"):
        await cluster.engine.restore(other.name, other.password, break_off())
    assert not programs()
    assert await cluster.engine.contents(other.name) == Contents({})


async def test_cancelled_restore(cluster: Cluster, admin: asyncpg.Connection, target: Target, other: Target) -> None:
    """A restore that is cancelled ends pg_restore and what the server does for it, and leaves nothing."""
    await cluster.run(target, f"CREATE TABLE many (n int); {VIEW}")
    dump, _ = await cluster.dump(target)
    slow = dump.replace(VIEW.encode(), b"SELECT pg_sleep(600);".ljust(len(VIEW)))
    restore = asyncio.create_task(cluster.restore(other, slow))
    sleeping = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = $1 AND wait_event = 'PgSleep'"
    await eventually(lambda: admin.fetchval(sleeping, other.name))
    restore.cancel()
    with pytest.raises(asyncio.CancelledError):
        await restore
    assert not programs()
    await eventually(lambda: is_alone(admin, other))
    assert await cluster.engine.contents(other.name) == Contents({})


async def test_cluster_stops(folder: Path) -> None:
    """When the cluster stops during a dump or a restore, it is unavailable, and the restore leaves nothing."""
    target, other = new_target(), new_target()
    async with running(folder / "stopping") as cluster:
        await cluster.engine.apply(target)
        await cluster.engine.apply(other)
        await cluster.run(target, LARGE)
        whole, _ = await cluster.dump(target)

        with pytest.raises(ClusterUnavailable):  # noqa: PT012
            async with cluster.engine.dump(target.name) as dump:
                async for _ in dump.chunks():
                    await cluster.server.stop()

        async def stop_halfway() -> AsyncIterator[bytes]:
            yield whole[: len(whole) // 2]
            await eventually(lambda: _has_tables(cluster, other))
            await cluster.server.stop()
            yield whole[len(whole) // 2 :]

        await cluster.server.start()
        with pytest.raises(ClusterUnavailable):
            await cluster.engine.restore(other.name, other.password, stop_halfway())
        await cluster.server.start()
        assert await cluster.engine.contents(other.name) == Contents({})


async def test_restore_without_entry(cluster: Cluster, target: Target) -> None:
    """A restore for which the tenant has no connection left is to be tried again; one that cannot log in is not."""
    sessions = [await cluster.tenant(target) for _ in range(target.connections)]
    with pytest.raises(ClusterUnavailable):
        await cluster.restore(target, b"")
    for session in sessions:
        await session.close()
    await cluster.engine.apply(replace(target, login=False))
    for refused in (target, replace(target, password="guess"), new_target()):
        with pytest.raises(EngineError) as failure:
            await cluster.restore(refused, b"")
        assert type(failure.value) is EngineError
        assert refused.password not in f"{failure.value!r} {failure.value.__cause__!r}"


async def _has_tables(cluster: Cluster, target: Target) -> bool:
    """Return whether somebody makes tables there, be they committed or not."""
    admin = await cluster.admin(target.name)
    found = await admin.fetchval(
        "SELECT count(*) > 0 FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND database > 0"
    )
    await admin.close()
    return bool(found)
